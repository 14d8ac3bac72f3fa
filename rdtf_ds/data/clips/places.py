"""Opens files of a data folder, and those alone that are what they seem: regular files, never what a link, a FIFO or a device leads to.

A FIFO would hang its reader, a link may lead out of the folder, a device has side effects; whoever fills a folder for others can make
any of them. So the name is looked at before it is opened, the open itself refuses links and does not wait, and what was opened is
looked at again. Names that come out of manifests, metadata and shards pass `relative_name` first.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from rdtf_ds.data.clips.clip import ClipError, Place

_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_LINK = "is a symbolic link, which is not followed. Put the file itself in its place"
_KINDS = {
    stat.S_IFLNK: _LINK,
    stat.S_IFDIR: "is a folder, not a file. Rename it, or take it away",
    stat.S_IFIFO: "is a FIFO, not a file. Take it away",
    stat.S_IFSOCK: "is a socket, not a file. Take it away",
    stat.S_IFCHR: "is a device, not a file. Take it away",
    stat.S_IFBLK: "is a device, not a file. Take it away",
}


def why_not_regular(mode: int) -> str | None:
    """What speaks against opening a file of this ``st_mode`` (of an lstat), for people; None for a regular file."""
    if stat.S_ISREG(mode):
        return None
    return _KINDS.get(stat.S_IFMT(mode), "is not a regular file")


def open_regular(path: str | Path) -> int:
    """Open a regular file for reading; the caller closes it.

    Returns:
        A file descriptor.
    Raises:
        ClipError: It is a link, a FIFO, a device, a folder or a socket, or cannot be opened; nothing stays open.
    """
    try:
        _demand_regular(path, os.lstat(path).st_mode)  # a device may act on being opened at all
        descriptor = os.open(path, _FLAGS)
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        _demand_regular(path, os.fstat(descriptor).st_mode)  # it may have been exchanged in between
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def place_size(place: Place) -> int:
    """Bytes of a place.

    Raises:
        ClipError: It cannot be opened, or its shard is too short to hold it.
    """
    descriptor = open_regular(place.path)
    try:
        return _size(place, descriptor)
    finally:
        os.close(descriptor)


def read_place(place: Place, max_bytes: int) -> bytes:
    """All bytes of a place.

    Raises:
        ClipError: It has more than ``max_bytes``, which is checked before any is read; it cannot be read; it is shorter than it should be.
    """
    descriptor = open_regular(place.path)
    try:
        size = _size(place, descriptor)
        if size > max_bytes:
            raise ClipError(str(place), f"{size} bytes are more than rdtf.data.max_bytes ({max_bytes})")
        data = read_at(descriptor, place.offset, size)
    except OSError as error:
        raise unreadable(place, error) from error
    finally:
        os.close(descriptor)
    if len(data) != size:
        raise ClipError(str(place), f"has become shorter while it was read: {len(data)} bytes of {size}", transient=True)
    return data


def read_at(descriptor: int, offset: int, size: int) -> bytes:
    """``size`` bytes from ``offset``; fewer only where the file ends."""
    data = os.pread(descriptor, size, offset)
    if len(data) in (0, size):
        return data
    pieces, have = [data], len(data)  # one call reads at most 2 GiB
    while have < size and (data := os.pread(descriptor, size - have, offset + have)):
        pieces.append(data)
        have += len(data)
    return b"".join(pieces)


def unreadable(path: str | Path | Place, error: OSError) -> ClipError:
    """The error of a file that the system would not give us: nothing is known against its bytes, so it is worth another try."""
    return ClipError(str(path), f"cannot be read: {error.strerror or error}", transient=True)


def relative_name(name: str) -> str | None:
    """A name that others wrote, as a path below its folder with ``/`` between the parts; None if it may not be used.

    It may not be empty, absolute, go up by ``..``, hold a NUL, or be anything that UTF-8 cannot write.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or "\0" in name or ".." in parts or not parts:
        return None
    if not name.isascii():
        try:
            name.encode()
        except UnicodeEncodeError:  # a byte that is not UTF-8, or half of a surrogate pair, as JSON can spell it
            return None
    return "/".join(parts)


def _demand_regular(path: str | Path, mode: int) -> None:
    if fault := why_not_regular(mode):
        raise ClipError(path, fault)


def _size(place: Place, descriptor: int) -> int:
    total = os.fstat(descriptor).st_size
    if place.length is None:
        return total - place.offset
    if place.offset + place.length > total:
        raise ClipError(str(place), f"its shard has become shorter: {total} bytes, and {place.offset + place.length} are needed")
    return place.length
