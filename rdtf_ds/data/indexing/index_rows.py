"""The rows of an index, made of what is listed and what was examined. Columns in, columns out: no Python object is made for a row.

What needs no decoding (captions, groups, the held-out side, duplicates) is laid over the examined rows at each build anew, so that
changing it examines nothing.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rdtf_ds.data.indexing.examining import UNKNOWN
from rdtf_ds.data.indexing.index_segments import EXAMINED, WHOLE, IndexSettings
from rdtf_ds.data.indexing.index_table import BROKEN, TRAINABLE
from rdtf_ds.data.indexing.splits import duplicates, group_names, held_out

KEY = ("file", "offset", "length", "size", "mtime_ns")
"""Where a clip's bytes lie and what they look like from outside: if none of it has changed, nor has the clip."""
_TEXT = pa.large_string()


def keys(listing: pa.Table) -> dict[str, pa.Array]:
    """The columns of `KEY` as examined rows have them. A clip that lies in no shard is a file of its own name."""
    file = pc.coalesce(_whole(listing["file"].cast(_TEXT)), _plain(listing["path"], _TEXT))
    return {"file": file, **{name: _plain(listing[name], EXAMINED.field(name).type) for name in KEY[1:]}}


def take_over(listing: pa.Table, examined: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Match what is listed with what was examined and has not changed since.

    Args:
        listing: As `sources.list_clips` gives it.
        examined: As `index_segments.read_segments` gives it.
    Returns:
        Two int64 vectors of equal length: numbers of clips in the listing, and of their rows in ``examined``. A video that was split has
        several, from its first window on; a clip that was examined more than once has what was found last.
    """
    openable = np.flatnonzero(~_has_fault(listing))
    left = pa.table({**keys(listing), "clip": np.arange(len(listing))}).take(openable)
    right = pa.table({**{name: examined[name] for name in KEY}, "row": np.arange(len(examined))})
    pairs = left.join(right, list(KEY), join_type="inner")
    clips, rows = pairs["clip"].to_numpy(), pairs["row"].to_numpy()
    segments = examined["segment"].to_numpy()[rows]
    newest = np.zeros(len(listing), segments.dtype)
    np.maximum.at(newest, clips, segments)
    current = segments == newest[clips]
    clips, rows = clips[current], rows[current]
    order = np.lexsort((examined["window_first"].to_numpy()[rows], clips))
    return clips[order], rows[order]


def to_examine(listing: pa.Table, clips: np.ndarray) -> np.ndarray:
    """Numbers of the listed clips beside those that were taken over and those that the listing itself refuses to open."""
    missing = ~_has_fault(listing)
    missing[clips] = False
    return np.flatnonzero(missing)


def without_transient(examined: pa.Table) -> pa.Table:
    """All but the clips that were broken for a reason that may have passed."""
    return examined.filter(pc.invert(pc.and_(pc.equal(examined["status"], BROKEN), examined["transient"])))


def lay_over(listing: pa.Table, clips: np.ndarray, rows: pa.Table, settings: IndexSettings) -> pa.Table:
    """All rows of the index as `index_table.write_index` takes them, sorted by the UTF-8 bytes of their paths.

    Args:
        clips: The number in the listing of each of ``rows``, as `take_over` orders them.
    """
    faulty = np.flatnonzero(_has_fault(listing))
    table = pa.concat_tables([rows, _fault_rows(listing.take(faulty), rows.schema)])
    clips = np.concatenate([clips, faulty])
    files = {name: _plain(listing[name], _TEXT).take(clips) for name in ("path", "caption", "group")}
    windows = table["window_first"].to_numpy()
    paths = _clip_paths(files["path"], windows, clips)
    # The listing is sorted by path, but a window's name need not stand where its video's does.
    order = np.argsort(clips, kind="stable") if (windows == WHOLE).all() else pc.sort_indices(paths)
    table, paths, files = table.take(order), paths.take(order), {name: column.take(order) for name, column in files.items()}
    groups = group_names(files["group"], files["path"], settings.group_pattern, _whole(table["file_content"]))
    usable = pc.equal(table["status"], TRAINABLE).to_numpy()
    held = held_out(groups, settings.validation_fraction) & usable
    stands_for = duplicates(_whole(table["content"]), files["caption"], usable, held, settings.drop_duplicates)
    laid = {"path": paths, "caption": files["caption"], "group": groups, "held_out": held, "duplicate_of": stands_for.astype(np.int32)}
    return pa.table({**dict(zip(table.column_names, table.columns, strict=True)), **laid})


def _has_fault(listing: pa.Table) -> np.ndarray:
    faulty: np.ndarray = pc.not_equal(_plain(listing["fault"], _TEXT), "").to_numpy(zero_copy_only=False)
    return faulty


def _fault_rows(listing: pa.Table, schema: pa.Schema) -> pa.Table:
    """Rows of what the listing refuses to open."""
    blank = {**UNKNOWN, "status": BROKEN, "kept": 0, "features_start": 0, "features_crc": 0, "segment": 0}
    columns = {name: pa.array([value] * len(listing), schema.field(name).type) for name, value in blank.items()}
    return pa.table({**columns, **keys(listing), "reason": _plain(listing["fault"], _TEXT)}, schema=schema)


def _clip_paths(paths: pa.Array, windows: np.ndarray, clips: np.ndarray) -> pa.Array:
    """A file's path, with ``#0000`` behind it for the first window of a video, and so on."""
    first = np.flatnonzero(np.diff(clips, prepend=-1))  # of each file's rows
    number = np.arange(len(clips)) - np.repeat(first, np.diff(first, append=len(clips)))
    digits = pc.utf8_lpad(pc.cast(pa.array(number), _TEXT), 4, "0")
    return pc.if_else(pa.array(windows == WHOLE), paths, pc.binary_join_element_wise(paths, digits, pa.scalar("#", _TEXT)))


def _plain(column: pa.ChunkedArray, type: pa.DataType) -> pa.Array:
    """One array of a type, from a column that may be cut up or a dictionary's; text is never null."""
    array = _whole(column if column.type == type else column.cast(type))
    return pc.fill_null(array, "") if array.null_count else array


def _whole(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks()
    return pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array
