"""The view of an index: lazy rows, what a sample asks for, clips that break later, pickling, equality."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rdtf_ds.data.clips.clip import Place, Window
from rdtf_ds.data.indexing.index import ClipRow, open_index
from rdtf_ds.data.indexing.index_segments import rows_folder
from rdtf_ds.data.indexing.problem import Problem
from rdtf_ds.errors import UserError
from tests.data.made_index import KINDS, broken, found, make_index, settings_of

CLIPS: list[dict[str, Any]] = [
    *KINDS,
    {**found("00.tar", 5, offset=512, length=99), "path": "g.gif", "caption": "in a shard"},
    {**found("h.mp4", 5, window_first=8, window_count=5, format="mp4", file_content="ab"), "path": "h.mp4#0001"},
]


def test_rows_are_made_when_asked_for(tmp_path: Path) -> None:
    rows = make_index(tmp_path, CLIPS).rows
    assert len(rows) == 8 and [row.clip_id for row in rows] == list(range(8))
    assert rows[0] == ClipRow(
        clip_id=0, path="a.gif", caption="a cat", format="gif", num_frames=4, width=10, height=8, status="trainable", reason="",
        content=CLIPS[0]["content"], kept=4, durations_ms=(40, 41, 42, 43), has_alpha=False, group="", held_out=False,
        duplicate_of=None, first_frame=None,
    )  # fmt: skip
    assert (rows[1].num_frames, rows[1].kept, rows[1].group) == (9, 5, "x")
    assert (rows[2].status, rows[2].reason, rows[2].kept) == ("broken", "truncated", 0)
    assert rows[3].status == "static" and rows[4].held_out and rows[5].duplicate_of == 0
    assert (rows[-1].path, rows[-1].first_frame, rows[7]) == ("h.mp4#0001", 8, rows[np.int64(7)])
    assert rows[2:4] == [rows[2], rows[3]] == list(rows)[2:4] and rows[5:1:-2] == [rows[5], rows[3]]
    with pytest.raises(IndexError):
        rows[8]


def test_iterating_crosses_batches(tmp_path: Path) -> None:
    clips = [found(f"{number:05d}.gif", 3) for number in range(2500)]
    rows = make_index(tmp_path, clips).rows
    assert [(row.clip_id, row.path) for row in rows] == [(number, f"{number:05d}.gif") for number in range(2500)]


def test_which_clips_are_for_what(tmp_path: Path) -> None:
    index = make_index(tmp_path, CLIPS)
    assert index.trainable.dtype == index.frame_counts.dtype == index.held_out.dtype == np.int64
    assert index.trainable.tolist() == [0, 1, 6, 7] and index.frame_counts.tolist() == [4, 5, 5, 5]
    assert index.held_out.tolist() == [4] and index.duplicates.tolist() == [5]
    assert list(index.problems) == [Problem("c.gif", "truncated", content=CLIPS[2]["content"])]
    assert index.counts() == {
        "files": 8, "trainable": 4, "static": 1, "broken": 1, "held_out": 1, "duplicates": 1, "without_caption": 2,
    }  # fmt: skip
    assert index.summary() == (
        f"8 clips in '{tmp_path}/data': 4 to train on (2 gif, 1 mp4, 1 webp, 4 to 5 frames, median 5), 1 held out, 1 duplicate, "
        "1 static, 1 broken, 2 without a caption"
    )
    assert "held out" not in make_index(tmp_path, CLIPS[:4]).summary() and "duplicates" not in make_index(tmp_path, CLIPS[:4]).summary()


def test_what_a_sample_asks_for(tmp_path: Path) -> None:
    index = make_index(tmp_path, CLIPS)
    assert index.root == tmp_path / "data"
    assert index.place(0) == Place(tmp_path / "data" / "a.gif") and index.place(6) == Place(tmp_path / "data" / "00.tar", 512, 99)
    assert index.window(0) is None and index.window(7) == Window(8, 5)
    assert (index.caption(0), index.caption(1), index.path(6)) == ("a cat", "", "g.gif")
    assert index.content(7) == CLIPS[7]["content"]
    for clip_id, kept in ((0, 4), (1, 5), (6, 5)):
        features = index.frame_features(np.int64(clip_id))
        assert features.dtype == np.float32 and features.shape == (kept, 192)
        assert np.array_equal(features[:, 7], (10 * clip_id + np.arange(kept)).astype(np.float32) / 255)
    assert index.frame_features(2).shape == (0, 192)


def test_damaged_features_name_the_clip_and_the_way_out(tmp_path: Path) -> None:
    index = make_index(tmp_path, CLIPS)
    path = rows_folder(tmp_path, index.settings) / "000001.bin"
    data = bytearray(path.read_bytes())
    data[192 * 4 + 5] ^= 1  # in the second clip's first frame
    path.write_bytes(data)
    assert index.frame_features(0).shape == (4, 192)
    with pytest.raises(UserError, match=r"clip 'b.webp' are damaged.*000001.bin.*Remove '.*000001.arrow' and start again"):
        index.frame_features(1)
    path.unlink()
    with pytest.raises(UserError, match="clip 'a.gif' are damaged"):
        index.frame_features(0)


def test_clips_that_break_later(tmp_path: Path) -> None:
    index = make_index(tmp_path, CLIPS)
    left = index.without({1: "gone bad"})
    assert left.trainable.tolist() == [0, 6, 7] and left.frame_counts.tolist() == [4, 5, 5]
    assert (left.rows[1].status, left.rows[1].reason) == ("broken", "gone bad") and list(left.rows)[1] == left.rows[1]
    assert [(problem.path, problem.reason) for problem in left.problems] == [("b.webp", "gone bad"), ("c.gif", "truncated")]
    assert left.counts() == {**index.counts(), "trainable": 3, "broken": 2, "without_caption": 1}
    assert "3 to train on (2 gif, 1 mp4, 4 to 5 frames" in left.summary()
    assert index.trainable.tolist() == [0, 1, 6, 7] and index != left
    less = left.without({0: "also", 4: "held out", 5: "duplicate", 3: "static", 2: "broken before"})
    assert less.trainable.tolist() == [6, 7] and less.held_out.tolist() == less.duplicates.tolist() == []
    assert less.counts() == {
        "files": 8, "trainable": 2, "static": 0, "broken": 6, "held_out": 0, "duplicates": 0, "without_caption": 1,
    }  # fmt: skip
    assert [problem.reason for problem in less.problems] == ["also", "gone bad", "broken before", "static", "held out", "duplicate"]
    assert less.frame_counts.tolist() == [5, 5] and "median 5" in less.summary()
    assert "0 to train on (none)" in less.without({6: "x", 7: "x"}).summary()


def test_the_fingerprint_follows_clips_that_break_later(tmp_path: Path) -> None:
    index = make_index(tmp_path, CLIPS)
    assert index.without({}).fingerprint == index.without({4: "held out", 5: "no matter"}).fingerprint == index.fingerprint
    seen = [index.without(broken).fingerprint for broken in ({0: "x"}, {1: "x"}, {0: "x", 1: "x"})]
    assert len({index.fingerprint, *seen}) == 4
    assert index.without({1: "y", 0: "z"}).fingerprint == seen[2] == index.without({1: "x"}).without({0: "x"}).fingerprint


def test_pickling_opens_the_file_again(tmp_path: Path) -> None:
    clips = [found(f"{number:05d}.gif", 3) for number in range(1000)]
    index = make_index(tmp_path, clips).without({3: "bad"})
    data = pickle.dumps(index)
    assert len(data) < 2000, "rows do not travel"
    again = pickle.loads(data)
    assert again == index and again.trainable.tolist() == index.trainable.tolist() and again.rows[3].reason == "bad"
    make_index(tmp_path, clips[:-1])
    with pytest.raises(UserError, match="made anew by another run"):
        pickle.loads(data)


def test_equal_when_the_same_is_known_of_the_same_clips(tmp_path: Path) -> None:
    index = make_index(tmp_path, CLIPS)
    assert index == open_index(tmp_path, settings_of(tmp_path).identity) == index.without({})
    later = [{**clip, "mtime_ns": 8} for clip in CLIPS]  # found again, in another segment
    assert make_index(tmp_path, later) == index
    assert index != index.without({0: "x"}) and index.without({0: "x"}) != index.without({0: "y"})
    assert make_index(tmp_path, [{**CLIPS[0], "caption": "a dog"}, *CLIPS[1:]]) != index
    assert index != "an index" and make_index(tmp_path, CLIPS, root=tmp_path / "elsewhere") != index


def test_an_index_of_another_fingerprint_is_not_taken_for_it(tmp_path: Path) -> None:
    first = make_index(tmp_path, CLIPS)
    assert open_index(tmp_path, first.identity, first.fingerprint) == first
    assert open_index(tmp_path, first.identity, first.fingerprint, {0: "x"}) == first.without({0: "x"})
    make_index(tmp_path, CLIPS[1:])
    with pytest.raises(UserError, match="made anew by another run"):
        open_index(tmp_path, first.identity, first.fingerprint)


def test_what_breaks_later_is_said_of_the_same_index_alone(tmp_path: Path) -> None:
    index = make_index(tmp_path, CLIPS)
    other = make_index(tmp_path, CLIPS[1:])
    said = rf"index-{index.identity}.arrow' was made anew.*fingerprint {other.fingerprint}, not {index.fingerprint}.*Start again, or give"
    with pytest.raises(UserError, match=said):
        index.without({1: "bad"})


def test_one_more_broken_file_numbers_the_rows_anew(tmp_path: Path) -> None:
    """Training sees the same clips, so the fingerprint is the same; ids name others."""
    index = make_index(tmp_path, CLIPS)
    pickled = pickle.dumps(index)
    later = make_index(tmp_path, [broken("0.gif", "truncated"), *CLIPS])
    assert later.fingerprint == index.fingerprint and later.path(1) == index.path(0)
    for use in (lambda: index.without({1: "bad"}), lambda: pickle.loads(pickled)):
        with pytest.raises(UserError, match=f"made anew.*fingerprint {index.fingerprint}, but its rows are numbered otherwise"):
            use()


def test_the_summary_names_what_was_indexed(tmp_path: Path) -> None:
    index = make_index(tmp_path, CLIPS, manifest="some.csv")
    assert index.summary().startswith(f"8 clips in '{tmp_path}/data/some.csv': 4 to train on") and index.root == tmp_path / "data"
    assert make_index(tmp_path, CLIPS).source == tmp_path / "data"


def test_an_absent_index_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no index"):
        open_index(tmp_path, "0123")
