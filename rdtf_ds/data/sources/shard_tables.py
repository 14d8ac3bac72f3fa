"""Keeps what a walk over a shard has found, so that an unchanged shard is not walked again.

A walk reads every header: some microseconds each from memory, but a round trip each from a network disk, twice a clip. A kept table is
one small file a shard, taken back only for a shard of the same name, size and time.
"""

from __future__ import annotations

import hashlib
import os
from io import BytesIO
from pathlib import Path

import pyarrow as pa

from rdtf_ds.data.clips.places import open_regular, unreadable
from rdtf_ds.data.clips.writing import write_atomically
from rdtf_ds.data.sources.listing import LISTING
from rdtf_ds.data.sources.shards import list_shard

_LAYOUT = b"1"


def shard_table(root: Path, name: str, cache: Path | None) -> pa.Table:
    """The rows of a shard: kept ones, else those of a walk, which are then kept.

    Args:
        name: of the shard, relative to ``root``.
        cache: Folder of the kept tables, made when it is needed; None: there are none.
    Returns:
        Rows of `LISTING`, in the order of the shard.
    Raises:
        ClipError: as `list_shard`.
    """
    shard = root / name
    if cache is None:
        return list_shard(shard, name)
    kept = cache / f"{hashlib.sha256(os.fsencode(shard.resolve())).hexdigest()[:32]}.arrow"
    stamp = _stamp(shard, name)
    table = _read(kept, stamp)
    if table is None:
        table = list_shard(shard, name)
        if _stamp(shard, name) == stamp:  # else somebody is writing it
            _keep(kept, table, stamp)
    return table


def _stamp(shard: Path, name: str) -> dict[bytes, bytes]:
    """What an unchanged shard looks like from outside."""
    descriptor = open_regular(shard)
    try:
        status = os.fstat(descriptor)
    except OSError as error:
        raise unreadable(shard, error) from error
    finally:
        os.close(descriptor)
    return {b"layout": _LAYOUT, b"name": name.encode(), b"size": b"%d" % status.st_size, b"mtime_ns": b"%d" % status.st_mtime_ns}


def _read(kept: Path, stamp: dict[bytes, bytes]) -> pa.Table | None:
    """A damaged table costs a walk, nothing else; so it is not an error."""
    try:
        table = pa.ipc.open_file(BytesIO(kept.read_bytes())).read_all()
        table.validate(full=True)
    except (OSError, pa.ArrowException):
        return None
    if table.schema.metadata != stamp or table.schema.remove_metadata() != LISTING:
        return None
    return table.replace_schema_metadata(None)


def _keep(kept: Path, table: pa.Table, stamp: dict[bytes, bytes]) -> None:
    buffer = BytesIO()
    table = table.unify_dictionaries().replace_schema_metadata(stamp)
    with pa.ipc.new_file(buffer, table.schema) as writer:
        writer.write_table(table)
    write_atomically(kept, buffer.getvalue())
