"""Groups, the held-out side and duplicates."""

from __future__ import annotations

import hashlib
import time

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdtf_ds.data.indexing.splits import NONE, duplicates, group_names, held_out


def strings(*values: str | None) -> pa.Array:
    return pa.array(values, pa.string())


def test_a_group_is_named_by_the_data_then_by_the_pattern_then_by_the_file():
    paths = strings("cats/1.gif", "cats/2.gif", "dogs/1.gif", "3.gif")
    files = strings("aa", "bb", "cc", "dd")
    given = strings("pets", None, "", None)
    assert group_names(given, paths, None, files).to_pylist() == ["pets", "bb", "cc", "dd"]
    assert group_names(given, paths, r"^(\w+)/", files).to_pylist() == ["pets", "cats", "dogs", "dd"]
    assert group_names(given, paths, r"^\w+/", files).to_pylist() == ["pets", "cats/", "dogs/", "dd"]  # no group of its own: all of it
    # a group that took no part, or found nothing, is no name; a pattern is searched for, not matched from the start
    assert group_names(strings(*[None] * 4), paths, r"(x)?\.gif", files).to_pylist() == ["aa", "bb", "cc", "dd"]
    assert group_names(strings(*[None] * 4), paths, r"(\d)", files).to_pylist() == ["1", "2", "1", "3"]


def test_what_is_held_out_is_a_hash_of_the_name():
    """The rule itself, written anew: it must never change, or clips seen in training would become held-out ones."""

    def expected(name: str, fraction: float) -> bool:
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") / 2**64 < fraction

    names = [f"sticker {number}" for number in range(400)] + ["表情", "\U0001f600"]
    for fraction in (0.01, 0.1, 0.5):
        assert held_out(strings(*names), fraction).tolist() == [expected(name, fraction) for name in names]


@given(st.lists(st.text(max_size=4), max_size=30), st.integers(0, 30), st.sampled_from([0.1, 0.3, 0.5]))
def test_clips_added_later_move_none_and_a_group_is_never_split(names: list[str], cut: int, fraction: float):
    whole = held_out(strings(*names), fraction)
    assert held_out(strings(*names[:cut]), fraction).tolist() == whole[:cut].tolist()
    by_name = {name: side for name, side in zip(names, whole, strict=True)}
    assert [by_name[name] for name in names] == whole.tolist()
    assert not (whole & ~held_out(strings(*names), fraction + 0.1)).any()


def test_the_share_held_out_is_the_one_asked_for():
    names = strings(*(f"{number:09d}" for number in range(20_000)))
    for fraction in (0.02, 0.25):
        share = held_out(names, fraction).mean()
        assert abs(share - fraction) < 4 * np.sqrt(fraction * (1 - fraction) / 20_000)
    assert not held_out(names, 0.0).any() and held_out(names, 1.0).all()
    assert held_out(strings(), 0.5).shape == (0,)


def stand_ins(rows: list[tuple[str, str, str]], drop: bool = True) -> list[int]:
    """Rows of content, caption and mark: t trained on, h held out, - unusable, which nothing may be said of."""
    marks = np.array([mark for _, _, mark in rows])
    content, captions = strings(*(row[0] for row in rows)), strings(*(row[1] for row in rows))
    return duplicates(content, captions, marks != "-", marks == "h", drop).tolist()


def test_the_first_of_equal_clips_stands_for_all():
    cat = ("a", "cat", "t")
    rows = [("a", "cat", "-"), cat, ("b", "cat", "t"), ("a", "dog", "t"), cat, ("b", "cat", "t"), cat]
    assert stand_ins(rows) == [NONE, NONE, NONE, NONE, 1, 2, 1]
    assert stand_ins(rows, drop=False) == [NONE] * 7


def test_clips_that_are_held_out_are_not_trained_on_under_another_name():
    cat, dog, other = ("a", "cat", "t"), ("a", "dog", "h"), ("c", "", "t")
    rows = [cat, ("b", "", "h"), dog, cat, dog, other, ("b", "", "-"), other]
    assert stand_ins(rows) == [2, NONE, NONE, 2, 2, NONE, NONE, 5]
    assert stand_ins(rows, drop=False) == [2, NONE, NONE, 2, NONE, NONE, NONE, NONE]


def test_nothing_repeats_nothing():
    assert stand_ins([]) == []
    assert stand_ins([("a", "", "-"), ("a", "", "-")]) == [NONE, NONE]
    assert stand_ins([("a", "", "h"), ("a", "", "h")]) == [NONE, 0]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["", "x", "y"]), st.sampled_from("tth-")), max_size=25), st.booleans())
def test_what_is_left_is_without_repetition_and_nothing_is_lost(rows: list[tuple[str, str, str]], drop: bool):
    stands_for = stand_ins(rows, drop)
    left = [row for row, other in zip(rows, stands_for, strict=True) if row[2] != "-" and other == NONE]
    withheld = {content for content, _, mark in rows if mark == "h"}
    assert not [row for row in left if row[2] == "t" and row[0] in withheld]
    expected = [row for row in rows if row[2] == "h" or (row[2] == "t" and row[0] not in withheld)]
    assert set(left) == set(expected)
    assert len(left) == (len(set(expected)) if drop else len(expected))
    for row, other in zip(rows, stands_for, strict=True):
        assert other == NONE or (rows[other][0] == row[0] and stands_for[other] == NONE)


@pytest.mark.parametrize("pattern", [None, r"/(\d+)\."])
def test_a_hundred_thousand_clips_take_a_moment(pattern: str | None):
    number = np.arange(100_000)
    content = pa.array([f"{n // 2:064x}" for n in number])
    paths = pa.array([f"folder/{n:06d}.webp" for n in number])
    started = time.perf_counter()
    groups = group_names(pa.nulls(len(number), pa.string()), paths, pattern, content)
    held = held_out(groups, 0.1)
    stands_for = duplicates(content, paths, np.ones(len(number), bool), held, True)
    assert time.perf_counter() - started < 2.0
    # without a pattern equal content is one group; with it, equal clips of two groups are split only if both are held out or none
    assert np.count_nonzero(stands_for != NONE) == (0 if pattern is None else np.count_nonzero(held[0::2] != held[1::2]))
