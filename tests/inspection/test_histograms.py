"""Histograms: every value is counted once, in the bin that says so."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdtf_ds.inspection.histograms import Histogram, histogram, powers_of_two


def test_few_whole_numbers_have_a_bin_each():
    found = histogram([3, 3, 5], whole=True)
    assert found == Histogram((0, 1, 2, 3, 4, 5, 6), (0, 0, 0, 2, 0, 1))


def test_a_long_tail_is_one_open_bin():
    found = histogram([*range(1, 31)] * 10 + [5000], whole=True)
    assert found.open_end and found.counts[-1] == 1 and sum(found.counts) == 301
    assert found.edges[1] - found.edges[0] == 1, "one far value does not make all bins coarse"
    assert found.counts[1:31] == (10,) * 30


@given(st.lists(st.floats(0, 1e5), min_size=1, max_size=60))
def test_bins_hold_what_they_say(values):
    found = histogram(values)
    edges = np.array(found.edges)
    assert sum(found.counts) == len(values) and len(found.counts) <= 42
    assert len(found.edges) == len(found.counts) + 1 and edges[0] == 0 and (np.diff(edges) > 0).all()
    for number, count in enumerate(found.counts[:-1]):
        # an edge is told to six places
        inside = sum(edges[number] - 1e-6 <= value < edges[number + 1] + 1e-6 for value in values)
        assert count <= inside
    if not found.open_end:
        assert max(values) <= edges[-1] + 1e-6


@given(st.lists(st.tuples(st.floats(0, 1e5), st.integers(1, 9)), min_size=1, max_size=40), st.booleans())
def test_counted_values_are_as_good_as_each_of_them(pairs, whole):
    values, counts = zip(*pairs, strict=True)
    written_out = np.repeat(values, counts)
    assert histogram(values, counts, whole) == histogram(written_out, whole=whole)
    assert powers_of_two(values, counts) == powers_of_two(written_out)


def test_the_tail_is_beyond_the_99th_percentile():
    values = np.random.default_rng(0).lognormal(2, 1.5, 500)
    found = histogram(values)
    assert found.open_end and found.edges[-3] <= np.percentile(values, 99) < found.edges[-2]


@pytest.mark.parametrize("width", [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10])
def test_widths_are_round(width):
    found = histogram(np.linspace(0, 39.5 * width, 200))
    assert found.edges[1] == pytest.approx(width)


def test_powers_of_two():
    assert powers_of_two([1024, 2047, 2048, 9000]) == Histogram((1024, 2048, 4096, 8192, 16384), (2, 1, 0, 1))
    assert powers_of_two([0]) == Histogram((1, 2), (1,))


def test_nothing_has_no_bins():
    assert histogram([]) == powers_of_two([]) == Histogram((), ())
