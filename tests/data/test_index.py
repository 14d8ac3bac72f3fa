"""The index of a data folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import rdtf_ds.data.index as index_module
from rdtf_ds.data.clip import DecodeLimits
from rdtf_ds.data.index import ClipIndex, build_index
from rdtf_ds.data.quarantine import Problem
from rdtf_ds.data.writing import write_clip
from rdtf_ds.errors import UserError

LIMITS = DecodeLimits(max_frames=5)


def clip(path: Path, num_frames: int, seed: int = 0) -> None:
    write_clip(np.random.default_rng(seed).integers(0, 255, (num_frames, 8, 10, 3), dtype=np.uint8), path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three trainable clips, one of two frames, one broken, and what is no clip."""
    root = tmp_path / "data"
    clip(root / "b.gif", 3)
    clip(root / "a" / "z.webp", 9)
    clip(root / "a" / "UPPER.PNG", 4)
    clip(root / "two.gif", 2)
    clip(root / ".hidden.gif", 4)
    clip(root / ".cache" / "x.gif", 4)
    (root / "broken.gif").write_bytes((root / "b.gif").read_bytes()[:60])
    (root / "notes.md").write_text("no clip")
    (root / "b.txt").write_text("a cat")
    return root


def test_rows_are_sorted_and_say_what_each_file_is(folder: Path) -> None:
    index = build_index(folder, LIMITS)
    assert [(row.clip_id, row.path, row.format, row.num_frames, row.status) for row in index.rows] == [
        (0, "a/UPPER.PNG", "png", 4, "trainable"),
        (1, "a/z.webp", "webp", 9, "trainable"),
        (2, "b.gif", "gif", 3, "trainable"),
        (3, "broken.gif", "", 0, "broken"),
        (4, "two.gif", "gif", 2, "static"),
    ]
    assert (index.rows[2].width, index.rows[2].height, index.rows[2].caption) == (10, 8, "a cat")
    assert index.trainable.dtype == np.int64 and index.trainable.tolist() == [0, 1, 2]
    assert index.frame_counts.tolist() == [4, 5, 3]  # at most max_frames
    assert index.problems == [Problem("broken.gif", "file is truncated inside a frame")]
    assert index.counts() == {"files": 5, "trainable": 3, "static": 1, "broken": 1, "without_caption": 2}
    summary = index.summary()
    for part in ("5 clips", "3 to train on", "1 gif", "1 static", "1 broken", "2 without a caption", "3 to 5 frames"):
        assert part in summary


def test_real_clips_are_all_trainable(real_data: Path) -> None:
    index = build_index(real_data / "stickers", DecodeLimits())
    assert index.counts() == {"files": 96, "trainable": 96, "static": 0, "broken": 0, "without_caption": 0}
    captions = {row["file_name"]: row["text"] for row in map(json.loads, (real_data / "stickers" / "metadata.jsonl").open())}
    assert {row.path: row.caption for row in index.rows} == captions


def test_fingerprint_changes_with_what_training_sees_and_with_nothing_else(folder: Path) -> None:
    first = build_index(folder, LIMITS).fingerprint
    os.utime(folder / "b.gif")
    (folder / "notes2.md").write_text("no clip")
    assert build_index(folder, LIMITS).fingerprint == first
    seen = {first}
    (folder / "b.txt").write_text("a dog")
    seen.add(build_index(folder, LIMITS).fingerprint)
    clip(folder / "b.gif", 5)
    seen.add(build_index(folder, LIMITS).fingerprint)
    (folder / "b.gif").rename(folder / "c.gif")
    seen.add(build_index(folder, LIMITS).fingerprint)
    (folder / "c.gif").unlink()
    seen.add(build_index(folder, LIMITS).fingerprint)
    seen.add(build_index(folder, DecodeLimits(max_frames=4)).fingerprint)
    assert len(seen) == 6


def test_only_changed_files_are_decoded_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "run" / "index.parquet"
    first = build_index(folder, LIMITS, cache)
    assert pq.read_table(cache).column("path").to_pylist() == [row.path for row in first.rows]
    probed: list[str] = []
    probe = index_module.probe_clip
    monkeypatch.setattr(index_module, "probe_clip", lambda path, limits: (probed.append(Path(path).name), probe(path, limits))[1])
    assert build_index(folder, LIMITS, cache) == first
    assert probed == ["broken.gif"]  # tried again: what broke it may have passed
    probed.clear()
    clip(folder / "b.gif", 6)
    (folder / "b.txt").write_text("new words")
    again = build_index(folder, LIMITS, cache)
    assert sorted(probed) == ["b.gif", "broken.gif"]
    assert (again.rows[2].num_frames, again.rows[2].caption) == (6, "new words")
    probed.clear()
    build_index(folder, DecodeLimits(max_frames=4), cache)
    assert len(probed) == 5  # other limits, other verdicts
    cache.write_bytes(b"damaged")
    assert build_index(folder, LIMITS, cache) == again


def test_links_out_of_the_folder_are_left_out(folder: Path, tmp_path: Path) -> None:
    clip(tmp_path / "outside" / "o.gif", 4)
    (folder / "link.gif").symlink_to(tmp_path / "outside" / "o.gif")
    (folder / "linked").symlink_to(tmp_path / "outside")
    (folder / "loop").symlink_to(folder)
    (folder / "dangling.gif").symlink_to(folder / "nowhere.gif")
    (folder / "inner.gif").symlink_to(folder / "b.gif")
    paths = [row.path for row in build_index(folder, LIMITS).rows if row.status == "trainable"]
    assert paths == ["a/UPPER.PNG", "a/z.webp", "b.gif", "inner.gif"]


def test_folders_that_cannot_be_trained_on(folder: Path, tmp_path: Path) -> None:
    def refused(root: Path) -> str:
        with pytest.raises(UserError) as caught:
            build_index(root, LIMITS)
        return str(caught.value)

    assert "does not exist" in refused(tmp_path / "absent") and "--data_dir" in refused(tmp_path / "absent")
    assert "is a file" in refused(folder / "b.gif")
    (tmp_path / "empty").mkdir()
    assert "has no clips" in refused(tmp_path / "empty")
    clip(tmp_path / "stills" / "one.gif", 1)
    (tmp_path / "stills" / "bad.gif").write_bytes(b"GIF89a")
    assert "nothing to train on" in refused(tmp_path / "stills") and "bad.gif" in refused(tmp_path / "stills")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "gone.gif", "text": "x"}))
    assert "'gone.gif'" in refused(folder)


def test_an_index_is_a_value(folder: Path) -> None:
    index = build_index(folder, LIMITS)
    assert index == ClipIndex(index.root, index.rows, index.max_frames)
    assert all(index.rows[row.clip_id] is row for row in index.rows)
