"""Condition masks come out as in the paper's Table 7, on every k."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdtf_ds.diffusion.masks import MAX_FRAMES, MIN_FRAMES, Mask, Task, evenly_spaced, level, loss_mask, mask_family

EVERY_K = range(MIN_FRAMES, MAX_FRAMES + 1)


def bits(mask: Mask) -> str:
    return "".join("1" if visible else "0" for visible in mask)


def family(task: Task, k: int) -> list[str]:
    return [bits(mask) for mask in mask_family(task, k)]


@pytest.mark.parametrize(
    ("task", "mask"),
    [
        (Task.INTERPOLATION, "01010101"),
        (Task.INTERPOLATION, "10101010"),
        (Task.INTERPOLATION, "10010010"),
        (Task.PREDICTION, "11111000"),
        (Task.PREDICTION, "00111111"),
        (Task.GENERATION, "10000000"),
        (Task.GENERATION, "00100000"),
    ],
)
def test_table_7(task: Task, mask: str) -> None:
    assert mask in family(task, 8)


def test_families_of_eight_frames_in_full() -> None:
    assert family(Task.INTERPOLATION, 8) == ["10101010", "01010101", "10010010", "01001001", "00100100"]
    prefixes = {"1" * n + "0" * (8 - n) for n in range(2, 8)}
    assert set(family(Task.PREDICTION, 8)) == prefixes | {prefix[::-1] for prefix in prefixes}
    assert family(Task.GENERATION, 8) == ["0" * n + "1" + "0" * (7 - n) for n in range(8)] + ["00000000"]


def test_shortest_families() -> None:
    assert family(Task.INTERPOLATION, 3) == ["101"]
    assert family(Task.INTERPOLATION, 4) == ["1010", "0101", "1001"]
    assert sorted(family(Task.PREDICTION, 3)) == ["011", "110"]
    assert family(Task.GENERATION, 3) == ["100", "010", "001", "000"]


@pytest.mark.parametrize("k", EVERY_K)
def test_what_every_family_keeps(k: int) -> None:
    for task in Task:
        masks = mask_family(task, k)
        assert len(set(masks)) == len(masks) > 0
        assert all(len(mask) == k for mask in masks)
        assert all(isinstance(visible, bool) for mask in masks for visible in mask)
        assert mask_family(task, k) is masks, "families are cached"
        if task is Task.GENERATION:
            assert sorted(map(sum, masks)) == [0] + [1] * k
        else:
            assert all(2 <= sum(mask) < k for mask in masks)
    for one, other in itertools.combinations(Task, 2):
        assert not set(mask_family(one, k)) & set(mask_family(other, k)), "a mask belongs to one task"


@pytest.mark.parametrize("k", [2, 9])
def test_other_k_are_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k = {k}"):
        mask_family(Task.PREDICTION, k)


def test_level_counts_hidden_frames_under_the_loss() -> None:
    assert level((True, False, True, False, False)) == 3
    assert level((False,) * 8) == 8


def test_loss_mask_is_the_first_k() -> None:
    assert bits(loss_mask(3)) == "11100000"
    assert bits(loss_mask(8)) == "11111111"
    assert bits(loss_mask(2, frames=3)) == "110"
    for k in (0, 9):
        with pytest.raises(ValueError, match="loss mask"):
            loss_mask(k)


@given(st.integers(1, 300), st.data())
def test_evenly_spaced(num_frames: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, num_frames))
    chosen = evenly_spaced(num_frames, k)
    assert chosen.dtype == np.int64 and len(chosen) == k and chosen[0] == 0
    assert (np.diff(chosen) >= 1).all()
    if k > 1:
        assert chosen[-1] == num_frames - 1
        ideal = np.arange(k) * (num_frames - 1) / (k - 1)
        assert np.abs(chosen - ideal).max() <= 0.5 + 1e-9


def test_evenly_spaced_by_hand() -> None:
    assert evenly_spaced(10, 4).tolist() == [0, 3, 6, 9]
    assert evenly_spaced(4, 3).tolist() == [0, 2, 3]  # 1.5 rounds up
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"{k} distinct frames out of 3"):
            evenly_spaced(3, k)
