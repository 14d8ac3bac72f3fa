"""The figures of an evaluation, from instruments whose answers are known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import rdtf_ds.evaluation.measures as measures
from rdtf_ds.errors import UserError
from rdtf_ds.evaluation.clip_similarity import Similarity
from rdtf_ds.evaluation.fast_vqa_weights import REMEDY
from rdtf_ds.evaluation.frechet import Extrapolation, Normal, frechet_distance
from rdtf_ds.evaluation.i3d_weights import WeightsNotFound
from rdtf_ds.evaluation.measures import DRAWS, Instruments, Measures, against_others, distances, limit_against_others, load_instruments
from rdtf_ds.evaluation.protocol import make_tasks

I2V, INTERPOLATION = make_tasks(["i2v", "interpolation"], 4)
COUNT = 16


class Features:
    """A clip's features are its first pixels."""

    def __call__(self, clips: Iterable[np.ndarray]) -> np.ndarray:
        return np.stack([clip[0, 0, :3].reshape(-1) for clip in clips]).astype(np.float64)

    def variant(self, num_frames: int) -> str:
        return f"first pixels of {num_frames} frames"


class Brightness:
    """A clip's quality is its mean."""

    def score(self, clips: Iterable[np.ndarray]) -> np.ndarray:
        return np.array([clip.mean() / 255 for clip in clips])

    def variant(self, num_frames: int) -> str:
        return "brightness"


class Counted:
    """Similarity tells how many clips there were, and their mean."""

    source = "a scorer"

    def score(self, clips: Iterable[np.ndarray], captions: Sequence[str]) -> Similarity:
        shown = list(clips)
        mean = float(np.mean(shown)) / 255
        return Similarity(plain=mean, among_candidates=mean / 2, first=mean / 4, candidates=len(set(captions)), clips=len(shown))


def clips(seed: int, count: int = COUNT) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, 4, 8, 8, 3), np.uint8))


def all_tools() -> Instruments:
    return Instruments(Features(), Brightness(), Counted())  # type: ignore[arg-type]


def table_of(tools: Instruments, task=I2V, captions=("a", "b") * (COUNT // 2), count=COUNT):
    found = Measures(tools, lambda: iter(clips(0, count)), list(captions), 4)
    return found, {figure.name: figure for figure in found.of(task, lambda: iter(clips(1, count)))}


def test_each_measure_stands_beside_that_of_the_real_clips() -> None:
    found, rows = table_of(all_tools())
    real, made = np.mean(clips(0)) / 255, np.mean(clips(1)) / 255
    assert list(rows) == [
        "FVD, N = 16", "FVD, as N grows without end", "FVD, 8 against 8 others", "VQA",
        "CLIP, share of its own among 2 captions", "CLIP, own caption first of 2", "CLIP, mean cosine",
    ]  # fmt: skip
    assert (rows["VQA"].model, rows["VQA"].real) == pytest.approx((made, real)) and rows["VQA"].paper == 0.502
    among, first, plain = list(rows.values())[4:]
    assert (among.model, among.real, among.paper) == pytest.approx((made / 2, real / 2, 0.376))
    assert (first.model, first.real, first.paper) == (pytest.approx(made / 4), pytest.approx(real / 4), None)
    assert (plain.model, plain.real, plain.paper) == (pytest.approx(made), pytest.approx(real), None)
    assert [row.lower_is_better for row in rows.values()] == [True] * 3 + [False] * 4
    assert found.variants() == {
        "FVD": "first pixels of 4 frames", "VQA": "brightness", "CLIP": "a scorer; all 2 captions of the test set are candidates"
    }  # fmt: skip


def test_distances_are_of_all_clips_of_endlessly_many_and_of_halves() -> None:
    _, rows = table_of(all_tools())
    real, made = Features()(clips(0)), Features()(clips(1))
    whole, limit, halves = list(rows.values())[:3]
    assert whole.model == frechet_distance(Normal.of_samples(real), Normal.of_samples(made))
    assert (whole.real, whole.paper, whole.spread) == (None, 442.18, None)
    assert (limit.model, limit.real) == (limit_against_others(real, made), limit_against_others(real, real)) and limit.paper is None
    assert halves.model == against_others(real, made)[0] and halves.real == against_others(real, real)[0]
    assert halves.spread == (against_others(real, made)[1], against_others(real, real)[1]) and halves.paper is None


def test_halves_share_no_clip_and_are_the_same_for_both() -> None:
    real = np.arange(14.0).reshape(7, 2)
    drawn: list[tuple[set[float], set[float]]] = []

    def keep(one: np.ndarray, other: np.ndarray) -> float:
        drawn.append((set(one[:, 0]), set(other[:, 0])))
        return float(len(drawn))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "_distance", keep)
        mean, deviation = against_others(real, real)
        against_others(real, real + 100)
    assert len(drawn) == 2 * DRAWS
    for (one, other), (again, made) in zip(drawn[:DRAWS], drawn[DRAWS:], strict=True):
        assert len(one) == len(other) == 3 and not one & other
        assert again == one and {value - 100 for value in made} == other
    assert len({frozenset(one) for one, _ in drawn}) > 2
    assert (mean, deviation) == (pytest.approx((DRAWS + 1) / 2), pytest.approx(np.std(np.arange(1, DRAWS + 1))))


def test_the_limit_is_that_of_halves_that_share_no_clip() -> None:
    real = np.arange(34.0).reshape(17, 2)
    asked = []

    def keep(one: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> Extrapolation:
        asked.append((one, other, rng.integers(2**60)))
        return Extrapolation((), (), (), 7.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "extrapolate", keep)
        assert limit_against_others(real, real) == limit_against_others(real, real + 100) == 7.0
    (one, other, drawn), (again, made, drawn_again) = asked
    assert len(one) == len(other) == 8 and not set(one[:, 0]) & set(other[:, 0]) and drawn == drawn_again
    assert np.array_equal(again, one) and np.array_equal(made - 100, other)
    assert not np.array_equal(np.sort(one, axis=0), real[:8]), "halves are drawn"


def test_clips_that_are_nearly_the_real_ones_end_where_real_ones_end() -> None:
    # The true distance is 0; sets whose rows belong together, drawn each for itself, would end at about -0.6 of what N shows.
    rng = np.random.default_rng(0)
    real = rng.normal(size=(400, 20))
    _, limit, halves = distances(real, real + 0.01 * rng.normal(size=real.shape))
    assert halves.model is not None and limit.model is not None and limit.real is not None
    assert abs(limit.model) < 0.25 * halves.model and limit.model == pytest.approx(limit.real, abs=0.02 * halves.model)
    assert distances(real, real + 3)[1].model == pytest.approx(20 * 9, rel=0.1)


def test_clips_that_are_the_real_ones_have_no_distance_but_that_of_others() -> None:
    real = Features()(clips(0, 40))
    whole, limit, halves = distances(real, real)
    assert whole.model == pytest.approx(0, abs=1e-6) and halves.model == halves.real and halves.model > 1
    assert limit.model == limit.real


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (2, 1), (3, 1), (4, 2), (15, 2), (16, 3)])
def test_few_clips_have_fewer_rows(count: int, rows: int) -> None:
    found = distances(*np.random.default_rng(0).random((2, count, 3)), paper=9.0)
    assert len(found) == rows and found[0].paper == 9.0
    assert (found[0].model is None) == (count == 1)
    assert ("one clip is not enough" in found[0].note) == (count == 1)


def test_the_papers_second_table_has_no_similarity() -> None:
    _, rows = table_of(all_tools(), INTERPOLATION)
    assert not any(row.measure == "CLIP" for row in rows.values()) and rows["VQA"].paper == 0.536
    assert rows["FVD, N = 16"].paper == 192.62


def test_similarity_is_measured_for_the_tables_that_have_it_alone() -> None:
    def refuse(*arguments: object) -> Similarity:
        raise AssertionError("the paper's Table 2 has no similarity")

    tools = all_tools()
    tools.clip.score = refuse  # type: ignore[union-attr, method-assign]
    found, rows = table_of(tools, INTERPOLATION)
    assert "CLIP" not in found.variants() and {row.measure for row in rows.values()} == {"FVD", "VQA"}


def test_without_captions_similarity_is_told_to_be_missing() -> None:
    found, rows = table_of(all_tools(), captions=())
    assert "CLIP" not in found.variants(), "all 0 captions are no candidates"
    assert rows["CLIP"].model is None and "no clip of the test set has one" in rows["CLIP"].note and rows["CLIP"].paper == 0.376


@pytest.mark.parametrize("lacking", ["fvd", "vqa", "clip"])
def test_what_is_missing_is_told_and_the_rest_is_measured(lacking: str) -> None:
    tools = Instruments(**{**vars(all_tools()), lacking: "it lacks a file"})
    found, rows = table_of(tools)
    name = lacking.upper()
    assert tools.missing() == {name: "it lacks a file"} and name not in found.variants() and len(found.variants()) == 2
    (row,) = [row for row in rows.values() if row.measure == name]
    assert (row.model, row.real, row.note) == (None, None, "it lacks a file") and row.paper is not None
    assert all(row.model is not None and not row.note for row in rows.values() if row.measure != name)


def test_every_set_is_read_in_its_own_pass() -> None:
    asked = {"real": 0, "made": 0}

    def given(name: str, seed: int):
        asked[name] += 1
        return iter(clips(seed))

    found = Measures(all_tools(), lambda: given("real", 0), ["a"] * COUNT, 4)
    found.of(I2V, lambda: given("made", 1))
    found.of(INTERPOLATION, lambda: given("made", 1))
    assert asked == {"real": 3, "made": 3 + 2}, "the real clips are measured once for all tasks"


def test_nothing_named_and_nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object) -> None:
        raise WeightsNotFound("pip install something")

    monkeypatch.setattr(measures, "VideoFeatures", absent)
    missing = load_instruments(None, None, None).missing()
    assert missing["FVD"] == "pip install something"
    assert "none are named by --vqa_weights" in missing["VQA"] and missing["VQA"].endswith(REMEDY)
    assert "FAST_VQA_B_1_4.pth" in REMEDY and "VQAssessment/FAST-VQA-and-FasterVQA" in REMEDY
    assert "--clip FOLDER" in missing["CLIP"] and "openai/clip-vit-base-patch32" in missing["CLIP"]


@pytest.mark.parametrize(("place", "option"), [(0, "--fvd_weights"), (1, "--vqa_weights")])
def test_a_file_that_was_named_must_be_there_and_be_right(tmp_path: Path, place: int, option: str) -> None:
    path = tmp_path / "weights.pth"
    named = [path if number == place else None for number in range(2)]
    with pytest.raises(UserError, match=f"{option} .*weights.pth: there is no such file"):
        load_instruments(*named, None)
    path.write_bytes(b"torn")
    with pytest.raises(UserError, match="weights.pth"):
        load_instruments(*named, None)


def test_a_clip_model_that_was_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="CLIP for similarity not found: --clip is"):
        load_instruments(None, None, str(tmp_path))


def test_another_networks_file_is_refused_before_any_clip_is_made(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Flatten()).save(str(tmp_path / "other.pt"))
    with pytest.raises(UserError, match=r"other.pt' does not work as I3D, called as"):
        load_instruments(tmp_path / "other.pt", None, None)


def test_a_gpu_that_is_too_full_for_an_instrument_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(weights: Path | None, device: str) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(measures, "VideoFeatures", full)
    with pytest.raises(UserError, match="GPU's memory does not do for measuring.*What is made is kept: start again"):
        load_instruments(None, None, None, "cuda")
