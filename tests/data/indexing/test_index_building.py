"""Building an index: what is examined and what is taken over, in which order it stands, and what is left when a build is killed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rdtf_ds.data.clips.clip import ClipError, ClipInfo, DecodeLimits, ExaminedClip, Place, Window
from rdtf_ds.data.clips.decoding import examine_clip
from rdtf_ds.data.clips.writing import write_clip
from rdtf_ds.data.indexing import examining, index_building
from rdtf_ds.data.indexing.index import ClipIndex
from rdtf_ds.data.indexing.index_building import build_index
from rdtf_ds.data.indexing.index_rows import lay_over, take_over, to_examine
from rdtf_ds.data.indexing.index_segments import EXAMINED, IndexSettings, read_segments
from rdtf_ds.data.indexing.index_table import index_path, write_index
from rdtf_ds.errors import UserError
from rdtf_ds.training.run_lock import RunLock
from tests.faults.fork_server import ROOT

LIMITS = DecodeLimits(max_frames=5)


def clip(path: Path, num_frames: int, seed: int = 0) -> None:
    write_clip(np.random.default_rng(seed).integers(0, 255, (num_frames, 8, 10, 3), dtype=np.uint8), path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three clips to train on, one of two frames, one broken, and what is no clip."""
    root = tmp_path / "data"
    clip(root / "b.gif", 3)
    clip(root / "a" / "z.webp", 9)
    clip(root / "a" / "UPPER.PNG", 4)
    clip(root / "two.gif", 2)
    clip(root / ".hidden.gif", 4)
    (root / "broken.gif").write_bytes((root / "b.gif").read_bytes()[:60])
    (root / "notes.md").write_text("no clip")
    (root / "b.txt").write_text("a cat")
    return root


class Decoder:
    """Examines in this process and keeps a list of it; some clips fail as the test says."""

    examined: list[str] = []
    faults: dict[str, ClipError | Exception] = {}
    sizes: list[int] = []
    closed: list[bool] = []

    def __init__(self, size: int) -> None:
        self.sizes.append(size)

    def examine(self, place: Place, limits: DecodeLimits, background: Any, describe_size: int | None = None) -> ExaminedClip:
        self.examined.append(place.path.name)
        if place.path.name in self.faults:
            raise self.faults[place.path.name]
        return examine_clip(place, limits, background, describe_size=describe_size)

    def examine_windows(
        self, place: Place, limits: DecodeLimits, background: Any, seconds: float, describe_size: int | None = None
    ) -> Iterator[ExaminedClip]:
        """Windows of four frames, whatever is asked for; of a PNG one."""
        whole = self.examine(place, limits, background, describe_size)
        if whole.info.format == "png":
            yield whole
            return
        for first in range(0, whole.info.num_frames, 4):
            count = min(4, whole.info.num_frames - first)
            info = ClipInfo("mp4", count, 10, 8, False, (100,) * count)
            yield ExaminedClip(f"{whole.content[:60]}{first:04d}", info, whole.thumbnails[first : first + count], Window(first, count))

    def close(self) -> None:
        self.closed.append(True)


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> type[Decoder]:
    kind = type("Decoder", (Decoder,), {"examined": [], "faults": {}, "sizes": [], "closed": []})
    monkeypatch.setattr(examining, "DecoderPool", kind)
    return kind


def taken(decoder: type[Decoder]) -> list[str]:
    """What was examined since the last call."""
    names = sorted(decoder.examined)
    decoder.examined.clear()
    return names


def rows(index: ClipIndex, *names: str) -> list[tuple[Any, ...]]:
    return [tuple(getattr(row, name) for name in names) for row in index.rows]


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


def test_only_what_is_new_is_examined(folder: Path, tmp_path: Path, decoder: type[Decoder]) -> None:
    kept = tmp_path / "index"
    first = build_index(folder, LIMITS, kept, workers=1)
    assert taken(decoder) == ["UPPER.PNG", "b.gif", "broken.gif", "two.gif", "z.webp"]
    assert build_index(folder, LIMITS, kept) == first and taken(decoder) == [] and decoder.sizes == [1] == [len(decoder.closed)]
    clip(folder / "b.gif", 4, seed=1)
    clip(folder / "c.gif", 3, seed=2)
    (folder / "two.gif").unlink()
    (folder / "b.txt").write_text("new words")
    second = build_index(folder, LIMITS, kept)
    assert taken(decoder) == ["b.gif", "c.gif"]
    assert rows(second, "path", "caption", "num_frames") == [
        ("a/UPPER.PNG", "", 4), ("a/z.webp", "", 9), ("b.gif", "new words", 4), ("broken.gif", "", 0), ("c.gif", "", 3),
    ]  # fmt: skip
    assert second.fingerprint != first.fingerprint
    assert rows(first, "path", "num_frames")[2] == ("b.gif", 3), "whoever opened the earlier one goes on reading it"
    os.utime(folder / "c.gif", ns=(1, 1))
    assert build_index(folder, LIMITS, kept) == second and taken(decoder) == ["c.gif"]


def test_what_needs_no_decoding_examines_nothing(folder: Path, tmp_path: Path, decoder: type[Decoder]) -> None:
    kept = tmp_path / "index"
    (folder / "copy.gif").write_bytes((folder / "b.gif").read_bytes())
    (folder / "copy.txt").write_text("a cat")
    build_index(folder, LIMITS, kept)
    assert len(taken(decoder)) == 6
    plain = build_index(folder, LIMITS, kept)
    assert plain.rows[4].duplicate_of == 2 and plain.trainable.tolist() == [0, 1, 2] and plain.duplicates.tolist() == [4]
    assert build_index(folder, LIMITS, kept, drop_duplicates=False).trainable.tolist() == [0, 1, 2, 4]
    grouped = build_index(folder, LIMITS, kept, group_pattern="^a/", validation_fraction=0.5)
    content = plain.rows[2].content
    assert [row.group for row in grouped.rows] == ["a/", "a/", content, "", content, plain.rows[5].content]
    usable = [row for row in grouped.rows if row.status == "trainable"]
    sides = {row.group: row.held_out for row in usable}
    assert sorted(sides.values()) == [False, True] and all(sides[row.group] == row.held_out for row in usable)
    assert not any(row.held_out for row in grouped.rows if row.status != "trainable")
    assert sorted([*grouped.trainable.tolist(), *grouped.held_out.tolist()]) == [0, 1, 2]
    assert taken(decoder) == []
    assert len({index.fingerprint for index in (plain, grouped)}) == 2


@pytest.mark.parametrize("change", ["limits", "background", "video_clip_s", "describer"])
def test_other_ways_to_examine_have_rows_of_their_own(folder: Path, tmp_path: Path, decoder: type[Decoder], change: str) -> None:
    kept = tmp_path / "index"
    other: dict[str, Any] = {"limits": LIMITS, "background": (0, 0, 0), "video_clip_s": 2.0, "describer": Describer()}
    before = build_index(folder, LIMITS, kept)
    taken(decoder)
    options = {change: other[change]}
    limits = DecodeLimits(max_frames=3) if options.pop("limits", None) else LIMITS
    build_index(folder, limits, kept, **options)
    assert len(taken(decoder)) == 5
    assert build_index(folder, LIMITS, kept) == before and build_index(folder, limits, kept, **options) and taken(decoder) == []


def test_broken_clips_stay_broken_until_a_retry(folder: Path, tmp_path: Path, decoder: type[Decoder]) -> None:
    kept = tmp_path / "index"
    decoder.faults |= {"b.gif": ClipError("b.gif", "took too long", transient=True), "z.webp": ClipError("z.webp", "nonsense")}
    first = build_index(folder, LIMITS, kept)
    assert {problem.path: problem.reason for problem in first.problems}.items() >= {("b.gif", "took too long"), ("a/z.webp", "nonsense")}
    taken(decoder)
    decoder.faults.clear()
    assert build_index(folder, LIMITS, kept) == first and taken(decoder) == []
    again = build_index(folder, LIMITS, kept, retry=True)
    assert taken(decoder) == ["b.gif"] and rows(again, "path", "status")[1:3] == [("a/z.webp", "broken"), ("b.gif", "trainable")]
    assert build_index(folder, LIMITS, kept, retry=True) == again == build_index(folder, LIMITS, kept) and taken(decoder) == []


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


class Describer:
    """Mean colour of each frame, and where it was made."""

    identity, size, dim = "mean", 4, 3

    def __init__(self) -> None:
        self.at_once, self.most = 0, 0

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        assert frames.shape[1:] == (4, 4, 3) and frames.dtype == np.uint8
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        time.sleep(0.01)
        self.at_once -= 1
        return frames.mean((1, 2)).astype(np.float16)


def test_features_of_a_model_are_made_in_this_process_one_clip_at_a_time(folder: Path, tmp_path: Path) -> None:
    describer = Describer()
    index = build_index(folder, LIMITS, tmp_path / "index", describer=describer, workers=2)
    assert describer.most == 1 and index.settings.features == "mean"
    expected = describer(examine_clip(folder / "a" / "z.webp", LIMITS, describe_size=4).frames)
    assert np.array_equal(index.frame_features(1), expected.astype(np.float32)) and index.frame_features(1).shape == (5, 3)


def test_progress_is_told_and_the_bar_comes_late(
    folder: Path, decoder: type[Decoder], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int]] = []
    build_index(folder, LIMITS, on_progress=lambda *numbers: told.append(numbers))
    assert told == [(number, 5) for number in range(1, 6)]
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(examining, "BAR_AFTER_S", 0.0)
    build_index(folder, LIMITS)
    shown = capsys.readouterr()
    assert "5/5" in shown.err and shown.out == ""


def test_each_window_of_a_video_is_a_sign_of_life(tmp_path: Path, decoder: type[Decoder]) -> None:
    clip(tmp_path / "data" / "a.gif", 10)
    clip(tmp_path / "data" / "b.png", 5)
    told: list[tuple[int, int]] = []
    build_index(tmp_path / "data", DecodeLimits(), video_clip_s=1.0, on_progress=lambda *numbers: told.append(numbers), workers=1)
    assert len(told) == 3 + 2 and told[:3] == [(0, 2)] * 3 and told[-1] == (2, 2), "three windows, two files"


def test_who_waits_for_another_builder_is_alive(
    folder: Path, tmp_path: Path, decoder: type[Decoder], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(index_building, "_RETRY_S", 0.01)
    (tmp_path / "index").mkdir()
    told: list[tuple[int, int]] = []
    with open(tmp_path / "index" / ".index.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)

        def progress(*numbers: int) -> None:
            told.append(numbers)
            if len(told) == 3:
                fcntl.flock(other, fcntl.LOCK_UN)

        give_up = threading.Timer(20, fcntl.flock, (other, fcntl.LOCK_UN))
        give_up.start()
        build_index(folder, LIMITS, tmp_path / "index", on_progress=progress)
        give_up.cancel()
    assert told == [(0, 0)] * 3 + [(number, 5) for number in range(1, 6)]
    assert caplog.text.count("another process builds the index") == 1


def test_a_run_that_keeps_its_index_in_its_own_folder_keeps_its_lock(folder: Path, tmp_path: Path, decoder: type[Decoder]) -> None:
    """Closing any descriptor of a file drops the record locks that this process has on it."""
    run = tmp_path / "run"
    code = f"import fcntl; fcntl.lockf(open({str(run / '.lock')!r}, 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    with RunLock(run):
        build_index(folder, LIMITS, run)
        refused = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert "BlockingIOError" in refused.stderr
    assert json.loads((run / ".lock").read_text())["pid"] == os.getpid(), "nor does it write into it"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


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


def test_manifests_of_one_folder_have_an_index_each_and_share_its_rows(folder: Path, tmp_path: Path, decoder: type[Decoder]) -> None:
    for name, files in {"one": ["b.gif"], "other": ["b.gif", "a/z.webp"]}.items():
        (folder / f"{name}.csv").write_text("file_name,text\n" + "".join(f"{file},{name}\n" for file in files))
    roots = (folder, folder / "one.csv", folder / "other.csv")
    indexes = [build_index(root, LIMITS, tmp_path / "index") for root in roots]
    assert taken(decoder) == ["UPPER.PNG", "b.gif", "broken.gif", "two.gif", "z.webp"] and len({index.identity for index in indexes}) == 3
    assert [len(pickle.loads(pickle.dumps(index)).rows) for index in indexes] == [5, 1, 2]
    assert {index.root for index in indexes} == {folder} and indexes[2].caption(0) == "other"


def test_equal_names_and_times_in_another_folder_are_other_clips(tmp_path: Path, decoder: type[Decoder]) -> None:
    for seed, name in enumerate(("one", "other")):
        write_clip(np.full((3, 8, 8, 3), 50 * seed, np.uint8), tmp_path / name / "x.gif")
        os.utime(tmp_path / name / "x.gif", ns=(1, 1))
    (tmp_path / "link").symlink_to(tmp_path / "one")
    one, other, again = (build_index(tmp_path / name, LIMITS, tmp_path / "index") for name in ("one", "other", "link"))
    assert taken(decoder) == ["x.gif"] * 2 and one.content(0) != other.content(0)
    assert again == one and again.identity == one.identity and again.root == tmp_path / "one"


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


def many_clips(root: Path, number: int) -> Path:
    for seed in range(number):
        clip(root / f"{seed:02d}.gif", 3 + seed % 3, seed)
    return root


_BUILDER = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # started in the background, a shell has it ignored
from rdtf_ds.data.indexing import examining
from rdtf_ds.data.clips.clip import DecodeLimits
from rdtf_ds.data.indexing.index_building import build_index

root, folder, log, slow, last = sys.argv[1:]
class Decoder(examining.DecoderPool):
    def examine(self, place, *more, **options):
        clip = super().examine(place, *more, **options)
        with open(log, "a") as file:
            file.write(place.path.name + "\\n")
        if place.path.name >= last:
            time.sleep(float(slow))
        return clip
examining.DecoderPool = Decoder
examining.SEGMENT_CLIPS = 4
try:
    print(build_index(root, DecodeLimits(), folder, workers=2).fingerprint)
except KeyboardInterrupt:
    sys.exit(130)
"""


def builder(project_root: Path, root: Path, folder: Path, log: Path, slow: float = 0, last: str = "") -> subprocess.Popen[str]:
    """A process that builds, noting each clip examined, and commits every four; from clip ``last`` on it takes its time."""
    environment = {**os.environ, "PYTHONPATH": str(project_root)}
    words = [sys.executable, "-c", _BUILDER, str(root), str(folder), str(log), str(slow), last]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def noted(log: Path) -> list[str]:
    return log.read_text().split() if log.exists() else []


def wait_until(true: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def committed(root: Path, folder: Path) -> list[str]:
    return read_segments(folder, IndexSettings(root, DecodeLimits()))["file"].to_pylist()


def test_a_killed_build_goes_on_where_it_was(tmp_path: Path, project_root: Path) -> None:
    root, folder = many_clips(tmp_path / "data", 24), tmp_path / "index"
    killed = builder(project_root, root, folder, tmp_path / "first", slow=60, last="14.gif")
    wait_until(lambda: len(noted(tmp_path / "first")) >= 16 and len(committed(root, folder)) >= 12)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    kept, before = committed(root, folder), noted(tmp_path / "first")
    assert len(kept) == 12 and set(kept) < set(before) and len(before) == 16, "but for those of the segment that was being filled"
    assert not list(folder.glob("*.arrow")), "an index of some of the clips is none"
    second = builder(project_root, root, folder, tmp_path / "second")
    out, err = second.communicate(timeout=120)
    assert second.returncode == 0, err
    assert sorted(kept + noted(tmp_path / "second")) == [f"{number:02d}.gif" for number in range(24)], "each clip once"
    assert build_index(root, DecodeLimits(), workers=1).fingerprint == out.strip()


def test_an_interrupted_build_loses_nothing_that_was_done(tmp_path: Path, project_root: Path) -> None:
    root, folder = many_clips(tmp_path / "data", 12), tmp_path / "index"
    interrupted = builder(project_root, root, folder, tmp_path / "first", slow=3, last="06.gif")
    wait_until(lambda: len(noted(tmp_path / "first")) >= 8)
    interrupted.send_signal(signal.SIGINT)
    _, err = interrupted.communicate(timeout=60)
    assert interrupted.returncode == 130, err
    assert sorted(committed(root, folder)) == [f"{number:02d}.gif" for number in range(6)] and "Traceback" not in err
    assert not list(folder.rglob("*.tmp"))


def test_what_was_examined_before_a_failure_is_kept(tmp_path: Path, decoder: type[Decoder], monkeypatch: pytest.MonkeyPatch) -> None:
    root, folder = many_clips(tmp_path / "data", 6), tmp_path / "index"
    decoder.faults["04.gif"] = RuntimeError("a mistake of ours, and no clip's")
    with pytest.raises(RuntimeError, match="no clip's"):
        build_index(root, DecodeLimits(), folder, workers=1)
    assert decoder.closed == [True] and threading.active_count() == len([t for t in threading.enumerate() if "examine" not in t.name])
    done = committed(root, folder)
    assert set(done) <= {f"{number:02d}.gif" for number in (0, 1, 2, 3, 5)} and len(done) >= 3
    decoder.faults.clear()
    taken(decoder)
    build_index(root, DecodeLimits(), folder)
    assert taken(decoder) == sorted({f"{number:02d}.gif" for number in range(6)} - set(done))


def test_a_disk_that_takes_nothing_or_gives_nothing_back(tmp_path: Path, decoder: type[Decoder], monkeypatch: pytest.MonkeyPatch) -> None:
    root = many_clips(tmp_path / "data", 3)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(examining, "write_segment", full)
    with pytest.raises(UserError, match=r"index .* cannot be written \(No space left on device\).*rdtf.data.index_dir"):
        build_index(root, DecodeLimits(), tmp_path / "index")
    monkeypatch.setattr(examining, "write_segment", lambda *_: 1)
    with pytest.raises(UserError, match="3 clips that were just examined cannot be read back"):
        build_index(root, DecodeLimits(), tmp_path / "index")


def test_segments_are_committed_as_they_fill(tmp_path: Path, decoder: type[Decoder], monkeypatch: pytest.MonkeyPatch) -> None:
    root = many_clips(tmp_path / "data", 10)

    def segments(folder: Path) -> list[int]:
        build_index(root, DecodeLimits(), folder, workers=1)
        return sorted(Counter(read_segments(folder, IndexSettings(root, DecodeLimits()))["segment"].to_pylist()).values())

    assert segments(tmp_path / "one") == [10]
    monkeypatch.setattr(examining, "SEGMENT_CLIPS", 4)
    assert segments(tmp_path / "filled") == [2, 4, 4]
    monkeypatch.setattr(examining, "SEGMENT_S", -1.0)
    assert segments(tmp_path / "late") == [1] * 10


def test_builders_take_turns_and_the_second_finds_it_done(tmp_path: Path, project_root: Path) -> None:
    root, folder = many_clips(tmp_path / "data", 8), tmp_path / "index"
    first = builder(project_root, root, folder, tmp_path / "first", slow=0.3)
    wait_until(lambda: len(noted(tmp_path / "first")) >= 1)
    second = builder(project_root, root, folder, tmp_path / "second")
    answers = [process.communicate(timeout=120) for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0], answers
    assert len(noted(tmp_path / "first")) == 8 and noted(tmp_path / "second") == [] and answers[0][0] == answers[1][0]
    assert "another process builds the index" in answers[1][1]


def test_the_index_does_not_depend_on_who_was_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers, and the order in which clips are done."""
    root = many_clips(tmp_path / "data", 12)
    monkeypatch.setattr(examining, "SEGMENT_CLIPS", 5)
    indexes = []
    for number, workers in enumerate((1, 2, 4)):

        class Slow(Decoder):
            def examine(self, place: Place, *more: Any, **options: Any) -> ExaminedClip:
                time.sleep(0.002 * ((int(place.path.stem) * 7 + number) % 5))  # noqa: B023  called in this round alone
                return super().examine(place, *more, **options)

        monkeypatch.setattr(examining, "DecoderPool", Slow)
        indexes.append(build_index(root, DecodeLimits(), tmp_path / str(number), workers=workers))
    assert indexes[0] == indexes[1] == indexes[2] and len({index.fingerprint for index in indexes}) == 1
    for clip_id in range(12):
        features = [index.frame_features(clip_id) for index in indexes]
        assert np.array_equal(features[0], features[1]) and np.array_equal(features[0], features[2])


def test_clips_that_harm_their_decoder_are_broken_for_that_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real pool, whose children do what the name of a clip says."""
    command = (sys.executable, str(ROOT / "tests" / "faults" / "hostile_decoder.py"))
    pool = examining.DecoderPool
    monkeypatch.setattr(examining, "DecoderPool", lambda size: pool(size, command=command))
    root = tmp_path / "data"
    for name in ("fine", "sleeps", "segfaults", "exits", "allocates_10_gb", "killed", "well"):
        clip(root / f"{name}.mp4", 4, len(name))
    index = build_index(root, DecodeLimits(timeout_s=2.0), tmp_path / "index", workers=2)
    assert [row.path for row in index.rows if row.status == "trainable"] == ["fine.mp4", "well.mp4"]
    reasons = {problem.path: problem.reason for problem in index.problems}
    assert "rdtf.data.decode_timeout_s" in reasons["sleeps.mp4"] and "SIGSEGV" in reasons["segfaults.mp4"]
    assert "exit code 3" in reasons["exits.mp4"] and "MiB" in reasons["allocates_10_gb.mp4"]
    transient = index.columns("path", "transient").to_pylist()
    assert {row["path"] for row in transient if row["transient"]} == {"sleeps.mp4", "killed.mp4"}


def known_rows(number: int) -> tuple[pa.Table, pa.Table]:
    """A listing of a folder and the rows of all its clips, as if examined."""
    at = np.arange(number)
    paths = pa.array([f"folder/{n:07d}.webp" for n in at], pa.large_string())
    hashes = pa.array([f"{n // 2:064x}" for n in at], pa.large_string())
    key = {"offset": np.zeros(number, np.int64), "length": np.full(number, -1), "size": at, "mtime_ns": at + 10**18}
    text = pa.array([""] * number, pa.large_string())
    nothing = pa.nulls(number, pa.string())
    beside = {"caption": text, "group": nothing, "fault": nothing}
    listing = pa.table({"path": paths.cast(pa.string()), "file": nothing.dictionary_encode(), **key, **beside})
    said = {
        "status": pa.array(["trainable"] * number, pa.large_string()), "reason": text, "transient": np.zeros(number, bool),
        "content": hashes, "file_content": hashes, "format": text, "has_alpha": np.zeros(number, bool),
        "durations_ms": pa.array(np.full((number, 24), 40).tolist(), pa.large_list(pa.int32())),
    }  # fmt: skip
    numbers = {name: np.full(number, value) for name, value in {"window_first": -1, "window_count": -1, "num_frames": 24}.items()}
    rest = {name: np.zeros(number, np.int64) for name in ("width", "height", "kept", "features_start", "features_crc")}
    columns = {"file": paths, **key, **said, **numbers, **rest}
    schema = EXAMINED.append(pa.field("segment", pa.int32()))
    columns["segment"] = np.full(number, 1)
    return listing, pa.table({name: pa.array(columns[name]).cast(schema.field(name).type) for name in schema.names}, schema=schema)


def test_a_hundred_thousand_known_clips_are_taken_over_in_a_moment() -> None:
    number = 100_000
    listing, examined = known_rows(number)
    shuffled = examined.take(np.random.default_rng(0).permutation(number))
    started = time.perf_counter()
    clips, found = take_over(listing, shuffled)
    missing = to_examine(listing, clips)
    table = lay_over(listing, clips, shuffled.take(found), IndexSettings(Path("x"), LIMITS, validation_fraction=0.1))
    assert time.perf_counter() - started < 3.0
    assert len(missing) == 0 and table["path"].to_pylist() == listing["path"].to_pylist() == table["file"].to_pylist()
    assert table["size"].to_pylist() == list(range(number))
    assert table["duplicate_of"].to_pylist()[:4] == [-1, 0, -1, 2]


def test_the_latest_row_of_a_clip_counts_and_a_changed_one_does_not() -> None:
    listing, examined = known_rows(6)
    later = examined.slice(1, 2)
    later = later.set_column(later.schema.get_field_index("segment"), "segment", pa.array([3, 3], pa.int32()))
    rows = pa.concat_tables([later, examined])
    clips, found = take_over(listing, rows)
    assert clips.tolist() == list(range(6)) and rows["segment"].take(found).to_pylist() == [1, 3, 3, 1, 1, 1]
    for number, name in enumerate(("file", "offset", "length", "size", "mtime_ns")):
        values = rows[name].to_pylist()
        values[2 + number] = f"{values[2 + number]}x" if name == "file" else values[2 + number] + 1
        changed = rows.set_column(rows.schema.get_field_index(name), name, pa.array(values, rows.schema.field(name).type))
        clips, _ = take_over(listing, changed)
        expected = [clip for clip in range(6) if clip != number or number in (1, 2)]
        assert clips.tolist() == expected, name
        assert to_examine(listing, clips).tolist() == sorted(set(range(6)) - set(expected))
