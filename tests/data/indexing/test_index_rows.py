"""What a build takes over of earlier ones, and what it examines anew."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rdtf_ds.data.clips.clip import ClipError, DecodeLimits
from rdtf_ds.data.clips.writing import write_clip
from rdtf_ds.data.indexing.index_building import build_index
from rdtf_ds.data.indexing.index_rows import lay_over, take_over, to_examine
from rdtf_ds.data.indexing.index_segments import EXAMINED, IndexSettings
from tests.data.indexing.building import LIMITS, Decoder, Describer, clip, rows, taken


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


def test_equal_names_and_times_in_another_folder_are_other_clips(tmp_path: Path, decoder: type[Decoder]) -> None:
    for seed, name in enumerate(("one", "other")):
        write_clip(np.full((3, 8, 8, 3), 50 * seed, np.uint8), tmp_path / name / "x.gif")
        os.utime(tmp_path / name / "x.gif", ns=(1, 1))
    (tmp_path / "link").symlink_to(tmp_path / "one")
    one, other, again = (build_index(tmp_path / name, LIMITS, tmp_path / "index") for name in ("one", "other", "link"))
    assert taken(decoder) == ["x.gif"] * 2 and one.content(0) != other.content(0)
    assert again == one and again.identity == one.identity and again.root == tmp_path / "one"


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
