"""Bins of round widths for values of any range, tails included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST_BINS = 40


@dataclass(frozen=True, slots=True)
class Histogram:
    """``counts[i]`` values lie in [edges[i], edges[i + 1]); with an open end the last bin takes all from its lower edge on."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    open_end: bool = False


def histogram(values: Sequence[float] | np.ndarray, whole: bool = False) -> Histogram:
    """Bins of a round width from 0 on, about 40 of them; a long tail beyond the 99th percentile is one open bin.

    Args:
        values: ≥ 0.
        whole: They are whole numbers, so no bin is narrower than 1.
    """
    numbers = np.asarray(values, np.float64)
    if not len(numbers):
        return Histogram((), ())
    top, most = float(np.percentile(numbers, 99)), float(numbers.max())
    width = 1.0 if whole else 0.01
    while top / width >= MOST_BINS:
        width *= 2.5 if f"{width:.0e}".startswith("2") else 2  # 1, 2, 5, 10 ...
    bins = int(_places(most, width)) + 1
    open_end = bins > MOST_BINS
    if open_end:
        bins = int(_places(top, width)) + 2
    places = np.minimum(_places(numbers, width), bins - 1)
    edges = np.round(width * np.arange(bins + 1), 6)
    return Histogram(tuple(edges.tolist()), tuple(np.bincount(places, minlength=bins).tolist()), open_end)


def _places(values: np.ndarray | float, width: float) -> np.ndarray:
    """Number of the bin of each value; what rounding puts just below an edge is on it (0.5 // 0.1 is 4)."""
    return np.floor(np.asarray(values) / width + 1e-9).astype(np.int64)


def powers_of_two(values: Sequence[int] | np.ndarray) -> Histogram:
    """Bins from one power of two to the next, from that of the smallest value to that of the largest; below 1 counts as 1."""
    numbers = np.maximum(np.asarray(values, np.float64), 1)
    if not len(numbers):
        return Histogram((), ())
    exponents = np.floor(np.log2(numbers)).astype(np.int64)
    first = int(exponents.min())
    counts = np.bincount(exponents - first)
    return Histogram(tuple(float(2 ** (first + number)) for number in range(len(counts) + 1)), tuple(counts.tolist()))
