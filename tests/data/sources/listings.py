"""Folders of files by name, and what is listed of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rdtf_ds.data.sources.listing import LISTING
from rdtf_ds.data.sources.sources import list_clips


def put(root: Path, **files: str | bytes) -> Path:
    """Files by name; ``__`` stands for a slash and ``_DOT_`` for a dot."""
    for key, content in files.items():
        path = root / key.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def listed(root: Path, cache: Path | None = None) -> list[dict[str, Any]]:
    listing = list_clips(root, cache)
    assert listing.table.schema == LISTING
    listing.table.validate(full=True)
    paths = listing.table["path"].to_pylist()
    assert paths == sorted(set(paths), key=str.encode)
    return listing.table.to_pylist()


def captions(root: Path) -> dict[str, str]:
    return {row["path"]: row["caption"] for row in listed(root)}


def faults(root: Path) -> dict[str, str | None]:
    return {row["path"]: row["fault"] for row in listed(root)}


def lines(*rows: dict[str, Any]) -> str:
    return "\n".join(json.dumps(row) for row in rows)
