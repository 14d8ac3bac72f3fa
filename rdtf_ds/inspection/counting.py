"""Counting in parts: what is held grows with the number of different values, or by 8 bytes a row, and never holds the rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping

import numpy as np

MOST_WORDS = 2**16
"""Different words counted at a time: about 10 MB."""
_FEW = 2**16


class Tally:
    """How often each number came: 16 bytes for each different one.

    Args:
        dtype: of 8 bytes, in which numbers are kept.
    """

    def __init__(self, dtype: type[np.int64] | type[np.float64]) -> None:
        self._values, self._counts = np.empty(0, dtype), np.empty(0, np.int64)
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []
        self._waiting = 0

    def add(self, values: np.ndarray) -> None:
        """Count some more."""
        part, counts = np.unique(values.astype(self._values.dtype), return_counts=True)
        self._parts.append((part, counts))
        self._waiting += len(part)
        if self._waiting > len(self._values) + _FEW:  # so that each value is sorted a few times, not once for each part
            self._merge()

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """The values, rising, and how often each came, int64."""
        self._merge()
        return self._values, self._counts

    def _merge(self) -> None:
        values = np.concatenate([self._values, *(part for part, _ in self._parts)])
        counts = np.concatenate([self._counts, *(counts for _, counts in self._parts)])
        self._parts, self._waiting = [], 0
        self._values, places = np.unique(values, return_inverse=True)
        self._counts = np.bincount(places, counts, len(self._values)).astype(np.int64)


class FrequentWords:
    """The most frequent of any number of words.

    Attributes:
        short: Counts may be too low by so much, none is too high. 0, and so exact, until `MOST_WORDS` different words have come.
    """

    def __init__(self) -> None:
        self.short = 0
        self._counts: Counter[str] = Counter()

    def add(self, words: Mapping[str, int]) -> None:
        """Count some more, each as often as it came. Of too many different ones the rarer half is forgotten."""
        self._counts.update(words)
        if len(self._counts) > MOST_WORDS:
            ordered = self._counts.most_common()
            self.short += ordered[MOST_WORDS // 2][1]  # the most frequent of those forgotten
            self._counts = Counter(dict(ordered[: MOST_WORDS // 2]))

    def most_common(self, most: int) -> dict[str, int]:
        """The first so many, most frequent first."""
        return dict(self._counts.most_common(most))


def hashes(values: Iterable[Hashable], count: int) -> np.ndarray:
    """int64 (count,): equal for equal values, in this process alone; others share one in 2^64 cases."""
    return np.fromiter(map(hash, values), np.int64, count)


def largest_groups(hashed: np.ndarray, most: int, at_least: int) -> tuple[list[int], int]:
    """The hashes that come most often, of equally many the one that comes first; and how many come at least so often.

    Args:
        hashed: int64 (rows,).
    """
    values, first, counts = np.unique(hashed, return_index=True, return_counts=True)
    large = np.flatnonzero(counts >= at_least)
    order = large[np.lexsort((first[large], -counts[large]))]
    return values[order[:most]].tolist(), len(large)
