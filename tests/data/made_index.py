"""Small indexes made without decoding anything: rows as an examiner would hand them in, features that carry their row's number."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rdtf_ds.data.clips.clip import DecodeLimits
from rdtf_ds.data.indexing.index import ClipIndex, open_index
from rdtf_ds.data.indexing.index_segments import WHOLE, IndexSettings, read_segments, write_segment
from rdtf_ds.data.indexing.index_table import BROKEN, NO_CLIP, STATIC, TRAINABLE, write_index

LAID_OVER = {"path": "", "caption": "", "group": "", "held_out": False, "duplicate_of": NO_CLIP}
TYPES = {name: pa.bool_() if name == "held_out" else pa.int32() if name == "duplicate_of" else pa.large_string() for name in LAID_OVER}


def settings_of(folder: Path, **changes: Any) -> IndexSettings:
    return IndexSettings(**{"root": folder / "data", "limits": DecodeLimits(max_frames=5), **changes})


def found(name: str, num_frames: int = 4, **changes: Any) -> dict[str, Any]:
    """A row as an examiner finds it; ``content`` follows from the name."""
    digest = sha256(name.encode()).hexdigest()
    row = {
        "file": name, "offset": 0, "length": WHOLE, "size": 10, "mtime_ns": 7, "window_first": WHOLE, "window_count": WHOLE,
        "status": TRAINABLE if num_frames >= 3 else STATIC, "reason": "", "transient": False, "content": digest, "file_content": digest,
        "format": "gif", "num_frames": num_frames, "width": 10, "height": 8, "has_alpha": False,
        "durations_ms": [40 + number for number in range(num_frames)],
    }  # fmt: skip
    return {**row, **changes}


def broken(name: str, reason: str, transient: bool = False) -> dict[str, Any]:
    return found(name, 0, status=BROKEN, reason=reason, transient=transient, format="", width=0, height=0)


KINDS: list[dict[str, Any]] = [
    {**found("a.gif", 4), "caption": "a cat"},
    {**found("b.webp", 9, format="webp"), "group": "x"},
    broken("c.gif", "truncated"),
    found("d.gif", 2),
    {**found("e.gif", 3), "held_out": True, "group": "y"},
    {**found("f.gif", 4), "duplicate_of": 0, "caption": "a cat"},
]
"""With a caption, with a group, broken, static, held out, and the first one again."""


def features_of(row: dict[str, Any], number: int, settings: IndexSettings) -> np.ndarray | None:
    """Frame f of row ``number`` is all 10·number + f."""
    if row["status"] == BROKEN:
        return None
    kept = min(row["num_frames"], settings.limits.max_frames)
    return np.repeat(10 * number + np.arange(kept)[:, None], settings.dim, 1).astype(settings.dtype)


def rows_laid_over(rows: pa.Table, laid_over: list[dict[str, Any]]) -> pa.Table:
    for name, nothing in LAID_OVER.items():
        values = [row.get(name, file if name == "path" else nothing) for row, file in zip(laid_over, rows["file"].to_pylist(), strict=True)]
        rows = rows.append_column(name, pa.array(values, TYPES[name]))
    return rows


def make_index(folder: Path, clips: list[dict[str, Any]], **changes: Any) -> ClipIndex:
    """Each clip is what `found` or `broken` gives, with what else the index lays over it; sorted by path already."""
    settings = settings_of(folder, **changes)
    rows = [{name: value for name, value in clip.items() if name not in LAID_OVER} for clip in clips]
    write_segment(folder, settings, rows, [features_of(row, number, settings) for number, row in enumerate(rows)])
    examined = read_segments(folder, settings)
    write_index(folder, settings, rows_laid_over(examined.slice(len(examined) - len(rows)), clips))
    return open_index(folder, settings.identity)
