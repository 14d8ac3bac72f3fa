"""File operations that are on the disk when they return: written, flushed to the device, and entered in their folder.

Everything a checkpoint does to the file system goes through here, one operation a call, so that a test can cut the power after any of
them. A file is never changed in place: it is written whole under a name nobody reads, and renamed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

UNFINISHED = ".partial"
"""Suffix of what is not yet, or no longer, whole."""
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Digest:
    """What a file holds: its length and the SHA-256 of its bytes, in hex."""

    bytes: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """As the manifest has it."""
        return {"bytes": self.bytes, "sha256": self.sha256}


class _Hashing:
    """A binary file that hashes what passes through ``write``; what torch.save and json need of a file."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash, self._bytes = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        """Append bytes, or anything that has a buffer of them, and hash them; returns how many.

        Raises:
            OSError: As the disk says, or it took fewer bytes than it was given.
        """
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _CHUNK):
            piece = view[start : start + _CHUNK]
            self._hash.update(piece)
            if self._file.write(piece) != len(piece):
                raise OSError("a write stopped short")
        self._bytes += len(view)
        return len(view)

    def flush(self) -> None:
        """Hands what is buffered to the system; `write_file` sees to the disk."""
        self._file.flush()

    @property
    def digest(self) -> Digest:
        """Of all that was written so far."""
        return Digest(self._bytes, self._hash.hexdigest())


def write_file(path: Path, fill: Callable[[Any], object]) -> Digest:
    """Make a new file of what ``fill`` writes to the binary file it is given, front to back.

    Returns:
        The digest of what was handed over, which the file should hold.

    Raises:
        FileExistsError: There is such a file.
        OSError: As the disk says; a file that is not whole may be left.
    """
    with open(path, "xb") as file:
        hashing = _Hashing(file)
        fill(hashing)
        file.flush()
        os.fsync(file.fileno())
    return hashing.digest


def replace_file(path: Path, data: bytes) -> None:
    """Put ``data`` in the place of a file: a reader finds the old bytes or the new ones, whenever it looks."""
    partial = path.with_name(path.name + UNFINISHED)
    if partial.exists():
        os.unlink(partial)
    write_file(partial, lambda file: file.write(data))
    os.replace(partial, path)
    sync(path.parent)


def make_folder(path: Path) -> None:
    """Make a new folder and enter it in its parent.

    Raises:
        FileExistsError: There is one.
    """
    os.mkdir(path)
    sync(path.parent)


def make_folders(path: Path) -> None:
    """Make a folder and those above it, as far as they are not there."""
    if not path.is_dir():
        make_folders(path.parent)
        make_folder(path)


def rename(source: Path, target: Path) -> None:
    """Rename a file or folder within a file system; ``target`` must not exist."""
    os.rename(source, target)
    sync(target.parent)


def remove_tree(path: Path) -> None:
    """Remove a folder and all in it, or a file; a symbolic link is removed, not followed."""
    if path.is_dir() and not path.is_symlink():
        for child in sorted(path.iterdir()):
            remove_tree(child)
        os.rmdir(path)
    else:
        os.unlink(path)


def sync(path: Path) -> None:
    """Put what is already written of a file, or the names in a folder, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest_file(path: Path) -> Digest:
    """What a file holds now."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Digest(file.tell(), digest)
