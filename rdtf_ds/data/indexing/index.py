"""The index of the clips: a view of a table in a file, which costs the same to open and to hold whatever the number of clips.

`index_building.build_index` makes the table, `index_table` knows its layout. Nothing here keeps a Python object a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from rdtf_ds.data.clips.clip import Place, Window
from rdtf_ds.data.clips.frame_features import as_float
from rdtf_ds.data.indexing.index_segments import WHOLE, IndexSettings, features_path, read_features
from rdtf_ds.data.indexing.index_table import (
    BROKEN,
    DUPLICATE,
    FAULTY,
    HELD_OUT,
    NO_CLIP,
    STATIC,
    TRAINABLE,
    TRAINED_ON,
    MappedTable,
    index_path,
)
from rdtf_ds.data.indexing.problem import Problem
from rdtf_ds.errors import UserError
from rdtf_ds.wording import counted

__all__ = ["BROKEN", "STATIC", "TRAINABLE", "ClipIndex", "ClipRow", "open_index"]

_BATCH = 1024
_ROW_COLUMNS = (
    "path", "caption", "format", "num_frames", "width", "height", "status", "reason", "content", "kept", "durations_ms", "has_alpha",
    "group", "held_out", "duplicate_of", "window_first",
)  # fmt: skip
_WHERE_IT_LIES = ["file", "offset", "length", "mtime_ns", "segment", "features_start"]


@dataclass(frozen=True, slots=True)
class ClipRow:
    """One clip.

    Attributes:
        clip_id: position in the index.
        path: names the clip: relative to the data folder, with ``/`` between folders; of a window ``VIDEO#0000`` and so on.
        caption: empty if there is none.
        format: gif, webp, png, webm or mp4, told by content; empty if broken.
        num_frames: in the file or window; 0 if broken. ``width`` and ``height`` likewise.
        status: "trainable", "static" (fewer than 3 frames) or "broken".
        reason: why it is broken, else empty.
        content: SHA-256 of its bytes in hex, of a window over the video's; empty if they could not be read.
        kept: frames after thinning.
        durations_ms: of its frames, before thinning.
        group: clips that stand on the same side of the split.
        held_out: from training, for validation.
        duplicate_of: id of the equal clip that is used in its place.
        first_frame: of a window of a longer video; None: the clip is a file of its own.
    """

    clip_id: int
    path: str
    caption: str
    format: str
    num_frames: int
    width: int
    height: int
    status: str
    reason: str
    content: str
    kept: int
    durations_ms: tuple[int, ...]
    has_alpha: bool
    group: str
    held_out: bool
    duplicate_of: int | None
    first_frame: int | None


class ClipIndex:
    """All clips of a data folder, sorted by path; ids are positions.

    Pickled, it is the name of its file, which is opened again.

    Args:
        folder: the index is kept in.
        identity: of its settings.
        broken: clips found broken since, by id, with the reason.

    Attributes:
        root: the folder that paths are relative to.
        source: what was indexed, as ``rdtf.data.data_dir`` names it: the manifest, else the folder.
        settings: the index was made with.

    Raises:
        UserError: the file is absent or damaged.
    """

    def __init__(self, folder: Path, identity: str, broken: Mapping[int, str] | None = None) -> None:
        self.folder, self.identity = folder, identity
        self._table = MappedTable(index_path(folder, identity))
        self._broken = dict(sorted((broken or {}).items()))
        self.settings: IndexSettings = self._table.settings
        self.root = self.settings.root
        self.source = self.root / self.settings.manifest  # "" leaves the folder

    @property
    def rows(self) -> Sequence[ClipRow]:
        """Every clip, made when asked for; ``rows[i].clip_id == i``."""
        return _Rows(self._table, self._broken)

    @cached_property
    def trainable(self) -> np.ndarray:
        """Ids of the clips to train on, int64, rising: at least 3 frames, not held out, no duplicate."""
        return self._ids(TRAINED_ON)

    @cached_property
    def held_out(self) -> np.ndarray:
        """Ids of the clips held out from training, int64, rising: at least 3 frames, no duplicate."""
        return self._ids(HELD_OUT)

    @cached_property
    def duplicates(self) -> np.ndarray:
        """Ids of the clips that an equal one is used in place of, int64, rising."""
        return self._ids(DUPLICATE)

    @cached_property
    def frame_counts(self) -> np.ndarray:
        """Kept (thinned) frames of each clip of ``trainable``, int64, aligned with it."""
        counts: np.ndarray = self._table.numbers("kept")[self.trainable].astype(np.int64)
        self._table.release()
        return counts

    @property
    def fingerprint(self) -> str:
        """SHA-256 over what training sees: path, content, window, kept frames and caption of each trainable clip, and what features are."""
        stored = str(self._table.header["fingerprint"])
        gone = [clip_id for clip_id in self._broken if self._use(clip_id) == TRAINED_ON]
        if not gone:
            return stored
        return hashlib.sha256("\n".join([stored, *(self._value("path", clip_id) for clip_id in gone)]).encode()).hexdigest()

    @property
    def problems(self) -> Iterator[Problem]:
        """The broken clips, for the quarantine."""
        broken = np.flatnonzero(self._table.numbers("use") == FAULTY)
        self._table.release()
        for clip_id in np.union1d(broken, np.array(list(self._broken), np.int64)).tolist():
            reason = self._broken[clip_id] if clip_id in self._broken else self._value("reason", clip_id)
            yield Problem(self.path(clip_id), reason, content=self.content(clip_id))

    def counts(self) -> dict[str, int]:
        """Clips in all; of these trained on, static, broken, held out, duplicates; and trained on without a caption."""
        counts = dict(self._table.header["counts"])
        names = {TRAINED_ON: "trainable", HELD_OUT: "held_out", DUPLICATE: "duplicates"}
        for clip_id in self._broken:
            use, status = self._use(clip_id), self._value("status", clip_id)
            counts[names.get(use, status)] -= 1
            counts["broken"] += 1
            counts["without_caption"] -= use == TRAINED_ON and not self.caption(clip_id)
        return counts

    def summary(self) -> str:
        """One line for people."""
        counts, formats, spread = self.counts(), dict(self._table.header["formats"]), self._table.header["frames"]
        if self._broken:
            for clip_id in self._broken:
                if self._use(clip_id) == TRAINED_ON:
                    formats[self._value("format", clip_id)] -= 1
            frames = self.frame_counts
            spread = [int(frames.min()), int(np.median(frames)), int(frames.max())] if len(frames) else []
        kinds = sorted(((number, name) for name, number in formats.items() if number), key=lambda kind: (-kind[0], kind[1]))
        text = ", ".join(f"{number} {name}" for number, name in kinds) or "none"
        if spread:
            text += f", {spread[0]} to {spread[2]} frames, median {spread[1]}"
        held_out = f"{counts['held_out']} held out, " if counts["held_out"] else ""
        duplicates = f"{counted(counts['duplicates'], 'duplicate')}, " if counts["duplicates"] else ""
        return (
            f"{counted(counts['files'], 'clip')} in '{self.source}': {counts['trainable']} to train on ({text}), {held_out}{duplicates}"
            f"{counts['static']} static, {counts['broken']} broken, {counts['without_caption']} without a caption"
        )

    def place(self, clip_id: int) -> Place:
        """Where the clip's bytes lie."""
        length = self._value("length", clip_id)
        offset = self._value("offset", clip_id)
        return Place(self.root / self._value("file", clip_id), offset, None if length == WHOLE else length)

    def window(self, clip_id: int) -> Window | None:
        """Which frames of the file are the clip; None: all."""
        first = self._value("window_first", clip_id)
        return None if first == WHOLE else Window(first, self._value("window_count", clip_id))

    def caption(self, clip_id: int) -> str:
        """Empty if there is none."""
        return str(self._value("caption", clip_id))

    def content(self, clip_id: int) -> str:
        """SHA-256 of the clip in hex, as `ClipRow` has it."""
        return str(self._value("content", clip_id))

    def path(self, clip_id: int) -> str:
        """The clip's name, as `ClipRow` has it."""
        return str(self._value("path", clip_id))

    def file_paths(self) -> Iterator[str]:
        """The path of each clip's file, in the order of the clips; windows have their video's."""
        for part in self.parts("path", "window_first"):
            for path, first in zip(*(column.to_pylist() for column in part.columns), strict=True):
                yield path if first == WHOLE else path.rpartition("#")[0]

    def frame_features(self, clip_id: int) -> np.ndarray:
        """What the clip's kept frames are clustered by: float32 (F, D).

        Raises:
            UserError: they are not what was stored.
        """
        segment, start, kept, crc = (self._value(name, clip_id) for name in ("segment", "features_start", "kept", "features_crc"))
        try:
            return as_float(read_features(self.folder, self.settings, segment, start, kept, crc))
        except (ValueError, OSError) as error:
            path = features_path(self.folder, self.settings, segment)
            raise UserError(
                f"the stored features of clip '{self.path(clip_id)}' are damaged: '{path}': {error}. Remove "
                f"'{path.with_suffix('.arrow')}' and start again (or run tools/index_data.py): its clips are then examined anew."
            ) from error

    def columns(self, *names: str) -> pa.RecordBatch:
        """Columns of `index_table.INDEX`, a row a clip, on the file itself; what `without` said is not among it."""
        return self._table.batch.select(list(names))

    def parts(self, *names: str) -> Iterator[pa.RecordBatch]:
        """The same, a thousand rows at a time, checked; the pages of those that were read are given back.

        Raises:
            UserError: they are damaged.
        """
        for start in range(0, len(self._table), _BATCH):
            yield self._table.rows(start, _BATCH, list(names))
            self._table.release()

    def without(self, broken: Mapping[int, str]) -> ClipIndex:
        """The same index with some more clips broken: by id, with the reason.

        Raises:
            UserError: another one took the place of its file meanwhile, in which ids name other clips.
        """
        return open_index(self.folder, self.identity, self._table.header["fingerprint"], {**self._broken, **broken}, self._table.numbering)

    def __eq__(self, other: object) -> bool:
        """Whether the same is known of the same clips, wherever it is kept and whenever it was found out."""
        if not isinstance(other, ClipIndex):
            return NotImplemented
        ours, theirs = (index._table.batch.drop_columns(_WHERE_IT_LIES) for index in (self, other))
        same = self.root == other.root and self._broken == other._broken and ours.equals(theirs)
        self._table.release()
        other._table.release()
        return bool(same)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return open_index, (self.folder, self.identity, self._table.header["fingerprint"], self._broken, self._table.numbering)

    def _value(self, column: str, clip_id: int) -> Any:
        return self._table.value(column, int(clip_id))

    def _use(self, clip_id: int) -> int:
        return int(self._value("use", clip_id))

    def _ids(self, use: int) -> np.ndarray:
        ids = np.flatnonzero(self._table.numbers("use") == use)
        self._table.release()
        return np.setdiff1d(ids, np.array(list(self._broken), np.int64), assume_unique=True) if self._broken else ids


def open_index(
    folder: Path, identity: str, fingerprint: str | None = None, broken: Mapping[int, str] | None = None, numbering: str | None = None
) -> ClipIndex:
    """The index of these settings (`IndexSettings.identity`) that is kept in a folder.

    Args:
        fingerprint: what it was written with (`index_table.write_index`); None: any will do.
        broken: as `ClipIndex` takes it.
        numbering: `MappedTable.numbering` of the one that ids are of; None: any will do.

    Raises:
        UserError: there is none, it is damaged, or it is not the one of that fingerprint or numbering.
    """
    index = ClipIndex(Path(folder), identity, broken)
    found = index._table.header["fingerprint"]
    if fingerprint not in (None, found) or numbering not in (None, index._table.numbering):
        told = f"fingerprint {found}, not {fingerprint}"
        other = told if fingerprint not in (None, found) else f"fingerprint {found}, but its rows are numbered otherwise"
        raise UserError(
            f"index '{index_path(folder, identity)}' was made anew by another run, of other clips, while this one was starting ({other}). "
            f"Start again, or give each run an index of its own (rdtf.data.index_dir)."
        )
    return index


class _Rows(Sequence[ClipRow]):
    """Rows of a table, made when they are asked for."""

    def __init__(self, table: MappedTable, broken: Mapping[int, str]) -> None:
        self._table, self._broken = table, broken

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, at: int) -> ClipRow: ...

    @overload
    def __getitem__(self, at: slice) -> list[ClipRow]: ...

    def __getitem__(self, at: int | slice) -> ClipRow | list[ClipRow]:
        numbers = range(len(self))[at]
        if isinstance(numbers, range):
            return [self[number] for number in numbers]
        return next(self._made(numbers, 1))

    def __iter__(self) -> Iterator[ClipRow]:
        for start in range(0, len(self), _BATCH):
            yield from self._made(start, _BATCH)

    def _made(self, start: int, count: int) -> Iterator[ClipRow]:
        values = self._table.rows(start, count, list(_ROW_COLUMNS)).to_pylist()
        self._table.release()
        for clip_id, row in enumerate(values, start):
            first, original = row.pop("window_first"), row["duplicate_of"]
            row["durations_ms"] = tuple(row["durations_ms"])
            row["duplicate_of"] = None if original == NO_CLIP else original
            if clip_id in self._broken:
                row |= {"status": BROKEN, "reason": self._broken[clip_id]}
            yield ClipRow(clip_id, **row, first_frame=None if first == WHOLE else first)
