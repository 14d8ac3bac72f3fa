"""The index of a data folder: one row for each clip file, with its caption, frame count and whether it can be trained on.

Every file is decoded once when it is indexed, so that the broken ones are known before training starts. The rows are kept as
Parquet; files whose path, size and time have not changed since are not decoded again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rdtf_ds.data.captions import CLIP_SUFFIXES, read_captions
from rdtf_ds.data.clip import ClipError, DecodeLimits
from rdtf_ds.data.decoding import probe_clip
from rdtf_ds.data.quarantine import Problem
from rdtf_ds.data.video import close_child_reader
from rdtf_ds.data.writing import write_atomically
from rdtf_ds.diffusion.masks import MIN_FRAMES
from rdtf_ds.errors import UserError

TRAINABLE, STATIC, BROKEN = "trainable", "static", "broken"
_MOST_THREADS = 8


@dataclass(frozen=True, slots=True)
class ClipRow:
    """One clip file.

    Attributes:
        clip_id: position in the index.
        path: relative to the data folder, with ``/`` between folders.
        caption: empty if there is none.
        format: gif, webp, png, webm or mp4, told by content; empty if broken.
        num_frames: in the file; 0 if broken. ``width`` and ``height`` likewise.
        status: "trainable", "static" (fewer than 3 frames) or "broken".
        reason: why it is broken, else empty.
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


@dataclass(frozen=True)
class ClipIndex:
    """All clips of a folder, sorted by path; ids are positions.

    Attributes:
        root: the data folder.
        rows: every clip file; ``rows[i].clip_id == i``.
        max_frames: frames kept of one clip when it is decoded.
    """

    root: Path
    rows: tuple[ClipRow, ...]
    max_frames: int

    @cached_property
    def trainable(self) -> np.ndarray:
        """Ids of the clips with at least 3 frames, int64, rising."""
        return np.array([row.clip_id for row in self.rows if row.status == TRAINABLE], np.int64)

    @cached_property
    def frame_counts(self) -> np.ndarray:
        """Decoded (thinned) frames of each clip of ``trainable``, int64, aligned with it."""
        return np.array([min(self.rows[clip_id].num_frames, self.max_frames) for clip_id in self.trainable], np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over what training sees of the index: ids, paths, frame counts and captions of the trainable clips."""
        digest = hashlib.sha256()
        for clip_id, count in zip(self.trainable.tolist(), self.frame_counts.tolist(), strict=True):
            row = self.rows[clip_id]
            digest.update(json.dumps([clip_id, row.path, count, row.caption]).encode() + b"\n")
        return digest.hexdigest()

    @property
    def problems(self) -> list[Problem]:
        """The broken files, for the quarantine."""
        return [Problem(row.path, row.reason) for row in self.rows if row.status == BROKEN]

    def counts(self) -> dict[str, int]:
        """Files in all, by status, and trainable ones without a caption."""
        by_status = Counter(row.status for row in self.rows)
        without = sum(row.status == TRAINABLE and not row.caption for row in self.rows)
        counts = {status: by_status[status] for status in (TRAINABLE, STATIC, BROKEN)}
        return {"files": len(self.rows), **counts, "without_caption": without}

    def summary(self) -> str:
        """One line for people."""
        counts = self.counts()
        formats = Counter(self.rows[clip_id].format for clip_id in self.trainable)
        kinds = ", ".join(f"{number} {name}" for name, number in sorted(formats.items(), key=lambda item: (-item[1], item[0])))
        frames = self.frame_counts
        spread = f", {frames.min()} to {frames.max()} frames, median {int(np.median(frames))}" if len(frames) else ""
        return (
            f"{counts['files']} clips in '{self.root}': {counts[TRAINABLE]} to train on ({kinds or 'none'}{spread}), "
            f"{counts[STATIC]} static, {counts[BROKEN]} broken, {counts['without_caption']} without a caption"
        )


def build_index(root: str | Path, limits: DecodeLimits, cache: str | Path | None = None) -> ClipIndex:
    """Index a data folder, sub-folders included.

    Links are followed only if they stay inside the folder. A clip that nothing names gets an empty caption.

    Args:
        limits: beyond them a file is broken.
        cache: Parquet file, read if it is there and written anew; None: neither.
    Raises:
        UserError: the folder is missing, empty or without a trainable clip, or its metadata names absent files.
    """
    root = Path(root)
    if not root.is_dir():
        fault = "is a file" if root.exists() else "does not exist"
        raise UserError(f"data folder '{root}' {fault}. Give --data_dir (rdtf.data.data_dir) a folder of clips.")
    captions = read_captions(root)
    paths = _clip_paths(root)
    if not paths:
        raise UserError(f"data folder '{root}' has no clips: none of its files ends in {', '.join(CLIP_SUFFIXES)}.")
    known = _read_cache(Path(cache)) if cache is not None else {}
    stamps = {path: _stamp(root / path, limits) for path in paths}
    probes = {path: known[stamps[path]] for path in paths if stamps[path] in known}
    probes |= _probe_all(root, [path for path in paths if path not in probes], limits)
    rows = tuple(ClipRow(number, path, captions.get(path, ""), **asdict(probes[path])) for number, path in enumerate(paths))
    index = ClipIndex(root, rows, limits.max_frames)
    if cache is not None:
        _write_cache(Path(cache), rows, [stamps[path] for path in paths])
    if len(index.trainable) == 0:
        first = next((f"; the first broken one: {row.path}: {row.reason}" for row in rows if row.status == BROKEN), "")
        raise UserError(f"nothing to train on: {index.summary()}{first}. Training needs clips of at least {MIN_FRAMES} frames.")
    return index


@dataclass(frozen=True, slots=True)
class _Probe:
    """The part of a row that comes from decoding."""

    format: str
    num_frames: int
    width: int
    height: int
    status: str
    reason: str


def _clip_paths(root: Path) -> list[str]:
    """Clip files under the folder, sorted by their relative path; hidden ones and links that leave the folder are left out."""
    inside = root.resolve()
    found = []
    for folder, folders, names in os.walk(root):  # does not enter linked folders
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if name.startswith(".") or path.suffix.lower() not in CLIP_SUFFIXES:
                continue
            if path.is_file() and path.resolve().is_relative_to(inside):
                found.append(path.relative_to(root).as_posix())
    return sorted(found)


def _probe_all(root: Path, paths: list[str], limits: DecodeLimits) -> dict[str, _Probe]:
    def probe(path: str) -> _Probe:
        try:
            info = probe_clip(root / path, limits)
        except ClipError as error:
            return _Probe("", 0, 0, 0, BROKEN, error.reason)
        status = TRAINABLE if info.num_frames >= MIN_FRAMES else STATIC
        return _Probe(info.format, info.num_frames, info.width, info.height, status, "")

    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        probes = dict(zip(paths, pool.map(probe, paths), strict=True))
    close_child_reader()  # before loader workers are forked
    return probes


def _stamp(path: Path, limits: DecodeLimits) -> str:
    """What an unchanged file looks like from outside, with the limits it was held to."""
    status = path.stat()
    return json.dumps([str(path.resolve()), status.st_size, status.st_mtime_ns, asdict(limits)])


def _write_cache(path: Path, rows: Iterable[ClipRow], stamps: list[str]) -> None:
    table = pa.Table.from_pylist([{**asdict(row), "stamp": stamp} for row, stamp in zip(rows, stamps, strict=True)])
    buffer = BytesIO()
    pq.write_table(table, buffer)
    write_atomically(path, buffer.getvalue())


def _read_cache(path: Path) -> dict[str, _Probe]:
    """Probes of an earlier index by stamp. A damaged cache costs time, nothing else; so it is not an error."""
    if not path.is_file():
        return {}
    fields = list(_Probe.__dataclass_fields__)
    try:
        rows = pq.read_table(path, columns=["stamp", *fields]).to_pylist()
    except (pa.ArrowException, OSError, KeyError):
        return {}
    # a video that was too slow once may have met a busy machine: it is tried again
    return {row.pop("stamp"): _Probe(**row) for row in rows if row["status"] != BROKEN}
