"""Counts in parts are those of the whole, and what is forgotten of very many words is bounded and told."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdtf_ds.inspection import counting
from rdtf_ds.inspection.counting import FrequentWords, Tally, hashes, largest_groups


@given(st.lists(st.lists(st.integers(-(2**62), 2**62))))
def test_a_tally_of_parts_is_one_of_the_whole(parts):
    tally = Tally(np.int64)
    for part in parts:
        tally.add(np.array(part, np.int64))
    values, counts = tally.read()
    assert dict(zip(values.tolist(), counts.tolist(), strict=True)) == Counter(sum(parts, []))
    assert values.tolist() == sorted(values.tolist())


def test_a_tally_holds_different_values_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(counting, "_FEW", 8)
    tally = Tally(np.float64)
    for number in range(500):
        tally.add(np.array([0.5, 1.5, number / 4]))
        assert sum(len(part) for part, _ in tally._parts) <= len(tally._values) + 8
    values, counts = tally.read()
    assert len(values) == 500 and counts.sum() == 1500 and counts[values == 0.5] == counts[values == 1.5] == 501


def test_few_words_are_counted_exactly():
    words = FrequentWords()
    words.add({"a": 3, "b": 1})
    words.add({"b": 4, "c": 1})
    assert words.most_common(2) == {"b": 5, "a": 3} and words.short == 0


@given(st.lists(st.dictionaries(st.sampled_from("abcdefghijklmnopqrstuvwxyz"), st.integers(1, 9)), max_size=30))
def test_of_too_many_words_none_is_counted_too_low_by_more_than_is_told(parts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "MOST_WORDS", 6)
        words, true = FrequentWords(), Counter()
        for part in parts:
            words.add(part)
            true.update(part)
            assert len(words._counts) <= 6
    found = words.most_common(6)
    assert all(0 <= true[word] - found.get(word, 0) <= words.short for word in true)


def test_a_frequent_word_stands_out_of_any_number_of_rare_ones():
    words = FrequentWords()
    for part in range(5):
        words.add({"cat": 1000} | {f"id{part * 40_000 + number}": 1 for number in range(40_000)})
    assert words.most_common(1) == {"cat": 5000} and 0 < words.short < 10 and len(words._counts) <= counting.MOST_WORDS


def test_the_largest_groups_first():
    hashed = hashes(["x", "b", "a", "a", "b", "c", "c", "c"], 8)
    x, b, a, c = hashed[[0, 1, 2, 5]].tolist()
    assert largest_groups(hashed, 2, at_least=2) == ([c, b], 3) and largest_groups(hashed, 9, at_least=1) == ([c, b, a, x], 4)
    assert largest_groups(np.empty(0, np.int64), 2, at_least=1) == ([], 0)
