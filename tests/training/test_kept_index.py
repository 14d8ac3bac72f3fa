"""The index a run began with: what a restart opens whatever became of the clips, and when a new one takes its place."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rdtf_ds.data.indexing.index import open_index
from rdtf_ds.data.indexing.problem import Problem
from rdtf_ds.data.quarantine import TooManyBadFiles
from rdtf_ds.data.synthetic import write_stickers
from rdtf_ds.errors import UserError
from rdtf_ds.experiment import load_experiment
from rdtf_ds.training.assembly import Run, build_run
from rdtf_ds.training.checkpoint import Saved
from rdtf_ds.training.data_assembly import make_index
from rdtf_ds.training.kept_index import FOLDER
from rdtf_ds.training.run_state import resume, save

CPU = torch.device("cpu")
LOG = SimpleNamespace(flush=lambda: {}, scalar=lambda *arguments: None, alarm=pytest.fail)


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    write_stickers(tmp_path / "clips", 10, 0, 16)
    return tmp_path / "clips"


@pytest.fixture
def start(process_group: None, project_root: Path, tmp_path: Path, clips: Path) -> Callable[..., Run]:
    config = project_root / "ds_configs" / "tiny_cpu.json"

    def build(*settings: str, reindex: bool = False, data: Path = clips) -> Run:
        settings = ("train_batch_size=2", "rdtf.data.workers=0", "rdtf.data.max_bad_fraction=0.3", *settings)
        return build_run(load_experiment(config, settings, data_dir=data, output_dir=tmp_path / "run"), 0, 1, CPU, reindex)

    return build


def saved(run: Run) -> Run:
    assert isinstance(save(run, LOG), Saved)
    return run


def notes(run: Run) -> str:
    resumed = resume(run)
    assert resumed is not None
    return " ".join(resumed.notes)


def add(clips: Path, name: str) -> None:
    """Another clip, of another caption, which metadata names."""
    shutil.copy(clip_files(clips)[1], clips / name)
    with (clips / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": name, "text": f"it is {name}"}) + "\n")


def clip_files(clips: Path) -> list[Path]:
    return sorted(path for path in clips.iterdir() if path.suffix != ".jsonl")


def plans(run: Run) -> Any:
    return [run.queue.plan(step) for step in range(3)]


@pytest.mark.parametrize("shared", [False, True])
def test_a_restart_trains_on_what_the_run_began_with_whatever_became_of_it(start, tmp_path, clips, shared):
    settings = (f"rdtf.data.index_dir={tmp_path / 'shared'}",) if shared else ()
    run = saved(start(*settings))
    expected = (plans(run), run.index.fingerprint, run.index.trainable.tolist(), run.index.frame_features(3).tolist())
    clip_files(clips)[0].unlink()  # metadata names it, which a listing refuses
    again = start(*settings)
    assert (plans(again), again.index.fingerprint, again.index.trainable.tolist(), again.index.frame_features(3).tolist()) == expected
    assert notes(again) == ""
    write_stickers(clips, 10, 0, 16)
    add(clips, "added.gif")
    assert plans(start(*settings)) == expected[0] and len(list((tmp_path / "run" / FOLDER).iterdir())) == 1
    if shared:  # another run replaces the shared index
        other = make_index(start(*settings).experiment.rdtf, tmp_path / "other", CPU)
        assert len(other.rows) == 11
        assert plans(start(*settings)) == expected[0]
    fresh = start(*settings, reindex=True)
    assert len(fresh.index.rows) == 11 and "data fingerprint" in notes(fresh)
    saved(fresh)
    after = start(*settings)
    assert len(after.index.rows) == 11 and notes(after) == "" and not after.reindexed


def test_a_run_without_a_checkpoint_takes_the_clips_as_they_are(start, clips):
    assert len(start().index.rows) == 10
    add(clips, "added.gif")
    assert len(start().index.rows) == 11


def test_changed_keys_and_moved_data_make_a_new_index(start, tmp_path, clips):
    run = saved(start())
    split = start("rdtf.data.validation_fraction=0.4")
    assert len(split.index.held_out) and "data fingerprint" in notes(split)
    moved = shutil.move(clips, tmp_path / "moved")
    with pytest.raises(UserError, match="does not exist"):
        start()
    there = start(data=Path(moved))
    assert there.index.root == Path(moved) and there.index.fingerprint == run.index.fingerprint and not there.reindexed
    assert notes(there) == ""


def test_a_lost_index_is_made_anew_only_of_the_same_clips(start, tmp_path, clips, caplog):
    setting = f"rdtf.data.index_dir={tmp_path / 'shared'}"
    run = saved(start(setting))
    shutil.rmtree(tmp_path / "shared")
    again = start(setting)
    assert plans(again) == plans(run) and "was made anew, with the same clips" in caplog.text and notes(again) == ""
    assert again.index.frame_features(0).tolist() and start(setting).index == again.index
    shutil.rmtree(tmp_path / "run" / FOLDER)
    assert plans(start(setting)) == plans(run)
    shutil.rmtree(tmp_path / "shared")
    add(clips, "added.gif")
    with pytest.raises(UserError, match=r"000001\.bin' is gone.*the clips have changed since.*--reindex") as caught:
        start(setting)
    assert caught.value.everywhere
    assert len(start(setting, reindex=True).index.rows) == 11


def test_equal_clips_in_other_rows_are_not_the_same_index(start, tmp_path, clips):
    run = saved(start())
    shutil.rmtree(tmp_path / "run" / "index")
    (clips / "000.gif").write_bytes(b"GIF89a")  # broken: no clip to train on, but the rows after it move
    with pytest.raises(UserError, match="its rows are numbered otherwise.*--reindex"):
        start()
    assert start(reindex=True).index.fingerprint == run.index.fingerprint


def test_removing_a_damaged_segment_has_its_clips_examined_anew(start, tmp_path):
    run = saved(start())
    (part,) = (tmp_path / "run" / "index").glob("rows-*/000001.bin")
    part.write_bytes(bytes(part.stat().st_size))
    with pytest.raises(UserError, match=r"Remove '.*000001.arrow' and start again"):
        start().index.frame_features(0)
    part.with_suffix(".arrow").unlink()
    assert start().index.frame_features(0).shape == (run.index.frame_counts[0], 192)


def test_a_run_folder_may_be_moved_and_lie_on_a_disk_without_hard_links(start, tmp_path, monkeypatch):
    def refuse(*arguments: Any) -> None:
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(os, "link", refuse)
    index = start().index
    assert len(list(index.folder.iterdir())) == 2 and index.folder.parent == tmp_path / "run" / FOLDER
    expected = index.frame_features(2).tolist()
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    moved = open_index(tmp_path / "elsewhere" / FOLDER / index.folder.name, index.identity)
    assert moved.frame_features(2).tolist() == expected and moved.fingerprint == index.fingerprint


def test_reindexing_forgets_the_bad_files_of_before_and_counts_those_that_are_still_bad_once(start, tmp_path, clips):
    run = start()
    content = run.index.content(0)
    for sample in (1, 2):
        run.merge_problems([Problem(run.index.path(0), "torn", sample, content)], 0)
    run.merge_problems([Problem(run.index.path(1), "torn", 3, run.index.content(1))], 0)
    saved(run)
    again = start()
    resume(again)
    assert again.quarantine.bad == 2 and again.quarantine.barred(99) == {content}
    clip_files(clips)[0].write_bytes(b"GIF89a")
    fresh = start(reindex=True)
    resume(fresh)
    assert fresh.quarantine.bad == 1 and not fresh.quarantine.barred(99) and fresh.quarantine.problems == ()
    saved(fresh)
    after = start("rdtf.data.max_bad_fraction=0.1")
    resume(after)
    assert after.quarantine.bad == 1
    with pytest.raises(TooManyBadFiles):
        after.merge_problems([Problem(after.index.path(1), "torn", 9, after.index.content(1))], 5)


def kept_names(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "run" / FOLDER).iterdir()}


def test_indexes_that_no_checkpoint_names_go_but_for_the_last_two(start, tmp_path, clips):
    first = saved(start())
    made = [first]
    for number in range(3):
        add(clips, f"added{number}.gif")
        made.append(start(reindex=True))
    names = [run.index.folder.name for run in made]
    assert kept_names(tmp_path) == {names[0], *names[2:]}, "the checkpoint's and the last two"
    assert start().index.folder.name == names[0], "what the checkpoint names can still be opened"
    saved(made[-1])
    for path in (tmp_path / "run" / "checkpoints").glob("step*-0001"):
        shutil.rmtree(path)
    add(clips, "more.gif")
    last = start(reindex=True).index
    assert names[3] in kept_names(tmp_path) and last.folder.name in kept_names(tmp_path) and names[2] not in kept_names(tmp_path)
    assert last.frame_features(0).shape[1] == 192


def test_no_index_goes_while_a_checkpoint_cannot_be_read(start, tmp_path, clips):
    saved(start())
    for number in range(4):
        add(clips, f"added{number}.gif")
        start(reindex=True)
    before = kept_names(tmp_path)
    assert len(before) == 3
    add(clips, "more.gif")
    for manifest in (tmp_path / "run" / "checkpoints").rglob("MANIFEST.json"):
        manifest.write_bytes(b"{")
    start(reindex=True)
    assert kept_names(tmp_path) > before


def test_a_split_that_splits_nothing_is_doubted_at_the_start(start, caplog):
    start("rdtf.data.validation_fraction=1e-9")
    assert "rdtf.data.validation_fraction is 1e-09" in caplog.text
    caplog.clear()
    start("rdtf.data.validation_fraction=0.4")
    assert "validation_fraction" not in caplog.text
