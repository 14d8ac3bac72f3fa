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


def histogram(values: Sequence[float] | np.ndarray, counts: Sequence[int] | np.ndarray | None = None, whole: bool = False) -> Histogram:
    """Bins of a round width from 0 on, about 40 of them; a long tail beyond the 99th percentile is one open bin.

    Args:
        values: ≥ 0.
        counts: How often each comes, ≥ 1; None: once.
        whole: They are whole numbers, so no bin is narrower than 1.
    """
    numbers, often = _as_arrays(values, counts)
    if not len(numbers):
        return Histogram((), ())
    top, most = _percentile(numbers, often, 0.99), float(numbers.max())
    width = 1.0 if whole else 0.01
    while top / width >= MOST_BINS:
        width *= 2.5 if f"{width:.0e}".startswith("2") else 2  # 1, 2, 5, 10 ...
    bins = int(_places(most, width)) + 1
    open_end = bins > MOST_BINS
    if open_end:
        bins = int(_places(top, width)) + 2
    places = np.minimum(_places(numbers, width), bins - 1)
    edges = np.round(width * np.arange(bins + 1), 6)
    return Histogram(tuple(edges.tolist()), _filled(places, often, bins), open_end)


def _as_arrays(values: Sequence[float] | np.ndarray, counts: Sequence[int] | np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    numbers = np.asarray(values, np.float64)
    return numbers, np.ones(len(numbers), np.int64) if counts is None else np.asarray(counts, np.int64)


def _percentile(numbers: np.ndarray, often: np.ndarray, share: float) -> float:
    """What NumPy's linear method says of the numbers written out as often as they come."""
    order = np.argsort(numbers)
    reached = np.cumsum(often[order])
    rank = share * (int(reached[-1]) - 1)
    below, above = numbers[order[np.searchsorted(reached, [np.floor(rank), np.ceil(rank)], side="right")]].tolist()
    return float(below + (above - below) * (rank - np.floor(rank)))


def _filled(places: np.ndarray, often: np.ndarray, bins: int) -> tuple[int, ...]:
    return tuple(np.bincount(places, often, bins).astype(np.int64).tolist())


def _places(values: np.ndarray | float, width: float) -> np.ndarray:
    """Number of the bin of each value; what rounding puts just below an edge is on it (0.5 // 0.1 is 4)."""
    return np.floor(np.asarray(values) / width + 1e-9).astype(np.int64)


def powers_of_two(values: Sequence[int] | np.ndarray, counts: Sequence[int] | np.ndarray | None = None) -> Histogram:
    """Bins from one power of two to the next, from that of the smallest value to that of the largest; below 1 counts as 1.

    Args:
        counts: As for `histogram`.
    """
    numbers, often = _as_arrays(values, counts)
    if not len(numbers):
        return Histogram((), ())
    exponents = exponents_of_two(numbers)
    first, last = int(exponents.min()), int(exponents.max())
    edges = tuple(float(2**exponent) for exponent in range(first, last + 2))
    return Histogram(edges, _filled(exponents - first, often, last - first + 1))


def exponents_of_two(values: np.ndarray) -> np.ndarray:
    """int64: of the largest power of two that is not above each value; of what is below 1, 0."""
    exponents: np.ndarray = np.floor(np.log2(np.maximum(values, 1))).astype(np.int64)
    return exponents
