"""Making the clips of an evaluation: the same whoever makes them, and only what is missing."""

from __future__ import annotations

import dataclasses
import errno
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import rdtf_ds.evaluation.clip_making as clip_making
from rdtf_ds.data.clips.clip import DecodeLimits
from rdtf_ds.data.clips.metadata import read_metadata
from rdtf_ds.data.indexing.index import ClipIndex
from rdtf_ds.data.indexing.index_building import build_index
from rdtf_ds.errors import UserError
from rdtf_ds.evaluation.clip_making import REAL, Making, _hear, make_missing, read_clip, read_clips, write_real
from rdtf_ds.evaluation.protocol import make_tasks
from rdtf_ds.evaluation.test_set import choose_clips
from tests.data.folders import numbered_clips
from tests.small_models import SIDE, make_pipeline, small_dfgn, text_parts

WHITE = (255, 255, 255)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_pipeline(text_parts(), small_dfgn(), steps=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ClipIndex:
    root = tmp_path_factory.mktemp("data")
    numbered_clips(root / "clips", [5, 6, 7, 8, 9])
    for number in range(5):
        (root / "clips" / f"{number}.txt").write_text(f"clip {number}")
    return build_index(root / "clips", DecodeLimits(), root / "index", workers=1)


@pytest.fixture
def making(model: Path, index: ClipIndex, tmp_path: Path) -> Making:
    """Two tasks of five clips of five frames, two at once; the real clips are there."""
    made = Making(
        folder=tmp_path / "eval",
        model=model,
        tasks=make_tasks(["i2v", "prediction"], 5),
        clips=choose_clips(index, "all", 5, 500, seed=0).clips,
        side=SIDE,
        background=WHITE,
        device="cpu",
        dtype="float32",
        threads=1,
        batch=2,
        identity={"model": "a model"},
    )
    write_real(made, index)
    return made


def contents(making: Making) -> dict[str, bytes]:
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in making.folder.rglob("*.png")}


def written(making: Making) -> dict[str, int]:
    return {f"{path.parent.name}/{path.name}": path.stat().st_mtime_ns for path in making.folder.rglob("*.png")}


def test_real_clips_are_as_the_model_would_see_them(making: Making, index: ClipIndex) -> None:
    counts: list[int] = []
    before = written(making)
    write_real(making, index, counts.append)
    assert counts == [1] * 5 and written(making) == before and len(before) == 5
    for clip, frames in zip(making.clips, read_clips(making, REAL), strict=True):
        assert frames.shape == (5, SIDE, SIDE, 3)
        assert frames[:, 0, 0, 0].tolist() == [10 * frame for frame in clip.shown]
        note = read_metadata(making.path(REAL, clip))
        assert note is not None and (note["real"], note["caption"]) == (clip.path, clip.caption)


def test_what_cannot_be_written_is_told(making: Making, index: ClipIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other").mkdir()
    other = dataclasses.replace(making, folder=tmp_path / "other")
    (other.folder / REAL).write_text("a file")
    with pytest.raises(UserError, match=r"other/real/0\.png' cannot be written: .*start again: what is made is kept"):
        write_real(other, index)
    (other.folder / REAL).unlink()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(clip_making, "write_clip", full)
    with pytest.raises(UserError, match=r"cannot be written: No space left on device\. See to the room"):
        write_real(other, index)


def test_clips_are_made_of_the_given_frames_and_the_caption(making: Making) -> None:
    assert making.made() == 0 and len(making.batches()) == 6
    counts: list[int] = []
    make_missing(making, on_clips=counts.append)
    assert counts == [2, 2, 1] * 2 and making.made() == 10 and making.unfinished() == []
    for task in making.tasks:
        for clip in making.clips:
            made, real = read_clip(making, task.name, clip), read_clip(making, REAL, clip)
            given = list(task.visible)
            hidden = [frame for frame in range(5) if frame not in given]
            assert np.array_equal(made[given], real[given]), "given frames stand as given"
            assert all(not np.array_equal(made[frame], real[frame]) for frame in hidden)
            note = read_metadata(making.path(task.name, clip))
            assert note is not None and (note["seed"], note["prompt"], note["model"]) == (clip.seed, clip.caption, "a model")
            assert sorted(note["visible"]) == [str(frame) for frame in given]


def test_only_what_is_missing_is_made_and_comes_out_the_same(making: Making) -> None:
    make_missing(making)
    whole, before = contents(making), written(making)
    first, last = making.clips[0], making.clips[-1]
    making.path("i2v", first).unlink()
    making.path("prediction", last).unlink()
    assert making.made() == 10 - 2 and len(making.unfinished()) == 2
    counts: list[int] = []
    make_missing(making, on_clips=counts.append)
    assert counts == [1, 1] and making.made() == 10 and contents(making) == whole
    changed = {name for name, moment in written(making).items() if before[name] != moment}
    assert changed == {f"i2v/{first.name}.png", f"prediction/{last.name}.png"}


def test_nothing_is_loaded_when_nothing_is_missing(making: Making, tmp_path: Path) -> None:
    make_missing(making)
    make_missing(dataclasses.replace(making, model=tmp_path / "gone"), on_clips=lambda count: pytest.fail("a clip was made"))


def test_settings_are_those_asked_for(making: Making) -> None:
    other = dataclasses.replace(making, sampling={"steps": 1, "eta": 0.0, "text_scale": 2.0}, keep_given=False)
    make_missing(other)
    clip = making.clips[0]
    note = read_metadata(making.path("i2v", clip))
    assert note is not None and (note["steps"], note["eta"], note["text_scale"], note["keep_given"]) == (1, 0.0, 2.0, False)
    assert not np.array_equal(read_clip(making, "i2v", clip)[0], read_clip(making, REAL, clip)[0]), "the model redrew it"


def test_several_processes_make_the_same(making: Making, index: ClipIndex, tmp_path: Path) -> None:
    make_missing(making)
    other = dataclasses.replace(making, folder=tmp_path / "other")
    write_real(other, index)
    counts: list[int] = []
    make_missing(other, processes=2, on_clips=counts.append)
    assert sorted(counts) == [1, 1, 2, 2, 2, 2] and contents(other) == contents(making)
    assert multiprocessing.active_children() == []


def test_what_a_child_cannot_do_is_told_by_the_parent(making: Making, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model_index.json"):
        make_missing(dataclasses.replace(making, model=tmp_path), processes=2)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(("end", "how"), [((os._exit, (3,)), "exit code 3"), ((signal.raise_signal, (9,)), "signal 9")])
def test_a_child_that_dies_is_told(end, how: str) -> None:
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    child = context.Process(target=end[0], args=end[1])
    child.start()
    writer.close()
    with pytest.raises(UserError, match=rf"a process that made clips ended \({how}\).*start again to go on"):
        _hear(reader, {reader: child}, lambda count: None)


def test_a_clip_that_cannot_be_read_is_named(making: Making) -> None:
    path = making.path(REAL, making.clips[0])
    path.write_bytes(path.read_bytes()[:90])
    with pytest.raises(UserError, match=r"real/0+\.png' cannot be read: .*Remove it and start again"):
        make_missing(making)


def test_another_number_of_threads_is_set(making: Making) -> None:
    before = torch.get_num_threads()
    try:
        make_missing(dataclasses.replace(making, threads=2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
