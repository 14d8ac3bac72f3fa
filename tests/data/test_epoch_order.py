"""The order of an epoch: a bijection for every number of rows, all orders alike, quick to start."""

from __future__ import annotations

import math
import time
from collections import Counter

import numpy as np
import pytest

from rdtf_ds.data.epoch_order import EpochOrder
from rdtf_ds.seeding import numpy_generator


def order(rows: int, epoch: int = 0) -> EpochOrder:
    return EpochOrder(rows, numpy_generator(1, epoch, "order"))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 100, 255, 256, 257, 1000, 4095, 4097])
def test_every_row_has_one_position(rows: int) -> None:
    made = order(rows)
    assert sorted(made[position] for position in range(rows)) == list(range(rows))


@pytest.mark.parametrize("rows", [2, 3, 4, 5])
def test_all_orders_are_equally_likely(rows: int) -> None:
    draws = 600 * math.factorial(rows) if rows < 5 else 12_000
    found = Counter(tuple(made[position] for position in range(rows)) for made in (order(rows, epoch) for epoch in range(draws)))
    expected = draws / math.factorial(rows)
    assert len(found) == math.factorial(rows)
    freedom = math.factorial(rows) - 1
    statistic = sum((number - expected) ** 2 / expected for number in found.values())
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)  # chi-square: mean is its freedom, variance twice that


@pytest.mark.parametrize("rows", [1000, 1025, 30_000])
def test_neighbours_part(rows: int) -> None:
    """A folder sorted by path has its variants side by side. Of a random order, rank correlations are 0 ± 1/√rows and steps a third."""
    made = order(rows)
    at = np.array([made[position] for position in range(rows)])
    side = 1 << (rows - 1).bit_length() // 2  # of the network's halves
    halves_of = [(at % side, np.arange(rows) % side), (at // side, np.arange(rows) // side), (at // side, np.arange(rows) % side)]
    for one, other in ((at, np.arange(rows)), (at[1:], at[:-1]), (at[:-2], at[2:]), *halves_of):
        assert abs(np.corrcoef(one, other)[0, 1]) < 4 / math.sqrt(rows)
    assert abs(np.abs(np.diff(at)).mean() / rows - 1 / 3) < 1 / math.sqrt(rows)
    halves = at[: rows // 2] < rows // 2
    assert abs(halves.mean() - 0.5) < 2 / math.sqrt(rows)


def test_another_epoch_is_another_order_and_the_same_one_the_same() -> None:
    first, again, second = ([order(100, epoch)[position] for position in range(100)] for epoch in (0, 0, 1))
    assert first == again and sum(one == other for one, other in zip(first, second, strict=True)) < 10


@pytest.mark.parametrize("position", [-1, 10, 16])
def test_positions_outside_are_refused(position: int) -> None:
    with pytest.raises(IndexError, match=f"an epoch of 10 has no position {position}"):
        order(10)[position]


def test_millions_of_rows_cost_neither_time_nor_memory() -> None:
    start = time.process_time()
    made = order(1_800_000)
    rows = [made[position] for position in range(0, 1_800_000, 18_000)]
    assert time.process_time() - start < 0.01, "a shuffled list takes 36 ms"
    assert len(set(rows)) == 100 and max(rows) < 1_800_000
    assert sum(len(table) for tables in made._rounds for table in tables) == 6 * (1024 + 2048)
