"""What the FVD benchmark compares: two sides that share no group, and changes that are what their names say."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from rdtf_ds.benchmarks import fvd
from rdtf_ds.data.clips.clip import DecodeLimits
from rdtf_ds.data.clips.writing import write_clip
from rdtf_ds.data.indexing.index_building import build_index
from rdtf_ds.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(24):
        write_clip(rng.integers(0, 256, (6 if number else 3, 8, 8, 3), np.uint8), root / f"{number}.png")
        rows.append(f'{{"file_name": "{number}.png", "text": "", "group": "{number // 3}"}}\n')
    (root / "metadata.jsonl").write_text("".join(rows))
    return root


def test_sides_share_no_group_and_have_clips_that_are_long_enough(folder: Path) -> None:
    index = build_index(folder, DecodeLimits())
    first, second = fvd.two_sides(index, 8, 6)
    assert len(first) == len(second) == 8 and not set(first) & set(second)
    groups = [{index.rows[clip_id].group for clip_id in side} for side in (first, second)]
    assert not groups[0] & groups[1]
    assert all(index.rows[clip_id].kept == 6 for clip_id in first + second)
    assert fvd.two_sides(index, 8, 6) == (first, second)
    for side, of in zip((first, second), groups, strict=True):
        assert len(of) == 4 and len({index.rows[clip_id].group for clip_id in side[:4]}) == 4, "one of each group before a second"
    with pytest.raises(UserError, match="24 clips of at least 6 frames are needed"):
        fvd.two_sides(index, 12, 6)


def test_changes_are_what_they_are_called() -> None:
    rng = np.random.default_rng(1)
    clip = rng.integers(60, 190, (16, 32, 32, 3), dtype=np.uint8)
    changed = {name: change(clip, np.random.default_rng(2)) for name, change in fvd.CHANGES.items()}
    assert all(other.shape == clip.shape and other.dtype == np.uint8 for other in changed.values())
    assert np.array_equal(changed["real"], clip)
    for name, deviation in (("noise σ 10", 10), ("noise σ 30", 30)):
        assert (changed[name].astype(float) - clip).std() == pytest.approx(deviation, rel=0.05)
    assert all(np.array_equal(frame, clip[0]) for frame in changed["frozen"])
    shuffled = changed["time-shuffled"]
    assert not np.array_equal(shuffled, clip)
    assert sorted(frame.tobytes() for frame in shuffled) == sorted(frame.tobytes() for frame in clip)


def test_the_report_has_a_bar_for_each_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pixels:
        """Mean and spread of a clip's pixels in the place of I3D's logits."""

        def __init__(self, weights: Path | None) -> None: ...

        def __call__(self, clips):
            return np.stack([np.concatenate([clip.mean(axis=(1, 2, 3))[:3], clip.std(axis=(0, 1, 2))]) for clip in clips])

        def variant(self, num_frames: int) -> str:
            return f"pixels of {num_frames} frames"

    monkeypatch.setattr(fvd, "VideoFeatures", Pixels)
    with pytest.raises(UserError, match="--clips is 7: 8 is the least"):
        fvd.run(Namespace(data=folder, index_dir=None, clips=7, frames=6, weights=None, size=8))
    report = fvd.run(Namespace(data=folder, index_dir=None, clips=8, frames=6, weights=None, size=8))
    rows = {row["name"]: row for row in report["rows"]}
    assert [row["bar"] for row in rows.values()] == [None, 1.0, 1.0, 1.0, None]
    noisy = rows["real against noise σ 30"]
    assert noisy["ratio"] == pytest.approx(noisy["value"] / rows["real against noise σ 10"]["value"]) and noisy["at_least"]
    assert report["notes"][0] == "pixels of 6 frames" and "limit" in report["notes"][2]
