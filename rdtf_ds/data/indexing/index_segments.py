"""Rows of examined clips and the features of their frames, written in pieces that are never changed again.

An index folder holds, for each way of examining (`IndexSettings.row_identity`)::

    rows-<row identity>/000001.arrow   rows of some hundred clips, as `EXAMINED` has them
    rows-<row identity>/000001.bin     features of their frames: one after the other, F × D numbers each

The ``.bin`` is on the disk before the ``.arrow`` gets its name, so whatever kills the writer, a segment is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import logging
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from rdtf_ds.data.clips.clip import DecodeLimits
from rdtf_ds.data.clips.frame_features import THUMBNAIL_DIM, THUMBNAIL_IDENTITY

WHOLE = -1
"""In ``length``: the whole file; in ``window_first``: all its frames."""
_LAYOUT = 1  # of the two files; another one gets folders of its own

_FOUND = [
    ("file", pa.large_string()),  # where it lies, relative to the root: the clip itself, a video or a shard
    ("offset", pa.int64()),
    ("length", pa.int64()),  # WHOLE, or bytes of a member of a shard
    ("size", pa.int64()),  # with mtime_ns of the file: unchanged, it is not examined again
    ("mtime_ns", pa.int64()),
    ("window_first", pa.int32()),  # WHOLE, or the first of `window_count` frames of a longer video
    ("window_count", pa.int32()),
    ("status", pa.large_string()),
    ("reason", pa.large_string()),
    ("transient", pa.bool_()),
    ("content", pa.large_string()),  # SHA-256 in hex; empty if it could not be read
    ("file_content", pa.large_string()),  # of the first clip in the file: the same for all windows of a video
    ("format", pa.large_string()),
    ("num_frames", pa.int32()),
    ("width", pa.int32()),
    ("height", pa.int32()),
    ("has_alpha", pa.bool_()),
    ("durations_ms", pa.large_list(pa.int32())),
]
_STORED = [
    ("kept", pa.int32()),  # thinned frames: as many features
    ("features_start", pa.int64()),  # frames before it in the .bin
    ("features_crc", pa.uint32()),
]
FOUND = pa.schema(_FOUND)
"""What the examiner says of a clip; no column is ever null."""
EXAMINED = pa.schema(_FOUND + _STORED)
"""A row of a segment."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class IndexSettings:
    """What an index depends on beside the clips and their captions.

    Attributes:
        root: The folder that paths are relative to. Examined rows are its own: elsewhere, equal names may be other clips.
        manifest: Name of the one in the root that says which of its clips there are; empty: all of them.
        features: Identity of what frames are clustered by, ``dim`` numbers of type ``dtype`` a frame.
        video_clip_s: Seconds of the clips that videos are split into; None: a video is one clip.
    """

    root: Path
    limits: DecodeLimits
    background: tuple[int, int, int] = (255, 255, 255)
    features: str = THUMBNAIL_IDENTITY
    dim: int = THUMBNAIL_DIM
    dtype: str = "uint8"
    video_clip_s: float | None = None
    validation_fraction: float = 0.0
    group_pattern: str | None = None
    drop_duplicates: bool = True
    manifest: str = ""

    @property
    def row_identity(self) -> str:
        """Names what a row's own columns depend on. Not the deadline: it decides how long one waits for them."""
        limits = {name: value for name, value in asdict(self.limits).items() if name != "timeout_s"}
        root = os.path.abspath(self.root)
        return _identity(_LAYOUT, root, limits, self.background, self.features, self.dim, self.dtype, self.video_clip_s)

    @property
    def identity(self) -> str:
        """Names the whole index."""
        apart = (self.validation_fraction, self.group_pattern, self.drop_duplicates)
        return _identity(self.row_identity, self.manifest, *apart)

    def to_json(self) -> dict[str, Any]:
        """What `from_json` takes; the root as an absolute path, ``limits`` as an object."""
        return {**asdict(self), "root": os.path.abspath(self.root)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> IndexSettings:
        """Undo `to_json`. TypeError, KeyError: they are another version's."""
        replaced = {"root": Path(values["root"]), "limits": DecodeLimits(**values["limits"]), "background": tuple(values["background"])}
        return cls(**{**values, **replaced})


def _identity(*parts: Any) -> str:
    return hashlib.sha256(dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def rows_folder(folder: Path, settings: IndexSettings) -> Path:
    """Where the segments are kept."""
    return folder / f"rows-{settings.row_identity}"


def write_segment(folder: Path, settings: IndexSettings, rows: Sequence[Mapping[str, Any]], features: Sequence[np.ndarray | None]) -> int:
    """Commit the rows of some clips with the features of their frames as the next segment; one writer at a time.

    Args:
        rows: As `FOUND` has them.
        features: Of each row ``dtype`` (F, D), F the frames kept; None for a broken clip.
    Returns:
        The segment's number.
    Raises:
        ValueError: features of another shape or type, a column missing, a row that `found_table` refuses.
        OSError: as the disk says; nothing is committed then.
    """
    target = rows_folder(folder, settings)
    target.mkdir(parents=True, exist_ok=True)
    empty = np.zeros((0, settings.dim), settings.dtype)
    arrays = [empty if array is None else np.ascontiguousarray(array) for array in features]
    for array in arrays:
        if array.ndim != 2 or array.shape[1] != settings.dim or array.dtype != settings.dtype:
            raise ValueError(f"features must be {settings.dtype} (F, {settings.dim}), not {array.dtype} {array.shape}")
    kept = np.array([len(array) for array in arrays], np.int64)
    stored = {
        "kept": pa.array(kept.astype(np.int32)),
        "features_start": pa.array(np.cumsum(kept) - kept),
        "features_crc": pa.array([zlib.crc32(array.data) for array in arrays], pa.uint32()),
    }
    found = found_table(rows)
    require_no_nulls(found)
    table = pa.table({**dict(zip(FOUND.names, found.columns, strict=True)), **stored}, schema=EXAMINED)
    number = max(_numbers(target, "arrow") + _numbers(target, "bin"), default=0) + 1  # no file of a removed one is written over
    _write_durably(_part(target, number, "bin"), lambda file: file.writelines(array.data for array in arrays))
    write_table(_part(target, number, "arrow"), table)
    return number


def found_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows as `FOUND` has them. ValueError: one has a number or text that no column of it can hold."""
    try:
        return pa.Table.from_pylist(list(rows), schema=FOUND)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"it has what the index cannot hold: {error}") from error


def read_segments(folder: Path, settings: IndexSettings) -> pa.Table:
    """All rows examined so far, as `EXAMINED` has them and with their ``segment``; later rows of a clip come after earlier ones.

    A segment that cannot be read is left out with a warning: its clips are examined anew, and it is never written over.
    """
    source = rows_folder(folder, settings)
    tables = [EXAMINED.append(pa.field("segment", pa.int32())).empty_table()]
    for number in _numbers(source, "arrow"):
        path = _part(source, number, "arrow")
        try:
            rows = pa.ipc.open_file(pa.BufferReader(path.read_bytes())).read_all()
            if rows.schema != EXAMINED:
                raise ValueError("its columns are another version's")
            rows.validate(full=True)
            _check_features(_part(source, number, "bin"), rows, settings)
        except (pa.ArrowException, OSError, ValueError) as error:
            _log.warning("'%s' is damaged (%s): its clips are examined anew", path, error)
            continue
        tables.append(rows.append_column("segment", pa.array(np.full(len(rows), number, np.int32))))
    return pa.concat_tables(tables)


def read_features(folder: Path, settings: IndexSettings, segment: int, start: int, count: int, crc: int) -> np.ndarray:
    """Features of ``count`` frames from the ``start``-th of a segment: ``dtype`` (count, D).

    Raises:
        ValueError: they are not what was written.
        OSError: as the disk says.
    """
    frame_bytes = settings.dim * np.dtype(settings.dtype).itemsize
    handle = os.open(features_path(folder, settings, segment), os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.pread(handle, count * frame_bytes, start * frame_bytes)
    finally:
        os.close(handle)
    if len(data) != count * frame_bytes or zlib.crc32(data) != crc:
        raise ValueError(f"{len(data)} bytes of {count * frame_bytes}" if len(data) < count * frame_bytes else "the checksum differs")
    return np.frombuffer(data, settings.dtype).reshape(count, settings.dim)


def features_path(folder: Path, settings: IndexSettings, segment: int) -> Path:
    """The features' file of a segment."""
    return _part(rows_folder(folder, settings), segment, "bin")


def require_no_nulls(table: pa.Table) -> None:
    """Raise ValueError naming a column with a null."""
    for name, column in zip(table.column_names, table.columns, strict=True):
        if column.null_count:
            raise ValueError(f"column '{name}' has {column.null_count} nulls")


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table as one record batch in Arrow's file format, which can be mapped into memory."""
    columns = [column.combine_chunks() for column in table.columns]
    batch = pa.RecordBatch.from_arrays(columns, schema=table.schema)

    def fill(file: BinaryIO) -> None:
        """Magic, schema, the batch, and the footer that says where it lies."""
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_batch(batch)

    _write_durably(path, fill)


def _write_durably(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Write a file that is on the disk and whole when it gets its name, in the place of any other there was.

    One of the same bytes stays: over NFS, whoever has mapped it on another node is killed (SIGBUS) when it is replaced.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists() and _same_bytes(temporary, path):
            return
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _same_bytes(one: Path, other: Path) -> bool:
    if one.stat().st_size != other.stat().st_size:
        return False
    with open(one, "rb") as first, open(other, "rb") as second:
        return hashlib.file_digest(first, "sha256").digest() == hashlib.file_digest(second, "sha256").digest()


def _numbers(source: Path, suffix: str) -> list[int]:
    """Of the segments that have such a file, rising; those with an ``arrow`` are committed."""
    return sorted(int(path.stem) for path in source.glob(f"*.{suffix}") if path.stem.isdecimal())


def _part(source: Path, number: int, suffix: str) -> Path:
    return source / f"{number:06d}.{suffix}"


def _check_features(path: Path, rows: pa.Table, settings: IndexSettings) -> None:
    """Raise ValueError if the features' file has not the length that the rows imply."""
    needed = int(np.sum(rows["kept"].to_numpy(), dtype=np.int64)) * settings.dim * np.dtype(settings.dtype).itemsize
    if path.stat().st_size != needed:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes of {needed}")
