"""The same batches, to the byte and in the same order: for any number of workers, and from a folder as from shards of the same clips.

Formats are those of real clips; some files were broken when they were indexed, and some break between indexing and training.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rdtf_ds.curriculum.curriculum import Curriculum
from rdtf_ds.curriculum.pid import PIDController
from rdtf_ds.curriculum.static import StaticSchedule
from rdtf_ds.data.clips.clip import DecodeLimits
from rdtf_ds.data.clips.places import read_place
from rdtf_ds.data.clips.writing import write_clip
from rdtf_ds.data.dataset import DropRates, LatentShape, StickerDataset
from rdtf_ds.data.indexing.index import ClipIndex
from rdtf_ds.data.indexing.index_building import build_index
from rdtf_ds.data.loader import PlannedLoader
from rdtf_ds.data.sources.shards import ShardWriter
from rdtf_ds.data.sources.sources import list_clips
from rdtf_ds.data.step_plan import PlanQueue, StepPlanner
from rdtf_ds.diffusion.masks import Task

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores, on purpose

START = {Task.INTERPOLATION: 0.6, Task.PREDICTION: 0.25, Task.GENERATION: 0.15}
END = {Task.INTERPOLATION: 0.2, Task.PREDICTION: 0.3, Task.GENERATION: 0.5}
LIMITS = DecodeLimits(max_frames=12)
STEPS, GLOBAL_BATCH, MICRO_BATCH = 6, 8, 2
BREAK_LATER = ("b/05.webp", "b/07.mp4")  # one decoded in the worker, one in its child


def clips_of_every_format(root: Path) -> Path:
    """Noise, so that every clip, frame and colour differs; three of the files are broken, and a caption is missing."""
    shapes = [(".gif", 3), (".webp", 4), (".png", 4), (".mp4", 3)]
    for number in range(12):
        suffix, channels = shapes[number % 4]
        frames = np.random.default_rng(number).integers(0, 256, (3 + number, 24, 32 - number // 6 * 16, channels), np.uint8)
        path = root / "ab"[number // 4 % 2] / f"{number:02d}{suffix}"
        write_clip(frames, path, durations_ms=40 + number)
        if number != 3:
            path.with_suffix(".txt").write_text(f"sticker {number} waves its hand")
    for name, of in (("cut.gif", "a/00.gif"), ("cut.webp", "a/01.webp"), ("cut.mp4", "a/03.mp4")):
        data = (root / of).read_bytes()
        (root / name).write_bytes(data[: len(data) // 2])
    (root / "empty.png").write_bytes(b"")
    return root


def some_real_clips(root: Path, stickers: Path) -> Path:
    """Three of each format."""
    for suffix in ("gif", "webp", "png", "mp4", "webm"):
        for clip in sorted(stickers.rglob(f"*.{suffix}"))[:3]:
            shutil.copy(clip, root)
            (root / f"{clip.stem}.txt").write_text(f"{clip.stem} of {suffix}")
    return root


def as_shards(folder: Path, out: Path, max_bytes: int = 40_000) -> Path:
    """The same clips, as `tools/write_shards.py` packs them, in shards small enough that there are several."""
    listing = list_clips(folder)
    with ShardWriter(out, max_bytes) as shards:
        for row, clip in enumerate(listing.table.to_pylist()):
            shards.add(clip["path"], read_place(listing.place(row), LIMITS.max_bytes), clip["caption"], clip["group"])
    assert len(list(out.iterdir())) > 2
    return out


def break_some(index: ClipIndex) -> None:
    """Overwrite the middle of some clips where they lie."""
    clip_ids = {row.path: row.clip_id for row in index.rows}
    for path in BREAK_LATER:
        place = index.place(clip_ids[path])
        length = place.path.stat().st_size if place.length is None else place.length
        with open(place.path, "r+b") as file:
            file.seek(place.offset + length // 2)
            file.write(bytes(20))


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ClipIndex]:
    base = tmp_path_factory.mktemp("same bytes")
    folder = clips_of_every_format(base / "folder")
    roots = {"folder": folder, "shards": as_shards(folder, base / "shards")}
    made = {name: build_index(root, LIMITS, base / f"index of {name}") for name, root in roots.items()}
    for index in made.values():
        break_some(index)
    return made


def batches(index: ClipIndex, workers: int) -> Iterator[tuple[object, ...]]:
    """All that is in the batches of some steps, tensors as bytes, while the curriculum moves."""
    curriculum = Curriculum("difficulty_adaptive", StaticSchedule(START, END, STEPS), PIDController(fast_horizon=1, slow_horizon=2))
    queue = PlanQueue(StepPlanner(3, GLOBAL_BATCH, index.trainable, index.frame_counts, curriculum), delay=2)
    data = StickerDataset(index, 3, LatentShape(4, 2), 20, background=(9, 99, 199), limits=LIMITS, drops=DropRates(0.2, 0.1, 0.1, 0.1))
    loader = PlannedLoader(data, queue, 0, 1, MICRO_BATCH, GLOBAL_BATCH // MICRO_BATCH, workers)
    assert loader.workers == workers
    for step, made in loader.steps(0, STEPS):
        for batch in made:
            tensors = (batch.frames, batch.condition_mask, batch.frame_mask, batch.timestep, batch.noise)
            shown = [(str(tensor.dtype), tuple(tensor.shape), tensor.numpy().tobytes()) for tensor in tensors]
            names = (batch.captions, batch.tasks, batch.levels, batch.sample_numbers, batch.clip_ids, batch.problems)
            yield step, shown, *names
        queue.push(curriculum.observe(queue.state, 1.0 + 0.5 * (step % 3)))


@pytest.fixture(scope="module")
def reference(indexes: dict[str, ClipIndex]) -> list[tuple[object, ...]]:
    return list(batches(indexes["folder"], workers=0))


def test_the_batches_have_what_could_differ(indexes: dict[str, ClipIndex], reference: list[tuple[object, ...]]) -> None:
    """Else it would say little that they are the same."""
    index = indexes["folder"]
    assert index.counts() == {
        "files": 16, "trainable": 12, "static": 0, "broken": 4, "held_out": 0, "duplicates": 0, "without_caption": 1,
    }  # fmt: skip
    used = {clip_id for *_, clip_ids, _ in reference for clip_id in clip_ids}
    assert {index.rows[clip_id].format for clip_id in used} == {"gif", "webp", "png", "mp4"}
    told = [problem for *_, problems in reference for problem in problems]
    assert {problem.path for problem in told} == set(BREAK_LATER) and all("has changed since" in problem.reason for problem in told)
    assert all(problem.content in {index.content(clip_id) for clip_id in index.trainable.tolist()} for problem in told)
    assert len({shapes[0][1] for _, shapes, *_ in reference}) > 1, "several frame counts"


def test_shards_hold_the_same_index(indexes: dict[str, ClipIndex]) -> None:
    folder, shards = indexes["folder"], indexes["shards"]
    assert folder.fingerprint == shards.fingerprint and folder.counts() == shards.counts()
    assert [row.path for row in folder.rows] == [row.path for row in shards.rows]
    assert all(shards.place(row.clip_id).path.suffix == ".tar" for row in shards.rows if row.status == "trainable")
    for clip_id in folder.trainable.tolist():
        assert np.array_equal(folder.frame_features(clip_id), shards.frame_features(clip_id))


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
@pytest.mark.parametrize("source", ["folder", "shards"])
def test_order_and_content_are_identical(
    indexes: dict[str, ClipIndex], reference: list[tuple[object, ...]], source: str, workers: int
) -> None:
    made = list(batches(indexes[source], workers))
    assert len(made) == len(reference) == STEPS * GLOBAL_BATCH // MICRO_BATCH
    for ours, expected in zip(made, reference, strict=True):
        assert ours == expected


def test_real_clips_too(real_data: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    folder = some_real_clips(tmp_path / "folder", real_data / "stickers")
    shards = as_shards(folder, tmp_path / "shards", max_bytes=200_000)
    expected = list(batches(build_index(folder, LIMITS), workers=0))
    index = build_index(shards, LIMITS)
    assert len(index.trainable) == 15 and list(batches(index, workers=2)) == expected
    assert not any(problems for *_, problems in expected)
