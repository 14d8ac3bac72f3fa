"""The index of a data folder as it lies on the disk: one Arrow file of a row a clip, mapped into memory and never read as a whole.

``INDEX_DIR/index-<identity>.arrow`` is one record batch with a row for each clip, in the order of their paths. What is known of all
clips together (counts, fingerprint) stands in the file's header, so that opening costs the same whatever their number.

Pages of a mapped file count as a process's memory for as long as they are mapped. So the reader drops them after every few reads; the
system's cache keeps them.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import zlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rdtf_ds.data.indexing.index_segments import EXAMINED, IndexSettings, require_no_nulls, write_table
from rdtf_ds.errors import UserError

TRAINABLE, STATIC, BROKEN = "trainable", "static", "broken"
NO_CLIP = -1
"""In ``duplicate_of``: it stands for itself."""

INDEX = pa.schema(
    [
        ("path", pa.large_string()),  # names the clip; the windows of a video are VIDEO#0000 and so on
        ("caption", pa.large_string()),
        ("group", pa.large_string()),
        ("held_out", pa.bool_()),
        ("duplicate_of", pa.int32()),  # row of the clip that is used in its place
        *EXAMINED,
        ("segment", pa.int32()),
        ("use", pa.uint8()),  # one of the below
    ]
)
"""A row of the index."""
TRAINED_ON, HELD_OUT, DUPLICATE, STILL, FAULTY = range(5)

_FORMAT = 1
_HEADER, _CHECKSUM = b"rdtf_index", b"rdtf_index_crc32"
_SEEN_IN_TRAINING = ("path", "content", "window_first", "window_count", "kept", "caption")
_READS_KEPT = 16  # about 3 MB each, as a fault maps the pages around it, too


def index_path(folder: Path, identity: str) -> Path:
    """Where the index of these settings is kept."""
    return folder / f"index-{identity}.arrow"


def write_index(folder: Path, settings: IndexSettings, table: pa.Table) -> str:
    """Put an index in its place. Whoever has mapped an earlier one goes on reading that; an equal one is left where it is.

    Args:
        table: The columns of `INDEX` without ``use``, in any order, of one row a clip, sorted by path and first frame.
    Returns:
        Its fingerprint.
    Raises:
        ValueError: a column is missing or has nulls.
        OSError: as the disk says; an earlier index is still there then.
    """
    missing = set(INDEX.names) - {"use"} - set(table.column_names)
    if missing:
        raise ValueError(f"the table lacks {', '.join(sorted(missing))}")
    table = table.select([name for name in INDEX.names if name != "use"])
    require_no_nulls(table)
    table = table.append_column("use", _uses(table)).cast(INDEX)
    header = {"format": _FORMAT, "settings": settings.to_json(), **_overview(table, settings)}
    path = index_path(folder, settings.identity)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(header).encode()
    write_table(path, table.replace_schema_metadata({_HEADER: text, _CHECKSUM: str(zlib.crc32(text)).encode()}))
    return str(header["fingerprint"])


class MappedTable:
    """An index file in memory without being read.

    Attributes:
        batch: All rows; its columns and NumPy views of them copy nothing.
        header: What `write_index` said of all rows: ``counts``, ``formats``, ``frames``, ``fingerprint``.
        settings: The index was made with.

    Raises:
        UserError: the file is absent, damaged or another version's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            reader = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(self._map)))
            metadata = reader.schema.metadata or {}
            header = json.loads(metadata[_HEADER])
            if zlib.crc32(metadata[_HEADER]) != int(metadata[_CHECKSUM]):
                raise ValueError("the checksum of its header differs")
            if header["format"] != _FORMAT:
                raise UserError(f"index '{path}' has format {header['format']}, this version reads {_FORMAT}. {_remedy(path)}")
            self.batch = reader.get_batch(0)
            self.batch.validate()
            self.settings = IndexSettings.from_json(header["settings"])
            if self.batch.schema.remove_metadata() != INDEX or self.batch.num_rows != header["counts"]["files"]:
                raise ValueError("its rows are not what its header says")
        except FileNotFoundError:
            raise UserError(
                f"there is no index '{path}'. tools/index_data.py makes it, and so does a run, on one node for all: the folder "
                f"(rdtf.data.index_dir, else rdtf.output_dir) must be the same on every node."
            ) from None
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"index '{path}' is damaged ({type(error).__name__}: {error}). {_remedy(path)}") from error
        self.header: Mapping[str, Any] = header
        self._reads = 0

    def __len__(self) -> int:
        return int(self.batch.num_rows)

    @cached_property
    def numbering(self) -> str:
        """CRC-32 over what each row is good for. The fingerprint leaves out what is not trained on; with one more such clip, say a broken
        file that was added, the rows after it have other numbers."""
        value = f"{zlib.crc32(self.numbers('use').tobytes()):08x}"
        self.release()
        return value

    def numbers(self, column: str) -> np.ndarray:
        """A column of numbers, on the file itself. Drop it soon, and call `release`."""
        return np.asarray(self.batch.column(column).to_numpy())

    def value(self, column: str, row: int) -> Any:
        """One entry. IndexError if there is no such row."""
        if not 0 <= row < len(self):
            raise IndexError(f"the index has {len(self)} rows; there is no row {row}")
        self._reads += 1
        if self._reads % _READS_KEPT == 0:
            self.release()
        return self.rows(row, 1, [column]).column(0)[0].as_py()

    def rows(self, start: int, count: int, columns: list[str]) -> pa.RecordBatch:
        """Some rows of some columns, checked: damage within the file must not lead a reader out of it.

        Raises:
            UserError: they are damaged.
        """
        part = self.batch.select(columns).slice(start, count)
        try:
            part.validate(full=True)
        except pa.ArrowException as error:
            raise UserError(f"index '{self.path}' is damaged ({error}). {_remedy(self.path)}") from error
        return part

    def release(self) -> None:
        """Give the pages that were touched back to the system; they are fetched again when needed."""
        self._map.madvise(mmap.MADV_DONTNEED)


def _remedy(path: Path) -> str:
    return f"Remove '{path.name}' in '{path.parent}' and start again: clips that were examined are not examined again."


def _uses(table: pa.Table) -> pa.Array:
    """What each clip is good for."""
    stands = pc.equal(table["duplicate_of"], NO_CLIP)
    use = pc.if_else(stands, pc.if_else(table["held_out"], HELD_OUT, TRAINED_ON), DUPLICATE)
    use = pc.if_else(pc.equal(table["status"], STATIC), STILL, use)
    return pc.if_else(pc.equal(table["status"], BROKEN), FAULTY, use).combine_chunks().cast(pa.uint8())


def _overview(table: pa.Table, settings: IndexSettings) -> dict[str, Any]:
    """What is said of all clips together."""
    trained_on = table.select([*_SEEN_IN_TRAINING, "format"]).filter(pc.equal(table["use"], TRAINED_ON))
    uses = np.bincount(table["use"].to_numpy(), minlength=5)
    frames = trained_on["kept"].to_numpy()
    spread = [int(frames.min()), int(np.median(frames)), int(frames.max())] if len(frames) else []
    counts = {
        "files": len(table),
        "trainable": int(uses[TRAINED_ON]),
        "static": int(uses[STILL]),
        "broken": int(uses[FAULTY]),
        "held_out": int(uses[HELD_OUT]),
        "duplicates": int(uses[DUPLICATE]),
        "without_caption": pc.sum(pc.equal(trained_on["caption"], "")).as_py() or 0,
    }
    formats = {pair["values"]: pair["counts"] for pair in trained_on["format"].value_counts().to_pylist()}
    return {"counts": counts, "formats": formats, "frames": spread, "fingerprint": _fingerprint(trained_on, settings)}


def _fingerprint(trained_on: pa.Table, settings: IndexSettings) -> str:
    """SHA-256 over what training sees of the index, however the clips are stored."""
    digest = hashlib.sha256(json.dumps([_FORMAT, settings.features, len(trained_on)]).encode())
    for name in _SEEN_IN_TRAINING:
        column = trained_on[name].combine_chunks()
        if pa.types.is_large_string(column.type):
            offsets = np.frombuffer(column.buffers()[1], np.int64)[column.offset : column.offset + len(column) + 1]
            digest.update(np.diff(offsets).tobytes())
            if len(column):
                digest.update(column.buffers()[2][offsets[0] : offsets[-1]])
        else:
            digest.update(column.to_numpy().tobytes())
    return digest.hexdigest()
