"""Tar shards in WebDataset's layout: a clip is ``KEY.webp`` with a ``KEY.json`` or ``KEY.txt`` of the same key beside it.

Shards are read where they lie: a clip is its shard, an offset and a length. The json is ``{"file_name", "text", "group"}``, as we write
it, or ``{"caption"}``, as others do; all of it may be absent. Nothing else in a tar is looked into, and nothing is ever extracted.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tarfile
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc

from rdtf_ds.data.clips.places import open_regular, relative_name, unreadable
from rdtf_ds.data.sources.captions import CLIP_SUFFIXES, MAX_TEXT_BYTES, group_of, text_of
from rdtf_ds.data.sources.listing import LISTING, WHOLE_FILE, RowBuffer
from rdtf_ds.data.sources.tar import BLOCK, PACKED_SUFFIXES, PackedTarError, TarError, TarMember, TarWalk
from rdtf_ds.errors import UserError

MAX_CLIP_BYTES = 8 * 2**30 - 1
"""The most that a ustar header can say of a member: eleven octal digits."""
_TARS = (".tar", *PACKED_SUFFIXES)
_MEMBERS = pa.schema(
    [*((name, pa.string()) for name in ("name", "stem", "key")), ("offset", pa.int64()), ("size", pa.int64()), ("fault", pa.string())]
)
_NOTES = pa.schema([(name, pa.string()) for name in ("stem", "file_name", "text", "group", "fault")])


def list_shard(path: Path, name: str) -> pa.Table:
    """The clips of one shard, in the order they lie in it.

    A clip is called what its json says (``file_name``), else ``NAME/MEMBER``. What can be no clip has a row with the fault: links, devices,
    tars in the tar, names that leave the folder; if the tar cannot be followed to its end, one row tells of the rest.

    Args:
        name: of the shard, relative to the data folder.
    Returns:
        Rows of `LISTING`.
    Raises:
        ClipError: The file is not a regular one, or cannot be read.
    """
    descriptor = open_regular(path)
    try:
        status = os.fstat(descriptor)
        members, documents, texts, end = _walk(TarWalk(descriptor, status.st_size))
    except OSError as error:
        raise unreadable(path, error) from error
    finally:
        os.close(descriptor)
    notes, lines = _beside(members, documents), _beside(members, texts)
    fault = pc.coalesce(members["fault"], notes["fault"], lines["fault"])
    own_name = pc.binary_join_element_wise(name, members["name"], "/")
    columns = {
        "path": pc.if_else(pc.is_valid(fault), own_name, pc.coalesce(notes["file_name"], own_name)),
        "file": pa.DictionaryArray.from_arrays(pa.array([0] * len(members), pa.int32()), [name]),
        "offset": members["offset"],
        "length": members["size"],
        "size": members["size"],
        "mtime_ns": pa.array([status.st_mtime_ns] * len(members), pa.int64()),
        "caption": pc.coalesce(notes["text"], lines["text"], ""),
        "group": notes["group"],
        "fault": fault,
    }
    table = pa.table([columns[field.name] for field in LISTING], schema=LISTING)
    if end is None:
        return table
    rest = RowBuffer(LISTING)
    rest.add(name, None, 0, WHOLE_FILE, status.st_size, status.st_mtime_ns, "", None, end)
    return pa.concat_tables([table, rest.table()])


def _walk(tar: TarWalk) -> tuple[pa.Table, pa.Table, pa.Table, str | None]:
    """The clips and faults of a tar, its json and txt members, and why it could not be followed to its end."""
    members, documents, texts = RowBuffer(_MEMBERS), RowBuffer(_NOTES), RowBuffer(_NOTES)
    end = None
    try:
        for member in tar.members():
            name, fault = _judge(member)
            if member.kind == "folder" or (fault is None and (name.startswith(".") or "/." in name)):
                continue  # hidden members are left out, as hidden files are
            stem, suffix = os.path.splitext(name)
            suffix = suffix.lower()
            if fault is not None or suffix in CLIP_SUFFIXES:
                members.add(name, stem, _webdataset_key(name), member.offset, member.size, fault)
            elif suffix in (".json", ".txt"):
                notes, read = (documents, _read_json) if suffix == ".json" else (texts, _read_text)
                try:
                    if member.size > MAX_TEXT_BYTES:
                        raise ValueError(f"is longer than {MAX_TEXT_BYTES} bytes")
                    notes.add(stem, *read(tar.read(member.offset, member.size)), None)
                except ValueError as error:
                    notes.add(stem, None, None, None, f"its {suffix[1:]} {error}")
    except PackedTarError as error:
        end = str(error)
    except TarError as error:
        end = f"{error}; nothing is read from there on"
    return members.table(), documents.table(), texts.table(), end


def _judge(member: TarMember) -> tuple[str, str | None]:
    """A member's name as it may be shown and stored, and what speaks against reading it."""
    name = relative_name(member.name)
    if name is None:
        shown = member.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace").replace("\0", "\\0")
        unwritable = any("\udc80" <= character <= "\udcff" for character in member.name)
        return shown, "its name is not UTF-8" if unwritable else "its name leaves the tar: it is absolute, empty or has '..' in it"
    if member.kind not in ("file", "folder"):
        return name, f"is a {member.kind} in a tar, which is not followed. Pack files themselves"
    if member.kind == "file" and name.lower().endswith(_TARS):
        return name, "a tar inside of a tar is not opened"
    return name, None


def _webdataset_key(name: str) -> str:
    """WebDataset's own rule: all up to the first dot of the last part. ``000.left.webp`` belongs to ``000.json``."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def _read_json(data: bytes) -> tuple[str | None, str | None, str | None]:
    """file_name, text, group. ValueError: it goes on after "its json"."""
    try:
        row = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError("is not JSON") from error
    if not isinstance(row, dict):
        raise ValueError("is not a JSON object")
    try:
        file_name, text, group = row.get("file_name"), text_of(row, "text", "caption"), group_of(row)
    except ValueError as error:
        raise ValueError(f"does not fit: {error}") from error
    if file_name is not None:
        if not isinstance(file_name, str) or (inside := relative_name(file_name)) is None:
            raise ValueError("has a file_name that leaves the folder: it is absolute, empty or has '..' in it")
        file_name = inside
    return file_name, text, group


def _read_text(data: bytes) -> tuple[None, str, None]:
    try:
        return None, data.decode("utf-8-sig").strip(), None
    except UnicodeDecodeError as error:
        raise ValueError("is not UTF-8 text") from error


def _beside(members: pa.Table, notes: pa.Table) -> pa.Table:
    """The note of each member, aligned with them: of its own stem, else of its WebDataset key; nulls where there is none."""
    stems = notes["stem"].combine_chunks()
    found = pc.coalesce(*(pc.index_in(members[column], value_set=stems) for column in ("stem", "key")))
    return notes.take(found)


class ShardWriter:
    """Writes clips into shards ``OUT/000000.tar``, ``OUT/000001.tar``, ...: the same clips in the same order make the same bytes.

    The folder appears under its name when it is complete, and not at all otherwise. Use it as a context, or call `close`.

    Args:
        out: Folder to be made; it may be there if it is empty.
        max_bytes: A shard is closed before the clip that would take it beyond; a clip larger than that has a shard of its own.
    Raises:
        UserError: There is something in ``out``, it is a mount point or ``.``, or another process is writing it.
    """

    def __init__(self, out: str | Path, max_bytes: int) -> None:
        self._out, self._max_bytes = Path(os.path.realpath(out)), max_bytes  # a link stays, and leads to the shards
        if os.path.lexists(self._out) and (not self._out.is_dir() or any(self._out.iterdir())):
            raise UserError(f"'{out}' is there already. Name a new folder for the shards, or take that one away.")
        if os.path.ismount(self._out) or not Path(out).name:  # the one cannot be replaced, the other is where somebody stands
            raise UserError(f"'{out}' cannot be replaced by the folder that is written. Name a new folder, say '{Path(out) / 'shards'}'.")
        self._partial = self._out.with_name(f".{self._out.name}.partial")
        self._partial.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self._partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise UserError(f"'{out}' is being written by another process. Wait for it, or name another folder.") from error
        for left in self._partial.iterdir():  # by a process that was killed
            left.unlink()
        self._shards: list[str] = []
        self._clips = self._bytes = 0
        self._file: IO[bytes] | None = None
        self._closed = False

    def add(self, path: str, data: bytes, caption: str, group: str | None = None, suffix: str | None = None) -> None:
        """Append a clip.

        Args:
            path: What it is to be called; unique, relative, ends in a suffix of clips if no ``suffix`` is given.
            suffix: Of the member; None: that of ``path``.
        Raises:
            ValueError: ``path`` or ``suffix`` may not be used.
        """
        suffix = PurePosixPath(path).suffix.lower() if suffix is None else suffix
        if relative_name(path) != path or suffix not in CLIP_SUFFIXES:
            raise ValueError(f"'{path}' cannot name a clip: a relative path that ends in one of {', '.join(CLIP_SUFFIXES)} does")
        row: dict[str, Any] = {"file_name": path}
        if caption:
            row["text"] = caption
        if group is not None:
            row["group"] = group
        document = json.dumps(row, ensure_ascii=False).encode()
        key = f"{self._clips:09d}"
        member = _tar_member(f"{key}.json", document) + _tar_member(f"{key}{suffix}", data)
        if self._file is not None and self._bytes + len(member) + 2 * BLOCK > self._max_bytes:
            self._finish_shard()
        if self._file is None:
            name = f"{len(self._shards):06d}.tar"
            self._file, self._bytes = open(self._partial / name, "xb"), 0  # noqa: SIM115  closed with the shard
            self._shards.append(name)
        self._file.write(member)
        self._bytes += len(member)
        self._clips += 1

    def close(self) -> list[Path]:
        """Finish, and put the folder under its name.

        Returns:
            The shards, in order.
        """
        if not self._closed:
            self._finish_shard()
            os.fsync(self._lock)
            self._partial.rename(self._out)
            os.close(self._lock)
            self._closed = True
        return [self._out / name for name in self._shards]

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        elif not self._closed:
            if self._file is not None:
                self._file.close()
            shutil.rmtree(self._partial)
            os.close(self._lock)
            self._closed = True

    def _finish_shard(self) -> None:
        if self._file is None:
            return
        self._file.write(bytes(2 * BLOCK))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None


def _tar_member(name: str, data: bytes) -> bytes:
    header = tarfile.TarInfo(name)  # owner, times and mode are constants
    header.size = len(data)
    return header.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK)
