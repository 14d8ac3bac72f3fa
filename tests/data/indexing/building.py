"""Small folders of clips to build indexes of, and a decoder that examines in this process and keeps a list of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rdtf_ds.data.clips.clip import ClipError, ClipInfo, DecodeLimits, ExaminedClip, Place, Window
from rdtf_ds.data.clips.decoding import examine_clip
from rdtf_ds.data.clips.writing import write_clip
from rdtf_ds.data.indexing.index import ClipIndex
from rdtf_ds.data.indexing.index_segments import IndexSettings, read_segments

LIMITS = DecodeLimits(max_frames=5)


def clip(path: Path, num_frames: int, seed: int = 0) -> None:
    write_clip(np.random.default_rng(seed).integers(0, 255, (num_frames, 8, 10, 3), dtype=np.uint8), path)


def many_clips(root: Path, number: int) -> Path:
    for seed in range(number):
        clip(root / f"{seed:02d}.gif", 3 + seed % 3, seed)
    return root


class Decoder:
    """Examines in this process and keeps a list of it; some clips fail as the test says."""

    examined: list[str] = []
    faults: dict[str, ClipError | Exception] = {}
    sizes: list[int] = []
    closed: list[bool] = []

    def __init__(self, size: int) -> None:
        self.sizes.append(size)

    def examine(self, place: Place, limits: DecodeLimits, background: Any, describe_size: int | None = None) -> ExaminedClip:
        self.examined.append(place.path.name)
        if place.path.name in self.faults:
            raise self.faults[place.path.name]
        return examine_clip(place, limits, background, describe_size=describe_size)

    def examine_windows(
        self, place: Place, limits: DecodeLimits, background: Any, seconds: float, describe_size: int | None = None
    ) -> Iterator[ExaminedClip]:
        """Windows of four frames, whatever is asked for; of a PNG one."""
        whole = self.examine(place, limits, background, describe_size)
        if whole.info.format == "png":
            yield whole
            return
        for first in range(0, whole.info.num_frames, 4):
            count = min(4, whole.info.num_frames - first)
            info = ClipInfo("mp4", count, 10, 8, False, (100,) * count)
            yield ExaminedClip(f"{whole.content[:60]}{first:04d}", info, whole.thumbnails[first : first + count], Window(first, count))

    def close(self) -> None:
        self.closed.append(True)


def taken(decoder: type[Decoder]) -> list[str]:
    """What was examined since the last call."""
    names = sorted(decoder.examined)
    decoder.examined.clear()
    return names


class Describer:
    """Mean colour of each frame, and where it was made."""

    identity, size, dim = "mean", 4, 3

    def __init__(self) -> None:
        self.at_once, self.most = 0, 0

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        assert frames.shape[1:] == (4, 4, 3) and frames.dtype == np.uint8
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        time.sleep(0.01)
        self.at_once -= 1
        return frames.mean((1, 2)).astype(np.float16)


def rows(index: ClipIndex, *names: str) -> list[tuple[Any, ...]]:
    return [tuple(getattr(row, name) for name in names) for row in index.rows]


def committed(root: Path, folder: Path) -> list[str]:
    return read_segments(folder, IndexSettings(root, DecodeLimits()))["file"].to_pylist()
