"""What lies in a data folder, as an Arrow table: a row for each clip, none of them decoded yet.

Rows are gathered piece by piece, so that of a million clips only some thousands are Python objects at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from rdtf_ds.data.clips.clip import Place

LISTING = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),  # the clip's name: unique, but only with `file` null does it say where it lies
        pa.field("file", pa.dictionary(pa.int32(), pa.string())),  # the shard it lies in; null: the file is `path`
        pa.field("offset", pa.int64(), nullable=False),  # in the shard
        pa.field("length", pa.int64(), nullable=False),  # in the shard; -1: the whole file
        pa.field("size", pa.int64(), nullable=False),  # bytes of the clip; 0 if nothing can be said
        pa.field("mtime_ns", pa.int64(), nullable=False),  # of the file it lies in
        pa.field("caption", pa.string(), nullable=False),  # "": none
        pa.field("group", pa.string()),  # as named beside the clip; null: not at all
        pa.field("fault", pa.string()),  # why it is no clip, and must not be opened; null: nothing known against it
    ]
)
WHOLE_FILE = -1
_PIECE = 1 << 14


@dataclass(frozen=True)
class Listing:
    """All clips of a data folder.

    Attributes:
        root: Folder that ``path`` and ``file`` are relative to.
        table: Rows of `LISTING`, rising by the UTF-8 bytes of ``path``.
    """

    root: Path
    table: pa.Table

    def place(self, row: int) -> Place:
        """Where the bytes of a clip lie. Rows with a fault have no such place."""
        path, file, offset, length = (self.table.column(name)[row].as_py() for name in ("path", "file", "offset", "length"))
        return Place(self.root / path) if file is None else Place(self.root / file, offset, length)


class RowBuffer:
    """Gathers rows and hands them over as one table."""

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._columns: list[list[Any]] = [[] for _ in schema]
        self._batches: list[pa.RecordBatch] = []

    def add(self, *values: Any) -> None:
        """A row: a value for each column, in order."""
        for column, value in zip(self._columns, values, strict=True):
            column.append(value)
        if len(self._columns[0]) == _PIECE:
            self._flush()

    def table(self) -> pa.Table:
        """All rows so far."""
        self._flush()
        return pa.Table.from_batches(self._batches, self._schema)

    def _flush(self) -> None:
        arrays = [pa.array(column, field.type) for column, field in zip(self._columns, self._schema, strict=True)]
        self._batches.append(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
        self._columns = [[] for _ in self._schema]


def joined(tables: Iterable[pa.Table]) -> pa.Table:
    """Tables of `LISTING` as one, whose dictionaries agree."""
    return pa.concat_tables([LISTING.empty_table(), *tables]).unify_dictionaries()
