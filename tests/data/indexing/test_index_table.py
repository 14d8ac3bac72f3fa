"""The index file: what its header says of all rows, how it is mapped and let go, and what damage reads as."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from rdtf_ds.data.indexing.index import open_index
from rdtf_ds.data.indexing.index_segments import WHOLE, read_segments, write_segment
from rdtf_ds.data.indexing.index_table import INDEX, MappedTable, index_path, write_index
from rdtf_ds.errors import UserError
from tests.data.made_index import KINDS, broken, features_of, found, make_index, rows_laid_over, settings_of

CLIPS: list[dict[str, Any]] = [
    *KINDS,
    {**found("g.gif", 4), "held_out": True, "duplicate_of": 4},
]


def path_of(folder: Path, **changes: Any) -> Path:
    return index_path(folder, settings_of(folder, **changes).identity)


def test_the_header_says_what_all_rows_come_to(tmp_path: Path) -> None:
    make_index(tmp_path, CLIPS)
    table = MappedTable(path_of(tmp_path))
    assert len(table) == 7 and table.batch.schema.remove_metadata() == INDEX
    assert table.settings == settings_of(tmp_path)
    assert table.header["counts"] == {
        "files": 7, "trainable": 2, "static": 1, "broken": 1, "held_out": 1, "duplicates": 2, "without_caption": 1,
    }  # fmt: skip
    assert table.header["formats"] == {"gif": 1, "webp": 1} and table.header["frames"] == [4, 4, 5]
    assert table.numbers("use").tolist() == [0, 0, 4, 3, 1, 2, 2]
    assert table.value("path", 1) == "b.webp" and table.value("durations_ms", 3) == [40, 41]
    for row in (-1, 7):
        with pytest.raises(IndexError, match="7 rows"):
            table.value("path", row)


def test_an_index_without_rows_or_trainable_clips_is_one_too(tmp_path: Path) -> None:
    assert make_index(tmp_path, []).counts()["files"] == 0
    index = make_index(tmp_path, [broken("c.gif", "truncated")], background=(1, 1, 1))
    assert index.trainable.tolist() == [] and index.counts()["broken"] == 1 and "0 to train on (none)" in index.summary()


def test_columns_lie_on_the_mapped_file(tmp_path: Path) -> None:
    """Nothing is copied: two views share their address, and releasing pages loses nothing."""
    make_index(tmp_path, CLIPS)
    table = MappedTable(path_of(tmp_path))
    first = table.numbers("kept")
    assert first.ctypes.data == table.numbers("kept").ctypes.data and not first.flags.writeable
    before = first.tolist()
    table.release()
    assert first.tolist() == before == [4, 5, 0, 2, 3, 4, 4]


def test_pages_that_were_read_do_not_stay(tmp_path: Path) -> None:
    make_index(tmp_path, CLIPS)
    table, released = MappedTable(path_of(tmp_path)), []
    table.release = lambda: released.append(1)  # type: ignore[method-assign]
    for _ in range(640):
        table.value("caption", 0)
    assert len(released) == 40


def test_a_new_index_leaves_the_mapped_one_alone(tmp_path: Path) -> None:
    first = make_index(tmp_path, CLIPS)
    second = make_index(tmp_path, CLIPS[:2])
    assert len(first.rows) == 7 and first.rows[6].path == "g.gif"
    assert len(second.rows) == 2 and index_path(first.folder, first.identity) == index_path(second.folder, second.identity)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [path_of(tmp_path).name]


def test_an_equal_index_is_left_where_it_is_and_any_other_replaced(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    write_segment(tmp_path, settings, CLIPS[2:4], [None, features_of(CLIPS[3], 0, settings)])
    table = rows_laid_over(read_segments(tmp_path, settings), [{"caption": "a cat"}, {}])
    fingerprint = write_index(tmp_path, settings, table)
    path = path_of(tmp_path)
    before, whole = path.stat(), path.read_bytes()
    assert MappedTable(path).header["fingerprint"] == fingerprint == write_index(tmp_path, settings, table)
    assert path.stat() == before and not list(tmp_path.glob(".*.tmp"))
    at = table.column_names.index("mtime_ns")
    for change in (table.set_column(at, "mtime_ns", pa.array([7, 8])), table, table.slice(1), table):
        last = path.stat().st_ino
        write_index(tmp_path, settings, change)
        assert path.stat().st_ino != last and len(MappedTable(path)) == len(change)
    assert path.read_bytes() == whole
    path.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    write_index(tmp_path, settings, table)
    assert path.read_bytes() == whole, "one that is damaged is none"


def test_a_table_must_be_whole(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    write_segment(tmp_path, settings, CLIPS[2:3], [None])
    rows = read_segments(tmp_path, settings)
    with pytest.raises(ValueError, match="lacks caption, duplicate_of, group, held_out, path"):
        write_index(tmp_path, settings, rows)
    whole = rows_laid_over(rows, [{}])
    with pytest.raises(ValueError, match="'caption' has 1 nulls"):
        write_index(
            tmp_path, settings, whole.set_column(whole.column_names.index("caption"), "caption", pa.array([None], pa.large_string()))
        )
    assert not path_of(tmp_path).exists()


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, -1])
def test_a_truncated_file_names_itself_and_a_remedy(tmp_path: Path, keep: float) -> None:
    make_index(tmp_path, CLIPS)
    path = path_of(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(UserError) as caught:
        MappedTable(path)
    assert str(path) in str(caught.value) and "is damaged" in str(caught.value) and f"Remove '{path.name}'" in str(caught.value)


def test_damage_within_the_file_is_noticed_where_it_is_read(tmp_path: Path) -> None:
    """A flipped byte must neither be taken for text nor lead a reader out of the file."""
    index = make_index(tmp_path, [{**clip, "caption": f"words {number}"} for number, clip in enumerate(CLIPS)])
    path = path_of(tmp_path)
    offsets = MappedTable(path).batch.column("caption").buffers()[1].to_pybytes()[: 8 * (len(CLIPS) + 1)]
    whole, identity = path.read_bytes(), index.identity
    assert whole.count(b"words 3") == whole.count(offsets) == 1
    broken_text = whole.replace(b"words 3", b"words \xff")
    far_away = offsets[:24] + (2**40).to_bytes(8, "little") + offsets[32:]
    for damaged in (broken_text, whole.replace(offsets, far_away)):
        path.write_bytes(damaged)
        again = open_index(tmp_path, identity)
        assert again.caption(0) == "words 0" and len(again.trainable) == len(index.trainable)
        for read in (lambda: again.caption(3), lambda: again.rows[3], lambda: list(again.rows)):  # noqa: B023  called at once
            with pytest.raises(UserError, match="is damaged .*Remove"):
                read()


def test_an_absent_file_and_another_versions(tmp_path: Path) -> None:
    make_index(tmp_path, CLIPS)
    path = path_of(tmp_path)
    rows = pa.ipc.open_file(path).read_all()
    header = json.loads(rows.schema.metadata[b"rdtf_index"])

    def refused(metadata: dict[bytes, bytes] | None, table: pa.Table = rows) -> str:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema.with_metadata(metadata)) as writer:
            writer.write_table(table.replace_schema_metadata(metadata))
        with pytest.raises(UserError) as caught:
            MappedTable(path)
        return str(caught.value)

    def metadata_of(header: dict[str, Any]) -> dict[bytes, bytes]:
        text = json.dumps(header).encode()
        return {b"rdtf_index": text, b"rdtf_index_crc32": str(zlib.crc32(text)).encode()}

    assert "format 9" in refused(metadata_of({**header, "format": 9}))
    good = metadata_of(header)
    assert "is damaged" in refused(None) and "is damaged" in refused({b"rdtf_index": b"{"})
    flipped = {**good, b"rdtf_index": good[b"rdtf_index"].replace(b"held_out", b"help_out")}
    assert "checksum of its header" in refused(flipped)
    assert "not what its header says" in refused(good, rows.slice(1)) and "header says" in refused(good, rows.drop_columns(["group"]))
    path.unlink()
    with pytest.raises(UserError, match=r"there is no index .*tools/index_data.py.*every node"):
        MappedTable(path)


CHANGES = [
    {"path": "z.gif"}, {"content": "00"}, {"caption": "a dog"}, {"num_frames": 3}, {"status": "broken"}, {"held_out": True},
    {"duplicate_of": 1}, {"window_first": 0, "window_count": 4}, {"window_first": 0, "window_count": 5},
]  # fmt: skip
OTHERS = [
    {"mtime_ns": 8}, {"size": 11}, {"file": "shard.tar", "offset": 512, "length": 10, "path": "a.gif"}, {"durations_ms": [1]},
    {"group": "q"}, {"has_alpha": True}, {"file_content": "00"}, {"transient": True},
]  # fmt: skip


def test_the_fingerprint_follows_what_training_sees_and_nothing_else(tmp_path: Path) -> None:
    def fingerprint(change: dict[str, Any], **settings: Any) -> str:
        return make_index(tmp_path, [{**CLIPS[0], **change}, CLIPS[1]], **settings).fingerprint

    first = fingerprint({})
    assert {fingerprint(change) for change in OTHERS} == {first}
    seen = [fingerprint(change) for change in CHANGES] + [fingerprint({}, features="clip:x")]
    out_of_training = seen.pop(4), seen.pop(4), seen.pop(4)
    assert len({first, *seen, out_of_training[0]}) == len(seen) + 2 and len(set(out_of_training)) == 1
    assert make_index(tmp_path, CLIPS).fingerprint == make_index(tmp_path, CLIPS[:2]).fingerprint, "only what is trained on counts"
    assert fingerprint({"caption": "a catb"}) != fingerprint({"caption": "a cat"}), "and borders of texts count"


def test_texts_cannot_move_between_clips_unseen(tmp_path: Path) -> None:
    def fingerprint(*captions: str) -> str:
        return make_index(tmp_path, [{**clip, "caption": text} for clip, text in zip(CLIPS[:2], captions, strict=True)]).fingerprint

    assert len({fingerprint("ab", "c"), fingerprint("a", "bc"), fingerprint("abc", ""), fingerprint("", "abc")}) == 4


def test_features_of_the_row_are_those_it_was_examined_with(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    assert features_of(CLIPS[1], 1, settings)[:, 0].tolist() == [10, 11, 12, 13, 14]
    assert WHOLE == -1  # numbers in files
