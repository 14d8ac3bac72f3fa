"""Kept tables of shards: used for an unchanged shard, and for no other."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rdtf_ds.data.clips.clip import ClipError
from rdtf_ds.data.sources import shard_tables
from rdtf_ds.data.sources.shard_tables import shard_table
from tests.data.tars import member, write


@pytest.fixture
def walks(monkeypatch):
    """The names of shards that were walked."""
    seen: list[str] = []
    walk = shard_tables.list_shard
    monkeypatch.setattr(shard_tables, "list_shard", lambda path, name: seen.append(name) or walk(path, name))
    return seen


def paths(root: Path, name: str, cache: Path | None) -> list[str]:
    return shard_table(root, name, cache)["path"].to_pylist()


def test_a_shard_is_walked_once(tmp_path, walks):
    write(tmp_path / "d" / "é" / "s.tar", member("0.gif", b"x"), member("0.txt", b"caption"), member("1.gif", b"y"))
    first = shard_table(tmp_path / "d", "é/s.tar", tmp_path / "c")
    again = shard_table(tmp_path / "d", "é/s.tar", tmp_path / "c")
    assert walks == ["é/s.tar"] and again.equals(first, check_metadata=True) and again.num_rows == 2
    assert first.equals(shard_table(tmp_path / "d", "é/s.tar", None), check_metadata=True) and len(walks) == 2


def test_shards_of_equal_names_in_other_folders_and_a_folder_seen_from_above(tmp_path, walks):
    write(tmp_path / "a" / "s.tar", member("0.gif", b"x"))
    write(tmp_path / "b" / "s.tar", member("1.gif", b"x"))
    os.utime(tmp_path / "a" / "s.tar", ns=(5, 5))
    os.utime(tmp_path / "b" / "s.tar", ns=(5, 5))
    cache = tmp_path / "c"
    assert paths(tmp_path / "a", "s.tar", cache) == ["s.tar/0.gif"]
    assert paths(tmp_path / "b", "s.tar", cache) == ["s.tar/1.gif"]
    assert paths(tmp_path, "a/s.tar", cache) == ["a/s.tar/0.gif"]
    assert len(walks) == 3


def test_a_shard_that_has_changed_is_walked_again(tmp_path, walks):
    shard = write(tmp_path / "s.tar", member("0.gif", b"x"))
    os.utime(shard, ns=(5, 5))
    assert paths(tmp_path, "s.tar", tmp_path / "c") == ["s.tar/0.gif"]
    write(shard, member("1.gif", b"x"))
    os.utime(shard, ns=(5, 6))  # the size is the same
    assert paths(tmp_path, "s.tar", tmp_path / "c") == ["s.tar/1.gif"]
    write(shard, member("2.gif", b"x"), member("3.gif", b"x"))
    os.utime(shard, ns=(5, 6))  # the time is the same
    assert paths(tmp_path, "s.tar", tmp_path / "c") == ["s.tar/2.gif", "s.tar/3.gif"]
    assert len(walks) == 3


def test_a_table_of_a_shard_that_changes_meanwhile_is_not_kept(tmp_path, monkeypatch):
    shard = write(tmp_path / "s.tar", member("0.gif", b"x"))
    walk = shard_tables.list_shard

    def walk_and_change(path, name):
        table = walk(path, name)
        os.utime(shard, ns=(5, shard.stat().st_mtime_ns + 1))
        return table

    monkeypatch.setattr(shard_tables, "list_shard", walk_and_change)
    assert paths(tmp_path, "s.tar", tmp_path / "c") == ["s.tar/0.gif"]
    assert not (tmp_path / "c").exists()


def test_a_damaged_table_is_made_anew(tmp_path, walks):
    write(tmp_path / "s.tar", member("0.gif", b"x"))
    expected = shard_table(tmp_path, "s.tar", tmp_path / "c")
    (kept,) = (tmp_path / "c").iterdir()
    whole = kept.read_bytes()
    for damaged in (b"", whole[:100], whole[:-10], b"x" * len(whole)):
        kept.write_bytes(damaged)
        assert shard_table(tmp_path, "s.tar", tmp_path / "c").equals(expected)
        assert kept.read_bytes() == whole
    assert len(walks) == 5


def test_faults_come_out_of_it_as_of_a_walk(tmp_path):
    write(tmp_path / "s.tar", member("0.gif", b"x"), end=b"")
    for _ in range(2):
        assert shard_table(tmp_path, "s.tar", tmp_path / "c")["fault"].to_pylist()[1].startswith("ends without")
    (tmp_path / "l.tar").symlink_to("s.tar")
    with pytest.raises(ClipError, match="symbolic link"):
        shard_table(tmp_path, "l.tar", tmp_path / "c")
