"""Lists the clips of a data folder, whatever form it has: loose files, tar shards, both at once, or what a manifest names.

Nothing is decoded and no clip is opened. Folders are entered in order, hidden ones and links to folders are not. A clip that may not be
opened (a link, a FIFO, a device, a bad member of a shard) is a row with its fault, so that it is counted and shown. What people wrote
by hand, metadata and manifests, must be right: a wrong line is a `UserError` with its number.

Captions and groups of loose clips come from the ``metadata.jsonl`` and ``metadata.csv`` in any folder, else from a ``.txt`` of the clip's
own name beside it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rdtf_ds.data.clips.clip import ClipError
from rdtf_ds.data.clips.places import why_not_regular
from rdtf_ds.data.sources.captions import CLIP_SUFFIXES, METADATA, ROWS, read_caption_file, read_rows
from rdtf_ds.data.sources.listing import LISTING, WHOLE_FILE, Listing, RowBuffer, joined
from rdtf_ds.data.sources.shard_tables import shard_table
from rdtf_ds.data.sources.tar import PACKED_SUFFIXES
from rdtf_ds.errors import UserError
from rdtf_ds.wording import counted

MANIFESTS = (".csv", ".jsonl")
_REMEDY = "Name a folder of clips, one of .tar shards, or a manifest (.csv or .jsonl); of a run it is --data_dir (rdtf.data.data_dir)."
_NAMED_AT_MOST = 5
_LOOSE = pa.schema([*LISTING, ("sidecar", pa.bool_())])
_NOTES = pa.schema([*ROWS, ("source", pa.string())])


def list_clips(root: str | Path, cache: Path | None = None) -> Listing:
    """All clips of a folder or a manifest.

    Args:
        cache: A folder in which the member tables of shards are kept, since a set of large shards takes minutes to walk; None: walk them.
    Raises:
        UserError: There is no such folder, nothing in it that could be a clip, or its metadata or manifest is at fault.
    """
    root = Path(root)
    try:
        mode = root.stat().st_mode
    except OSError as error:
        raise UserError(f"data folder '{root}' does not exist ({error.strerror}). {_REMEDY}") from error
    if stat.S_ISDIR(mode):
        return _list_folder(root, cache)
    if root.suffix.lower() not in MANIFESTS:
        raise UserError(f"data folder '{root}' is a file, and no manifest. {_REMEDY}")
    return _list_manifest(root)


@dataclass
class _Found:
    """What a walk over a folder has found."""

    clips: RowBuffer = field(default_factory=lambda: RowBuffer(_LOOSE))
    metadata: list[Path] = field(default_factory=list)
    shards: list[str] = field(default_factory=list)
    linked: list[str] = field(default_factory=list)


def _list_folder(root: Path, cache: Path | None) -> Listing:
    found = _walk(root)
    notes = RowBuffer(_NOTES)
    for file in found.metadata:
        folder = PurePosixPath(file.parent.relative_to(root).as_posix())
        for batch in read_rows(file, demand_text=True).to_batches():
            for name, *rest in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                notes.add(_shown((folder / name).as_posix()), *rest, _shown(str(file)))
    loose = _with_captions(root, found.clips.table(), _agreed(notes.table()))
    table = _sorted(joined([loose, *(_shard(root, name, cache) for name in found.shards)]))
    if not table.num_rows:
        remedy = _REMEDY
        if found.linked:
            remedy = f"Its folder '{found.linked[0]}' is a symbolic link, which is not followed: put the folder itself in its place."
        raise UserError(f"data folder '{root}' has no clips: none of its files ends in {', '.join(CLIP_SUFFIXES)} or .tar. {remedy}")
    return Listing(root, table)


def _walk(root: Path) -> _Found:
    """Files of a folder and its sub-folders, in order of their names."""
    found = _Found()
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(root / folder) as entries:
                here = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
        except OSError as error:
            if not folder:
                raise UserError(f"data folder '{root}' cannot be read ({error.strerror}). Make it readable.") from error
            found.clips.add(*_faulty(folder, f"cannot be read: {error.strerror}"), False)
            continue
        names = {entry.name for entry in here if entry.name.endswith(".txt")}
        inner = []
        for entry in here:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir(follow_symlinks=False):
                inner.append(path)
                continue
            stem, suffix = os.path.splitext(entry.name)
            suffix = suffix.lower()
            if entry.name in METADATA:
                found.metadata.append(root / path)
            elif suffix in CLIP_SUFFIXES:
                found.clips.add(*_loose_row(path, entry), f"{stem}.txt" in names)
            elif suffix == ".tar":
                row = _loose_row(path, entry)
                if row[-1] is None:
                    found.shards.append(path)
                else:
                    found.clips.add(*row, False)
            elif unpack := next((tool for end, tool in PACKED_SUFFIXES.items() if entry.name.lower().endswith(end)), None):
                found.clips.add(*_faulty(path, f"is compressed, and shards are read where they lie. Unpack it: {unpack} FILE"), False)
            elif _leads_to_folder(entry):
                found.linked.append(path)
        folders += reversed(inner)
    return found


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle, or one to where we may not look: it hides no clips that anybody could mean
        return False


def _loose_row(path: str, entry: os.DirEntry[str]) -> tuple[object, ...]:
    """A row of `LISTING` without caption and group, which come later."""
    try:
        status = entry.stat(follow_symlinks=False)
    except OSError as error:
        return _faulty(path, f"cannot be read: {error.strerror}")
    return _file_row(path, status)


def _file_row(path: str, status: os.stat_result) -> tuple[object, ...]:
    if fault := why_not_regular(status.st_mode):
        return _faulty(path, fault)
    if not path.isascii() and _shown(path) != path:
        return _faulty(path, "its name is not UTF-8. Rename it")
    return path, None, 0, WHOLE_FILE, status.st_size, status.st_mtime_ns, "", None, None


def _faulty(path: str, fault: str) -> tuple[object, ...]:
    return _shown(path), None, 0, WHOLE_FILE, 0, 0, "", None, fault


def _shown(path: str) -> str:
    """A name that Arrow can hold: bytes that are not UTF-8 with backslashes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _with_captions(root: Path, clips: pa.Table, notes: pa.Table) -> pa.Table:
    """Lay captions and groups over loose clips: rows of `_NOTES` first, then what lies beside a clip."""
    _demand_listed(root, notes, clips["path"])
    found = notes.take(pc.index_in(clips["path"], value_set=notes["file_name"].combine_chunks()))
    needs = pc.and_(pc.and_(clips["sidecar"], pc.is_null(found["text"])), pc.is_null(clips["fault"]))
    beside = RowBuffer(pa.schema([("text", pa.string()), ("fault", pa.string())]))
    for path, read in zip(_values(clips["path"]), _values(needs), strict=True):
        beside.add(*(_sidecar(root / path) if read else (None, None)))
    texts = beside.table()
    columns = {name: clips[name] for name in LISTING.names}
    columns["caption"] = pc.coalesce(found["text"], texts["text"], "")
    columns["group"] = found["group"]
    columns["fault"] = pc.coalesce(clips["fault"], texts["fault"])
    return pa.table(list(columns.values()), schema=LISTING)


def _values(column: pa.ChunkedArray) -> Iterator[Any]:
    """As Python objects, some thousands at a time."""
    for chunk in column.chunks:
        yield from chunk.to_pylist()


def _sidecar(clip: Path) -> tuple[str | None, str | None]:
    try:
        return read_caption_file(clip.with_suffix(".txt")), None
    except ClipError as error:
        return None, f"its caption {clip.stem}.txt {error.reason}"


def _demand_listed(root: Path, notes: pa.Table, paths: pa.ChunkedArray) -> None:
    """Refuse metadata of clips that are not there, or that lie where we do not go."""
    missing = notes.filter(pc.is_null(pc.index_in(notes["file_name"], value_set=paths.combine_chunks())))
    absent: list[str] = []
    total = 0
    for name, line, source in zip(*(_values(missing[column]) for column in ("file_name", "line", "source")), strict=True):
        if PurePosixPath(name).suffix.lower() not in CLIP_SUFFIXES and os.path.lexists(root / name):
            continue  # other files may have captions too; they are nothing to us
        total += 1
        if len(absent) < _NAMED_AT_MOST:
            reason = " lies in a hidden or linked folder, which is not entered" if os.path.lexists(root / name) else ""
            absent.append(f"'{name}'{reason} ({source}:{line})")
    _refuse_absent(absent, total, root)


def _refuse_absent(absent: list[str], total: int, root: Path) -> None:
    if total:
        more = f" and {total - len(absent)} more" if total > len(absent) else ""
        said = f"{counted(total, 'file')} {'is' if total == 1 else 'are'} named by metadata and absent from '{root}'"
        raise UserError(
            f"{said}: {', '.join(absent)}{more}. Add the files, or take their lines out; of a linked folder, put the folder itself there."
        )


def _agreed(notes: pa.Table) -> pa.Table:
    """Rows of `_NOTES` with each clip once.

    Raises:
        UserError: Two rows say different things of one clip.
    """
    names = notes["file_name"].combine_chunks()
    first, repeated = _repeated(names)
    if not repeated.true_count:
        return notes
    both = zip(notes.filter(repeated).to_pylist(), notes.take(first.filter(repeated)).to_pylist(), strict=True)
    for later, earlier in both:
        for key, kind in (("text", "captions"), ("group", "groups")):
            if later[key] != earlier[key]:
                places = " and ".join(f"{row['source']}:{row['line']}" for row in (later, earlier))
                raise UserError(f"{places} give '{later['file_name']}' different {kind}. Keep one of them.")
    return notes.filter(pc.invert(repeated))


def _repeated(names: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Of each name the position where it stands first, and whether that is an earlier one."""
    first = pc.index_in(names, value_set=names)
    return first, pc.not_equal(first, pa.array(np.arange(len(names), dtype=np.int32)))


def _list_manifest(manifest: Path) -> Listing:
    root = manifest.parent
    rows = read_rows(manifest, demand_text=False)
    notes = _agreed(rows.append_column("source", pa.array([_shown(str(manifest))] * len(rows), pa.string())))
    clips = RowBuffer(LISTING)
    inside: dict[str, bool] = {}
    home = os.path.realpath(root)
    absent: list[str] = []
    total = 0
    for name, text, group, line in zip(*(_values(notes[column]) for column in ROWS.names), strict=True):
        folder = os.path.dirname(name)
        if folder not in inside:
            inside[folder] = os.path.commonpath([home, os.path.realpath(root / folder)]) == home
        if not inside[folder]:
            raise UserError(
                f"{manifest}:{line}: file_name '{name}' leaves its folder, by a link in '{folder}'. "
                f"Put the clips below '{root}' themselves, or the manifest beside them."
            )
        try:
            status = os.lstat(root / name)
        except OSError:
            total += 1
            if len(absent) < _NAMED_AT_MOST:
                absent.append(f"'{name}' ({manifest}:{line})")
            continue
        row = _file_row(name, status)
        if row[-1] is None and PurePosixPath(name).suffix.lower() not in CLIP_SUFFIXES:
            row = _faulty(name, f"is no clip by its name: it ends in none of {', '.join(CLIP_SUFFIXES)}")
        fault = row[-1]
        if text is None and fault is None and os.path.lexists((root / name).with_suffix(".txt")):
            text, fault = _sidecar(root / name)
        clips.add(*row[:6], text or "", group, fault)
    _refuse_absent(absent, total, root)
    table = _sorted(clips.table())
    if not table.num_rows:
        raise UserError(f"manifest '{manifest}' names no clips. Each row needs a file_name; text and group may be there.")
    return Listing(root, table)


def _shard(root: Path, name: str, cache: Path | None) -> pa.Table:
    fault = "its name is not UTF-8. Rename it"
    if _shown(name) == name:
        try:
            return shard_table(root, name, cache)
        except ClipError as error:
            fault = error.reason
    row = RowBuffer(LISTING)
    row.add(*_faulty(name, fault))
    return row.table()


def _sorted(table: pa.Table) -> pa.Table:
    """In order of path, each path once.

    A clip that claims the name of an earlier one is at fault, and called by where it lies. Loose clips are earlier than those in shards,
    and shards come as they are met, their members by offset.
    """
    while True:
        paths = table["path"].combine_chunks()
        _, repeated = _repeated(paths)
        if not repeated.true_count:
            return table.take(pc.sort_indices(paths))
        file = pc.coalesce(table["file"].cast(pa.string()), "")
        place = pc.binary_join_element_wise(paths, file, table["offset"].cast(pa.string()), "@")
        fault = pc.coalesce(table["fault"], pc.binary_join_element_wise("has the same name as another clip:", paths, " "))
        table = table.set_column(0, LISTING.field("path"), pc.if_else(repeated, place, paths))
        table = table.set_column(len(LISTING) - 1, LISTING.field("fault"), pc.if_else(repeated, fault, table["fault"]))
