"""What is opened of a data folder, and what is not."""

from __future__ import annotations

import os
import pickle
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdtf_ds.data.clips.clip import ClipError, Place
from rdtf_ds.data.clips.places import open_regular, place_size, read_at, read_place, relative_name, unreadable

ODD = ["link", "dangling", "folder_link", "fifo", "socket", "folder"]


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One of everything a name can stand for."""
    (tmp_path / "file").write_bytes(b"0123456789")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder_link").symlink_to("folder")
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.chdir(tmp_path)  # a socket's path may have 107 bytes at most
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    return tmp_path


def open_files() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_a_regular_file_is_opened_for_reading_alone(zoo):
    descriptor = open_regular(zoo / "file")
    assert os.read(descriptor, 99) == b"0123456789" and not os.get_inheritable(descriptor)
    with pytest.raises(OSError):
        os.write(descriptor, b"x")
    os.close(descriptor)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("link", "is a symbolic link, which is not followed. Put the file itself in its place"),
        ("dangling", "is a symbolic link, which is not followed. Put the file itself in its place"),
        ("folder_link", "is a symbolic link, which is not followed. Put the file itself in its place"),
        ("fifo", "is a FIFO, not a file. Take it away"),
        ("socket", "is a socket, not a file. Take it away"),
        ("folder", "is a folder, not a file. Rename it, or take it away"),
        ("/dev/null", "is a device, not a file. Take it away"),
    ],
)
def test_all_else_is_refused_unopened(zoo, monkeypatch, name, reason):
    monkeypatch.setattr(os, "open", lambda *_, **__: pytest.fail("it was opened"))
    for call in (open_regular, lambda path: read_place(Place(path), 99), lambda path: place_size(Place(path))):
        with pytest.raises(ClipError) as caught:
            call(zoo / name)
        assert (caught.value.path, caught.value.reason, caught.value.transient) == (str(zoo / name), reason, False)


@pytest.mark.parametrize("name", [*ODD, "/dev/null"])
def test_a_file_that_is_exchanged_before_it_is_opened(zoo, monkeypatch, name):
    regular = os.lstat(zoo / "file")
    before = open_files()
    monkeypatch.setattr(os, "lstat", lambda path: regular)
    with pytest.raises(ClipError):  # and at once: a FIFO without a writer would hold a reader for ever
        open_regular(zoo / name)
    assert open_files() == before


def test_an_absent_file_may_come_back(zoo):
    with pytest.raises(ClipError, match="cannot be read: No such file") as caught:
        open_regular(zoo / "absent")
    assert caught.value.transient
    assert pickle.loads(pickle.dumps(unreadable(Place(zoo, 3, 4), OSError(5, "Input/output error")))).transient


def test_a_place_is_a_piece_of_a_file(zoo):
    file = zoo / "file"
    assert read_place(Place(file), 10) == b"0123456789"
    assert read_place(Place(file, 2, 3), 3) == b"234" and read_place(Place(file, 7, 3), 3) == b"789"
    assert read_place(Place(file, 10, 0), 0) == b""
    assert (place_size(Place(file)), place_size(Place(file, 2, 3))) == (10, 3)


def test_too_many_bytes_are_not_read(zoo, monkeypatch):
    before = open_files()
    monkeypatch.setattr(os, "pread", lambda *_: pytest.fail("it was read"))
    with pytest.raises(ClipError, match=r"10 bytes are more than rdtf.data.max_bytes \(9\)"):
        read_place(Place(zoo / "file"), 9)
    with pytest.raises(ClipError, match=r"@1: 4 bytes are more than rdtf.data.max_bytes \(3\)"):
        read_place(Place(zoo / "file", 1, 4), 3)
    assert open_files() == before


def test_a_shard_that_has_shrunk(zoo):
    for call in (place_size, lambda place: read_place(place, 99)):
        with pytest.raises(ClipError, match="its shard has become shorter: 10 bytes, and 11 are needed") as caught:
            call(Place(zoo / "file", 8, 3))
        assert not caught.value.transient


def test_a_disk_that_fails_and_a_file_that_shrinks_meanwhile(zoo, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    before = open_files()
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(ClipError, match="cannot be read: Input/output error") as caught:
        read_place(Place(zoo / "file"), 99)
    assert caught.value.transient
    monkeypatch.setattr(os, "pread", lambda *_: b"")
    with pytest.raises(ClipError, match="shorter while it was read: 0 bytes of 10") as caught:
        read_place(Place(zoo / "file"), 99)
    assert caught.value.transient and open_files() == before


def test_reads_that_come_in_pieces(zoo, monkeypatch):
    whole = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, size, offset: whole(descriptor, min(size, 3), offset))
    assert read_place(Place(zoo / "file"), 10) == b"0123456789" and read_place(Place(zoo / "file", 1, 8), 10) == b"12345678"
    with open(zoo / "file", "rb") as file:
        assert read_at(file.fileno(), 6, 99) == b"6789" and read_at(file.fileno(), 10, 4) == b""


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("a.gif", "a.gif"),
        ("./a//b/./c d.gif", "a/b/c d.gif"),
        ("..a/...gif", "..a/...gif"),
        ("a\\..\\b.gif", "a\\..\\b.gif"),
        ("猫/é.gif", "猫/é.gif"),
        ("", None),
        (".", None),
        ("/", None),
        ("/etc/passwd", None),
        ("//a.gif", None),
        ("..", None),
        ("a/../b.gif", None),
        ("a/..", None),
        ("a\0.gif", None),
        ("\ud800.gif", None),
        ("\udcff.gif", None),
    ],
)
def test_names_that_others_wrote(name, inside):
    assert relative_name(name) == inside


@given(st.text(alphabet=st.sampled_from("./a é\0\ud800-"), max_size=12))
def test_a_name_stays_below_its_folder(name):
    inside = relative_name(name)
    if inside is None:
        assert name.startswith("/") or ".." in name.split("/") or "\0" in name or "\ud800" in name or not name.strip("./")
    else:
        assert relative_name(inside) == inside and inside.encode()
        assert os.path.normpath(os.path.join("/base", name)) == f"/base/{inside}"
