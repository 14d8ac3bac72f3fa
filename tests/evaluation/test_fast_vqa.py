"""FAST-VQA: figures of the project's own code, its weight file read, and scores that hang on the clip alone.

The figures were taken as those of test_swin3d.py were, from the project's DiViDeAddEvaluator with the same weights and inputs.
"""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rdtf_ds.errors import UserError
from rdtf_ds.evaluation import fast_vqa
from rdtf_ds.evaluation.fast_vqa import FastVQA, VideoQuality
from rdtf_ds.evaluation.fast_vqa_weights import load_weights
from rdtf_ds.evaluation.fragments import cut_views
from rdtf_ds.evaluation.swin3d import Swin3D
from tests.evaluation.test_swin3d import seeded, seeded_input


def tiny() -> FastVQA:
    """The same with coarse tokens, and few of everything."""
    return FastVQA(Swin3D(channels=6, depths=(2, 1), heads=(2, 2), window=(2, 7, 7), patch=(8, 16, 16), gated=(True, False)))


def as_released(network: FastVQA, **more: Any) -> dict[str, Any]:
    """What the project saves: the constants of every attention among the weights, and correlations, numbers of numpy, beside them."""
    state = dict(network.state_dict())
    state |= {
        name.replace("relative_position_bias_table", "relative_position_index"): torch.zeros(4, 4, dtype=torch.int64)
        for name in network.state_dict()
        if name.endswith("relative_position_bias_table")
    }
    return {"state_dict": state | more, "validation_results": (np.float64(0.877), np.float32(0.8), -1, 1000)}


@pytest.fixture
def scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., VideoQuality]:
    """Makes scorers with a tiny network of seeded weights."""
    monkeypatch.setattr(fast_vqa, "FastVQA", tiny)
    network = seeded(tiny(), 0.15)
    network.vqa_head.fc_last.weight.mul_(0.05)  # scores within the sigmoid's range
    torch.save(as_released(network), tmp_path / "tiny.pth")
    return lambda **options: VideoQuality(tmp_path / "tiny.pth", **options)


def some_clips() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((8, 24, 24, 3), (2, 300, 260, 3), (34, 32, 40, 3))]


def test_the_network_is_the_original_s() -> None:
    network = FastVQA()
    lines = sorted(f"{name} {tuple(value.shape)}" for name, value in network.state_dict().items())
    assert (len(lines), sum(value.numel() for value in network.state_dict().values())) == (185, 28_127_901)
    assert {"fragments_backbone.patch_embed.proj.weight (96, 3, 2, 4, 4)", "vqa_head.fc_hid.weight (64, 768, 1, 1, 1)"} <= set(lines)
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == "e81f5061d3405fc76e47b2a43cd731303cd9c390c2ea7f70d9bdd94235a6298f"
    seeded(network, 0.04)
    assert network(seeded_input(1, 3, 8, 64, 64)).item() == pytest.approx(0.292787, abs=1e-4)
    assert network(seeded_input(1, 3, 32, 96, 64)).item() == pytest.approx(0.267391, abs=1e-4)


def test_weights_come_back_from_the_released_file(tmp_path: Path) -> None:
    network, filled = seeded(tiny(), 0.1), tiny()
    torch.save(as_released(network), tmp_path / "w.pth")
    load_weights(filled, tmp_path / "w.pth")
    assert all(torch.equal(value, filled.state_dict()[name]) for name, value in network.state_dict().items())


def test_numbers_of_an_old_numpy_are_read(tmp_path: Path) -> None:
    torch.save(as_released(seeded(tiny(), 0.1)), tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "old.pth", "w") as old:
        for name in new.namelist():
            old.writestr(name, new.read(name).replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n"))
        pickled = old.read(next(name for name in old.namelist() if name.endswith("data.pkl")))
    assert b"numpy.core.multiarray\n" in pickled and b"numpy._core" not in pickled
    load_weights(tiny(), tmp_path / "old.pth")


class _Command:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


def test_a_file_that_would_run_something_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(as_released(tiny()) | {"validation_results": _Command()}, "w.pth")
    with pytest.raises(UserError, match="cannot be read as weights of FAST-VQA-B.*about 127 MB"):
        load_weights(tiny(), Path("w.pth"))
    assert not (tmp_path / "ran").exists()


def test_a_missing_file_is_told_with_where_it_comes_from(tmp_path: Path) -> None:
    with pytest.raises(UserError) as told:
        VideoQuality(tmp_path / "absent.pth")
    for part in ("absent.pth", "FAST_VQA_B_1_4.pth", "about 127 MB", "github.com/VQAssessment/FAST-VQA-and-FasterVQA/releases/tag/v2.0.0"):
        assert part in str(told.value)


FIRST = "fragments_backbone.patch_embed.proj.weight"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            lambda state: {"state_dict": {name: state[name] for name in state if name != FIRST}},
            f"it lacks 1 tensor of 54, such as '{FIRST}'",
        ),
        (lambda state: {"model": state}, "it lacks 54 tensors of 54"),
        (lambda state: {"state_dict": state | {FIRST: torch.zeros(5, 3, 2)}}, f"'{FIRST}' is (5, 3, 2), not (6, 3, 8, 16, 16)"),
        (lambda state: {"state_dict": state | {FIRST: state[FIRST] * float("nan")}}, f"'{FIRST}' has values that are no finite numbers"),
        (lambda state: {"state_dict": state | {FIRST: state[FIRST].long()}}, f"'{FIRST}' has values that are no finite numbers"),
        (
            lambda state: {"state_dict": state | {"resize.bias": torch.zeros(3)}},
            "it has 1 tensor of another network, such as 'resize.bias'",
        ),
        (lambda state: [1, 2], "there is no 'state_dict' in it"),
        (lambda state: {"state_dict": 3}, "there is no 'state_dict' in it"),
    ],
)
def test_other_files_are_told_with_what_is_wrong(tmp_path: Path, content: Callable[[dict[str, Any]], Any], said: str) -> None:
    torch.save(content(dict(tiny().state_dict())), tmp_path / "w.pth")
    with pytest.raises(UserError, match=rf"'.*w\.pth' does not hold .* FAST-VQA-B: {re.escape(said)}.* The file is FAST_VQA_B_1_4.pth"):
        load_weights(tiny(), tmp_path / "w.pth")


def test_torn_files_and_other_formats_are_told(tmp_path: Path) -> None:
    torch.save(as_released(tiny()), tmp_path / "whole.pth")
    data = (tmp_path / "whole.pth").read_bytes()
    files = {"torn": data[:-100], "half": data[: len(data) // 2], "empty": b"", "pointer": b"version https://git-lfs.github.com/spec/v1"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"'.*{name}' cannot be read as weights of FAST-VQA-B .*FAST_VQA_B_1_4.pth") as told:
            load_weights(tiny(), tmp_path / name)
        assert "weights_only" not in str(told.value), "torch's own advice would run what the file says"


def test_a_score_is_the_sigmoid_of_the_mean_over_views(scorer: Callable[..., VideoQuality]) -> None:
    clips = some_clips()
    scores = scorer().score(iter(clips))
    assert scores.shape == (3,) and scores.dtype == np.float64 and ((scores > 0) & (scores < 1)).all()
    network = seeded(tiny(), 0.15)
    network.vqa_head.fc_last.weight.mul_(0.05)
    for clip, score in zip(clips, scores, strict=True):
        raw = np.mean([network(view[None]).item() for view in cut_views(clip, seed=0)])
        # The project's vqa.py: FAST-VQA's mean and deviation.
        assert score == pytest.approx(1 / (1 + np.exp(-(raw + 0.110198185) / 0.04178565)), abs=1e-5)
    assert len(set(scores)) == 3
    assert scorer().score([]).shape == (0,)


def test_scores_hang_on_the_clip_and_the_seed_alone(scorer: Callable[..., VideoQuality]) -> None:
    clips, judge = some_clips()[:2], scorer()
    scores = judge.score(clips)
    assert np.array_equal(scorer().score(clips[::-1]), scores[::-1])
    assert judge.score(clips[1:2]) == scores[1:2]
    assert scorer(seed=1).score(clips[1:2]) != scores[1:2]  # 300 px: patches have room
    assert scorer(seed=1).score(clips[:1]) == scores[:1]


def test_every_frame_counts_at_interval_1_and_half_of_eight_at_2(scorer: Callable[..., VideoQuality]) -> None:
    clip = some_clips()[0]
    changed = clip.copy()
    changed[5] = 0
    one, two = scorer(), scorer(frame_interval=2)
    assert one.score([clip]) != one.score([changed])
    assert two.score([clip]) == two.score([changed])


def test_the_variant_says_what_a_score_is_made_of(scorer: Callable[..., VideoQuality]) -> None:
    said = scorer(seed=7).variant(8)
    for part in ("FAST-VQA-B", "8 frames, played over and over to 32", "224 px", "seed 7", "(raw +0.1102) / 0.0418"):
        assert part in said
    assert "; 4 of 8 frames, played" in scorer(frame_interval=2).variant(8)
    assert "played" not in scorer().variant(33) and "played" in scorer().variant(31)
    assert "; 32 frames;" in scorer().variant(32) and "; 128 of 300 frames;" in scorer().variant(300)
