"""Which clips belong together, which are held out from training, and which repeat another. Columns in, columns out.

A group is held out as a whole, so that variants of one sticker never stand on both sides, and by a hash of its own name, so that
clips that are added later move none that were there. Columns are Arrow arrays and NumPy vectors of one entry a clip, in the order
of the clips' paths; no Python object is kept for a row.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

NONE = -1
"""The entry of ``duplicate_of`` for a clip that repeats no other."""
_BATCH = 8192


def group_names(given: pa.Array, paths: pa.Array, pattern: str | None, files: pa.Array) -> pa.Array:
    """The group of each clip: what its data says, else what the pattern finds in its path, else the content of its file.

    Args:
        given: Names from metadata, a manifest or a shard; null or empty where there is none.
        paths: Of the clips; a split video's windows have the video's path.
        pattern: Regular expression searched in the path. Its first group is the name, or the whole match if it has no group.
        files: SHA-256 of the file each clip comes from, in hex: equal files are one group, and so are the windows of one video.
    """
    names = files if pattern is None else _or_else(_search(re.compile(pattern), paths), files)
    return _or_else(given, names)


def held_out(groups: pa.Array, fraction: float) -> np.ndarray:
    """Whether each clip's group is held out, bool: about ``fraction`` of the groups, whatever other groups there are.

    A group held out at one fraction is held out at every larger one.
    """
    if fraction <= 0:
        return np.zeros(len(groups), bool)
    encoded = groups.dictionary_encode()
    names = _texts(encoded.dictionary)
    hashes = np.fromiter((_hash(name) for name in names), np.uint64, len(encoded.dictionary))
    chosen: np.ndarray = hashes < np.uint64(min(fraction, 1.0) * 2**63)
    held: np.ndarray = chosen[encoded.indices.to_numpy()]
    return held


def duplicates(content: pa.Array, captions: pa.Array, usable: np.ndarray, held: np.ndarray, drop: bool) -> np.ndarray:
    """The clip that stands for each one instead of it, int64, ``NONE`` where it stands for itself.

    A clip that is trained on must not be among the held-out ones under another name: whatever its caption, it gives way to them.
    Beyond that, of the clips of one side with equal content and caption, the first stands for all.

    Args:
        content: SHA-256 of each clip.
        usable: bool; the others neither repeat a clip nor are repeated.
        held: bool, what `held_out` said.
        drop: Whether clips within one side give way; those that are held out are never trained on.
    """
    clips = np.flatnonzero(usable)
    contents = _codes(content)[clips]
    sides = held[clips]
    stands_for = np.full(len(usable), NONE, np.int64)
    if drop:
        keys = (contents * (_codes(captions)[clips].max(initial=0) + 1) + _codes(captions)[clips]) * 2 + sides
        _, first, member = np.unique(keys, return_index=True, return_inverse=True)
        stands_for[clips] = np.where(first[member] == np.arange(len(clips)), NONE, clips[first[member]])
    withheld, first = np.unique(contents[sides], return_index=True)
    leaks = ~sides & np.isin(contents, withheld)
    stands_for[clips[leaks]] = clips[sides][first[np.searchsorted(withheld, contents[leaks])]]
    return stands_for


def _search(pattern: re.Pattern[str], paths: pa.Array) -> pa.Array:
    found = (pattern.search(path) for path in _texts(paths))
    part = 1 if pattern.groups else 0
    return pa.array((match[part] if match else None for match in found), pa.string(), size=len(paths))


def _or_else(names: pa.Array, others: pa.Array) -> pa.Array:
    """The others where there is no name, or an empty one."""
    there = pc.fill_null(pc.not_equal(names, ""), False)
    return pc.if_else(there, names, others)


def _codes(column: pa.Array) -> np.ndarray:
    """A number for each distinct value, int64."""
    codes: np.ndarray = column.dictionary_encode().indices.to_numpy().astype(np.int64)
    return codes


def _hash(name: str) -> int:
    """63 bits of a name; not Python's own hash, which differs from process to process."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") >> 1


def _texts(column: pa.Array) -> Iterator[str]:
    for start in range(0, len(column), _BATCH):
        yield from column.slice(start, _BATCH).to_pylist()
