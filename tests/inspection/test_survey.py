"""The survey counts what is in the columns of an index, and tells the full number where it lists only some."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest

from rdtf_ds.data.indexing.index_table import INDEX
from rdtf_ds.inspection.survey import COLUMNS, MOST_KINDS, MOST_PATHS, MOST_SIZES, Survey, kind_of_fault, survey

SOUND: dict[str, Any] = {
    "path": "a.gif", "caption": "a red star", "content": "", "duplicate_of": -1, "size": 1000, "status": "trainable", "reason": "",
    "format": "gif", "num_frames": 4, "width": 64, "height": 32, "has_alpha": False, "durations_ms": [100, 100, 100, 200],
}  # fmt: skip
BROKEN = {"status": "broken", "caption": "", "format": "", "num_frames": 0, "width": 0, "height": 0, "durations_ms": [], "size": 7}


def look(*rows: dict[str, Any], at_a_time: int = 7) -> Survey:
    """The survey of rows that differ from a sound one in what is given; each has content of its own unless told otherwise."""
    whole = [{**SOUND, "path": f"{number:04d}.gif", "content": f"{number:064x}", **row} for number, row in enumerate(rows)]
    schema = pa.schema([INDEX.field(name) for name in COLUMNS])
    batch = pa.RecordBatch.from_pylist(whole, schema)
    parts = [batch.slice(start, at_a_time) for start in range(0, len(whole), at_a_time)]
    return survey("stickers", "a summary", {"files": len(rows)}, lambda: parts)


def test_intact_clips_are_counted_and_broken_ones_are_not():
    found = look(
        {}, {"format": "webp", "num_frames": 9, "has_alpha": True, "width": 32}, {"num_frames": 1, "durations_ms": [], "status": "static"},
        {**BROKEN, "reason": "empty file"},
    )  # fmt: skip
    assert found.intact == 3 and found.formats == {"gif": 2, "webp": 1} and found.with_alpha == 1
    assert found.frame_counts == {1: 1, 4: 1, 9: 1} and found.sizes == {(64, 32): 2, (32, 32): 1}
    assert sum(found.bytes.counts) == 3 and found.bytes.edges == (512, 1024)


def test_it_is_the_same_however_the_rows_come():
    rows: list[dict[str, Any]] = []
    for number in range(90):
        rows.append({"caption": f"word {number % 40} of {'x' * (number % 9)}", "width": 10 + number % 7, "size": 3 ** (number % 20)})
        rows.append({"content": f"{number % 30:x}", "caption": " ", "num_frames": 2 + number % 5, "durations_ms": [number] * (number % 3)})
        rows.append({**BROKEN, "reason": f"{number} bytes of {number % 4 * 'y'}"})
    one, seven, all_at_once = (look(*rows, at_a_time=some).to_json() for some in (1, 7, 1000))
    assert one == seven == all_at_once
    assert all_at_once["equal_groups"] == 30 and all_at_once["broken_kinds"] == 4 and all_at_once["without_caption"]["total"] == 90


def test_times_are_those_of_each_clip():
    two = {"num_frames": 2}
    found = look({"durations_ms": [100, 100, 100, 200]}, {**two, "durations_ms": []}, {**two, "durations_ms": [1000, 1500]})
    assert sum(found.seconds.counts) == sum(found.frames_per_second.counts) == 2, "a clip without times has no length"
    places = [edge for edge, count in zip(found.seconds.edges, found.seconds.counts, strict=False) if count]
    assert places == pytest.approx([0.5, 2.5])
    places = [edge for edge, count in zip(found.frames_per_second.edges, found.frames_per_second.counts, strict=False) if count]
    assert places == pytest.approx([0.8, 8])


def test_sizes_are_capped_and_their_number_told():
    found = look({"width": 7}, {"width": 7}, *({"width": width} for width in range(100, 500)))
    assert len(found.sizes) == MOST_SIZES and found.distinct_sizes == 401 and next(iter(found.sizes.items())) == ((7, 32), 2)


def test_a_still_picture_with_a_time_is_no_animation():
    assert look({"num_frames": 1, "durations_ms": [500]}).seconds.counts == ()


def test_captions():
    found = look({"caption": "A red star, a RED heart"}, {"caption": "  "}, {"caption": "it's red, 红星"}, {"caption": ""})
    assert found.frequent_words == {"red": 3, "a": 2, "star": 1, "heart": 1, "it's": 1, "红": 1, "星": 1}
    assert found.captions == ["A red star, a RED heart", "it's red, 红星"]
    assert found.without_caption.total == 2 and found.without_caption.first == ["0001.gif", "0003.gif"]
    assert [edge for edge, count in zip(found.words.edges, found.words.counts, strict=False) if count] == [4, 6]


def test_example_captions_come_from_all_over():
    found = look(*({"caption": f"caption {number}"} for number in range(500)))
    numbers = [int(text.split()[1]) for text in found.captions]
    assert len(numbers) == 12 and numbers[0] < 50 and numbers[-1] > 400


def test_equal_clips_are_grouped_largest_first():
    rows = [{"content": "aa"}, {"content": "bb"}, {"content": "bb", "duplicate_of": 1}, {"content": "cc"}, {"content": "aa"}]
    found = look(*rows, {"content": "bb", "caption": "another"}, {**BROKEN, "content": "cc"}, {**BROKEN, "content": ""})
    assert found.equal_groups == 2 and [group.total for group in found.equals] == [3, 2]
    assert found.equals[0].first == [
        {"path": "0001.gif", "caption": "a red star", "dropped": False},
        {"path": "0002.gif", "caption": "a red star", "dropped": True},
        {"path": "0005.gif", "caption": "another", "dropped": False},
    ]


def test_broken_files_stand_by_kind_of_reason():
    assert kind_of_fault("12 frames of 1.5 or 4") == "… frames of … or …"
    found = look(*({**BROKEN, "reason": f"file is truncated: {number} bytes"} for number in range(70)), {**BROKEN, "reason": "empty file"})
    assert list(found.broken) == ["file is truncated: … bytes", "empty file"] and found.broken_kinds == 2
    truncated = found.broken["file is truncated: … bytes"]
    assert (truncated.total, len(truncated.first), truncated.left_out) == (70, MOST_PATHS, 70 - MOST_PATHS)
    assert truncated.first[1] == {"path": "0001.gif", "reason": "file is truncated: 1 bytes"}


def test_kinds_are_capped_and_their_number_told():
    found = look(*({**BROKEN, "reason": f"fault {'x' * number}"} for number in range(40)))
    assert len(found.broken) == MOST_KINDS and found.broken_kinds == 40


def test_of_equally_many_the_first_stand_first():
    found = look({"content": "b"}, {"content": "a"}, {"content": "a"}, {"content": "b"}, *({**BROKEN, "reason": kind} for kind in "zxy"))
    assert [group.first[0]["path"] for group in found.equals] == ["0000.gif", "0001.gif"] and list(found.broken) == ["z", "x", "y"]


@pytest.mark.parametrize("rows", [[{**BROKEN, "reason": "empty file"}], []], ids=["all broken", "none"])
def test_nothing_intact(rows):
    found = look(*rows)
    assert found.intact == 0 and found.formats == {} and found.bytes.counts == () and found.captions == []


def test_it_is_plain_json():
    found = look({}, {"content": f"{0:064x}"}, {"caption": ""}, {**BROKEN, "reason": "empty file"})
    plain = json.loads(json.dumps(found.to_json()))
    assert plain["sizes"] == [{"width": 64, "height": 32, "clips": 3}] and plain["frame_counts"] == {"4": 3}
    assert plain["broken"] == {"empty file": {"total": 1, "first": [{"path": "0003.gif", "reason": "empty file"}]}}
    assert plain["without_caption"] == {"total": 1, "first": ["0002.gif"]} and plain["equals"][0]["total"] == 2
    assert plain["bytes"]["counts"] == [3] and plain["counts"] == {"files": 4}
