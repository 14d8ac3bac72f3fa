"""What an index says of a folder, in which order, what is refused, and what of it is written anew."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rdtf_ds.data.clips.clip import ClipError, DecodeLimits, ExaminedClip, Place, Window
from rdtf_ds.data.clips.decoding import examine_clip
from rdtf_ds.data.indexing import index_building
from rdtf_ds.data.indexing.index_building import build_index
from rdtf_ds.data.indexing.index_table import index_path, write_index
from rdtf_ds.errors import UserError
from tests.data.indexing.building import LIMITS, Decoder, clip, rows, taken


def test_rows_are_sorted_and_say_what_each_file_is(folder: Path) -> None:
    index = build_index(folder, LIMITS)
    assert rows(index, "clip_id", "path", "format", "num_frames", "kept", "status") == [
        (0, "a/UPPER.PNG", "png", 4, 4, "trainable"),
        (1, "a/z.webp", "webp", 9, 5, "trainable"),
        (2, "b.gif", "gif", 3, 3, "trainable"),
        (3, "broken.gif", "", 0, 0, "broken"),
        (4, "two.gif", "gif", 2, 2, "static"),
    ]
    assert (index.rows[2].width, index.rows[2].height, index.rows[2].caption, index.rows[2].durations_ms) == (10, 8, "a cat", (100,) * 3)
    assert index.trainable.tolist() == [0, 1, 2] and index.frame_counts.tolist() == [4, 5, 3]
    [broken] = index.problems
    assert broken.path == "broken.gif" and "truncated" in broken.reason
    counts = index.counts()
    assert [counts[name] for name in ("files", "trainable", "static", "broken", "without_caption")] == [5, 3, 1, 1, 2]
    for row in index.rows:
        if row.status != "broken":
            expected = examine_clip(folder / row.path, LIMITS)
            assert (row.content, row.has_alpha) == (expected.content, expected.info.has_alpha)
            assert np.array_equal(index.frame_features(row.clip_id) * 255, expected.thumbnails)


def test_real_clips_are_all_trained_on(real_data: Path) -> None:
    index = build_index(real_data / "stickers", DecodeLimits())
    counts = index.counts()
    assert (counts["files"], counts["trainable"], counts["without_caption"]) == (96, 96, 0)
    captions = {row["file_name"]: row["text"] for row in map(json.loads, (real_data / "stickers" / "metadata.jsonl").open())}
    assert {row.path: row.caption for row in index.rows} == captions


def test_nothing_to_train_on_because_of_the_machine_says_how_to_try_again(tmp_path: Path, decoder: type[Decoder]) -> None:
    clip(tmp_path / "data" / "x.gif", 3)
    decoder.faults["x.gif"] = ClipError("x.gif", "no memory", transient=True)
    with pytest.raises(UserError, match=r"nothing to train on: 1 clip in.*x\.gif: no memory.*--retry"):
        build_index(tmp_path / "data", LIMITS, tmp_path / "index")
    index = build_index(tmp_path / "data", LIMITS, tmp_path / "index", require_trainable=False)
    assert index.counts()["broken"] == 1 and len(index.trainable) == 0
    assert build_index(tmp_path / "data", LIMITS, tmp_path / "index", retry=True, require_trainable=False).counts()["broken"] == 1
    decoder.faults.clear()
    assert build_index(tmp_path / "data", LIMITS, tmp_path / "index", retry=True).counts()["trainable"] == 1


def test_folders_that_cannot_be_trained_on(folder: Path, tmp_path: Path) -> None:
    def refused(root: Path, **options: Any) -> str:
        with pytest.raises(UserError) as caught:
            build_index(root, LIMITS, **options)
        return str(caught.value)

    assert "does not exist" in refused(tmp_path / "absent") and "--data_dir" in refused(tmp_path / "absent")
    assert "is a file" in refused(folder / "b.gif")
    (tmp_path / "empty").mkdir()
    assert "has no clips" in refused(tmp_path / "empty")
    clip(tmp_path / "stills" / "one.gif", 1)
    (tmp_path / "stills" / "bad.gif").write_bytes(b"GIF89a")
    stills = refused(tmp_path / "stills")
    assert "nothing to train on" in stills and "bad.gif" in stills and "at least 3 frames" in stills and "--retry" not in stills
    (tmp_path / "file").write_text("")
    assert "rdtf.data.index_dir" in refused(folder, folder=tmp_path / "file" / "index")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "gone.gif", "text": "x"}))
    assert "'gone.gif'" in refused(folder)


def test_what_the_listing_refuses_is_broken_and_never_examined(folder: Path, tmp_path: Path, decoder: type[Decoder]) -> None:
    clip(tmp_path / "outside" / "o.gif", 4)
    (folder / "link.gif").symlink_to(tmp_path / "outside" / "o.gif")
    (folder / "linked").symlink_to(tmp_path / "outside")
    os.mkfifo(folder / "a" / "pipe.gif")
    for _ in range(2):  # also when all else is known
        index = build_index(folder, LIMITS, tmp_path / "index")
        assert rows(index, "path", "status")[1:] == [
            ("a/pipe.gif", "broken"), ("a/z.webp", "trainable"), ("b.gif", "trainable"), ("broken.gif", "broken"),
            ("link.gif", "broken"), ("two.gif", "static"),
        ]  # fmt: skip
        assert "link" in index.rows[5].reason and "FIFO" in index.rows[1].reason
    assert taken(decoder) == ["UPPER.PNG", "b.gif", "broken.gif", "two.gif", "z.webp"]


def test_videos_become_several_clips_in_order_of_their_names(tmp_path: Path, decoder: type[Decoder]) -> None:
    """The stand-in cuts everything but a PNG; ``a.gif!`` sorts before ``a.gif#0000`` and after ``a.gif``."""
    root = tmp_path / "data"
    clip(root / "a.gif", 10)
    clip(root / "a.gif!.gif", 4, seed=1)
    clip(root / "copy.gif", 10)
    clip(root / "still.png", 5, seed=2)
    (root / "a.txt").write_text("a road")
    limits = DecodeLimits()
    index = build_index(root, limits, tmp_path / "index", video_clip_s=1.0)
    expected = [
        ("a.gif!.gif#0000", "", "trainable", 4), ("a.gif#0000", "a road", "trainable", 4), ("a.gif#0001", "a road", "trainable", 4),
        ("a.gif#0002", "a road", "static", 2), ("copy.gif#0000", "", "trainable", 4), ("copy.gif#0001", "", "trainable", 4),
        ("copy.gif#0002", "", "static", 2), ("still.png", "", "trainable", 5),
    ]  # fmt: skip
    assert rows(index, "path", "caption", "status", "kept") == expected
    assert [index.window(clip_id) for clip_id in (1, 2, 7)] == [Window(0, 4), Window(4, 4), None]
    assert index.place(2).path == root / "a.gif"
    whole = examine_clip(root / "a.gif", limits).thumbnails
    assert np.array_equal(index.frame_features(2) * 255, whole[4:8])
    groups = [row.group for row in index.rows]
    assert len(set(groups[1:7])) == 1 and len(set(groups)) == 3, "windows of one video, and of its copy, are one group"
    assert len({row.content for row in index.rows[1:4]}) == 3
    assert build_index(root, limits, tmp_path / "index", video_clip_s=1.0) == index and len(taken(decoder)) == 4
    named = build_index(root, limits, tmp_path / "index", video_clip_s=1.0, group_pattern=r"^(\w+\.gif)$")
    assert [row.group for row in named.rows][1:5] == ["a.gif"] * 3 + ["copy.gif"]


def test_manifests_of_one_folder_have_an_index_each_and_share_its_rows(folder: Path, tmp_path: Path, decoder: type[Decoder]) -> None:
    for name, files in {"one": ["b.gif"], "other": ["b.gif", "a/z.webp"]}.items():
        (folder / f"{name}.csv").write_text("file_name,text\n" + "".join(f"{file},{name}\n" for file in files))
    roots = (folder, folder / "one.csv", folder / "other.csv")
    indexes = [build_index(root, LIMITS, tmp_path / "index") for root in roots]
    assert taken(decoder) == ["UPPER.PNG", "b.gif", "broken.gif", "two.gif", "z.webp"] and len({index.identity for index in indexes}) == 3
    assert [len(pickle.loads(pickle.dumps(index)).rows) for index in indexes] == [5, 1, 2]
    assert {index.root for index in indexes} == {folder} and indexes[2].caption(0) == "other"


def test_what_cannot_be_stored_of_one_file_harms_no_other(folder: Path, tmp_path: Path, decoder: type[Decoder]) -> None:
    decoder.faults |= {"two.gif": ClipError("two.gif", "bad name \udcff")}
    known = decoder.examine

    def examine(self: Decoder, place: Place, *more: Any, **options: Any) -> ExaminedClip:
        found = known(self, place, *more, **options)
        return replace(found, info=replace(found.info, durations_ms=(2**31,))) if place.path.name == "b.gif" else found

    decoder.examine = examine  # type: ignore[method-assign]
    for _ in range(2):
        index = build_index(folder, LIMITS, tmp_path / "index")
        assert [row.status for row in index.rows] == ["trainable", "trainable", "broken", "broken", "broken"]
        reasons = {problem.path: problem.reason for problem in index.problems}
        assert "the index cannot hold" in reasons["b.gif"] and "2147483648" in reasons["b.gif"]
        assert reasons["two.gif"] == "bad name \\udcff"
    assert len(taken(decoder)) == 5, "and is examined once"


def test_an_index_that_did_not_change_is_not_written_anew(folder: Path, tmp_path: Path, decoder: type[Decoder]) -> None:
    first = build_index(folder, LIMITS, tmp_path / "index", validation_fraction=0.3)
    path = index_path(first.folder, first.identity)
    before = path.stat()
    assert build_index(folder, LIMITS, tmp_path / "index", validation_fraction=0.3) == first and path.stat() == before
    (folder / "b.txt").write_text("new words")
    assert build_index(folder, LIMITS, tmp_path / "index", validation_fraction=0.3) != first and path.stat().st_ino != before.st_ino


def test_an_index_replaced_by_another_builder_is_not_taken_for_ours(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system without locks."""

    def replaced(*arguments: Any) -> str:
        return write_index(*arguments)[:-1] + "?"

    monkeypatch.setattr(index_building, "write_index", replaced)
    with pytest.raises(UserError, match="made anew by another run"):
        build_index(folder, LIMITS, tmp_path / "index")


def test_a_temporary_index_lasts_as_long_as_its_process(folder: Path, tmp_path: Path, project_root: Path) -> None:
    (tmp_path / "tmp").mkdir()
    code = f"""
import os, pathlib, sys, tempfile
from rdtf_ds.data.clips.clip import DecodeLimits
from rdtf_ds.data.indexing.index_building import build_index
index = build_index({str(folder)!r}, DecodeLimits(), workers=1)
other = index.without({{0: 'bad'}})
folder = index.folder
del index
if os.fork() == 0:
    sys.exit(0)
os.wait()
assert other.frame_features(2).shape == (3, 192) and folder.is_dir()
print(folder)
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(project_root)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parent == tmp_path / "tmp" and not list((tmp_path / "tmp").glob("rdtf-index-*"))
