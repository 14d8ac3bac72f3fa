from __future__ import annotations

import pytest

from rdtf_ds.checkpoints.durable import UNFINISHED, write_file
from rdtf_ds.checkpoints.manifest import MANIFEST, CheckpointError
from rdtf_ds.checkpoints.store import CheckpointStore, Tag, find_step_folder


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


def commit(store: CheckpointStore, step: int):
    partial = store.begin(step, 10)
    digest = write_file(partial / "data", lambda file: file.write(b"of step %d" % step))
    return store.commit(partial, {"step": step, "files": {"data": digest.to_json()}})


def names(store: CheckpointStore) -> list[str]:
    return [path.name for path in store.candidates()]


def spoil(path) -> None:
    (path / "data").write_bytes(b"something else")


def test_tags_sort_by_commit_and_read_back():
    assert Tag(7, 40).name == "step00000040-0007" and Tag.of("step00000040-0007") == Tag(7, 40)
    assert Tag(8, 30) > Tag(7, 40), "after going back, the later commit is the newer"
    assert Tag.of("step123456789-12345") == Tag(12345, 123456789)
    others = ("step00000040", "step00000040-0007.partial", "step00000040-7", "../step00000040-0007", "latest", "step40-0007\n")
    assert [Tag.of(name) for name in others] == [None] * len(others)


def test_commits_are_numbered_on_and_listed_newest_first(folder):
    store = CheckpointStore(folder, keep=9)
    assert store.candidates() == [] and store.newest() == (None, []) and store.newest_step() is None
    for step in (5, 10, 10, 7):
        commit(store, step)
    assert names(store) == ["step00000007-0004", "step00000010-0003", "step00000010-0002", "step00000005-0001"]
    assert store.newest_step() == 7
    assert store.newest() == (folder / "step00000007-0004", [])


def test_the_newest_stay_and_those_kept_for_good(folder):
    store = CheckpointStore(folder, keep=2, keep_every=20)
    for step in range(0, 80, 10):
        commit(store, step)
        store.prune()
    assert names(store) == ["step00000070-0008", "step00000060-0007", "step00000040-0005", "step00000020-0003"]


def test_two_that_verify_stay_whatever_the_count(folder):
    store = CheckpointStore(folder, keep=9)
    paths = [commit(store, step) for step in (1, 2, 3, 4, 5)]
    spoil(paths[2])
    spoil(paths[3])
    fresh = CheckpointStore(folder, keep=2)  # a new process knows of none that it is whole
    fresh.prune()
    assert names(fresh) == [paths[number].name for number in (4, 3, 2, 1)], "5 and 2 are whole; what is damaged goes once it is older"
    commit(fresh, 6)
    fresh.prune()
    assert names(fresh)[:2] == ["step00000006-0006", "step00000005-0005"]
    assert len(names(fresh)) == 2


def test_room_is_made_down_to_two(folder, monkeypatch):
    store = CheckpointStore(folder, keep=5)
    for step in range(4):
        commit(store, step)
    rooms = iter([5, 500])
    monkeypatch.setattr(store, "_room", lambda: next(rooms))
    store.begin(9, 100)
    assert names(store) == ["step00000003-0004", "step00000002-0003"]


def test_without_room_nothing_is_begun(folder, monkeypatch):
    store = CheckpointStore(folder)
    commit(store, 1)
    monkeypatch.setattr(store, "_room", lambda: 101)
    with pytest.raises(OSError, match="room for"):
        store.begin(2, 100)  # 2 % are spare
    assert [path.name for path in folder.iterdir()] == ["step00000001-0001"]


def test_what_an_earlier_save_left_is_removed(folder):
    store = CheckpointStore(folder)
    commit(store, 1)
    (folder / f"step00000002-0002{UNFINISHED}").mkdir()
    (folder / f"latest{UNFINISHED}").write_text("x")
    commit(store, 3)
    assert sorted(path.name for path in folder.iterdir()) == ["step00000001-0001", "step00000003-0002"]


def test_latest_names_the_newest_and_is_never_followed(folder, tmp_path):
    store = CheckpointStore(folder)
    assert store.stray_latest() is None
    commit(store, 1)
    store.point_latest()
    assert (folder / "latest").read_text() == "step00000001-0001" and store.stray_latest() is None
    for stray in ("../elsewhere", "/etc", "global_step5", ""):
        (folder / "latest").write_text(stray)
        assert repr(stray) in store.stray_latest()
    (folder / "latest").unlink()
    (tmp_path / "elsewhere").write_text("step00000001-0001")
    (folder / "latest").symlink_to(tmp_path / "elsewhere")
    assert store.stray_latest()


def test_a_step_folder_is_found(folder, tmp_path):
    store = CheckpointStore(folder)
    with pytest.raises(CheckpointError, match="is no folder"):
        find_step_folder(folder)
    paths = [commit(store, step) for step in (1, 2)]
    (folder / "step00000009-0009").mkdir()  # no manifest: never complete
    assert find_step_folder(tmp_path) == find_step_folder(folder) == paths[1]
    assert find_step_folder(paths[0]) == paths[0]
    for path in paths:
        (path / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        find_step_folder(tmp_path)
