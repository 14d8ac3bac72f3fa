"""Turns are taken in order, medians are medians, and FLOP are what the shapes say."""

from __future__ import annotations

import time

import pytest
import torch
from torch.nn import functional

from rdtf_ds.benchmarks.timing import SquareProduct, Timing, best_rate, count_flops, seconds_of, square_products, take_turns
from rdtf_ds.memory.activations import without_data


def test_contestants_take_turns_and_warm_up_does_not_count() -> None:
    order = []

    def sleeps(name: str, seconds: list[float]):
        def run() -> None:
            order.append(name)
            time.sleep(seconds[order.count(name) - 1])

        return run

    timings = take_turns({"a": sleeps("a", [0.2, 0.0, 0.0]), "b": sleeps("b", [0.2, 0.03, 0.03])}, repetitions=2)
    assert order == ["a", "b"] * 3
    assert len(timings["a"].seconds) == len(timings["b"].seconds) == 2
    assert timings["a"].median < 0.02 and 0.03 <= timings["b"].median < 0.15
    with pytest.raises(ValueError, match="at least 1"):
        take_turns({}, 0)


def test_median_and_spread() -> None:
    timing = Timing((1.0, 10.0, 2.0))
    assert timing.median == 2.0 and timing.spread == 4.5


def test_seconds_are_of_the_call_alone() -> None:
    assert 0.02 <= seconds_of(lambda: time.sleep(0.02)) < 0.2


def test_best_rate_is_the_best_median() -> None:
    products = square_products(torch.float32, torch.device("cpu"), sides=(1024, 2048))
    small, large = products.values()
    assert (small.times, large.times) == (8, 1) and small.flops == large.flops == 2 * 2048**3
    timings = dict(zip(products, (Timing((1.0, 4.0, 4.0)), Timing((2.0, 2.0, 9.0))), strict=True))
    assert best_rate(products, timings) == 2 * 2048**3 / 2.0
    assert SquareProduct.of(4096, torch.bfloat16, torch.device("cpu")).times == 1


def test_flops_are_counted_without_data_attention_and_backward_too() -> None:
    with without_data(torch.float32):
        left, right = torch.zeros(3, 5, requires_grad=True), torch.zeros(5, 7)
        assert count_flops(lambda: left @ right) == 2 * 3 * 5 * 7
        assert count_flops(lambda: (left @ right).sum().backward()) == 2 * (2 * 3 * 5 * 7)
        query, key, value = (torch.zeros(2, 4, tokens, 8, requires_grad=True) for tokens in (6, 9, 9))
        once = 2 * (2 * 4 * 6 * 9 * 8)  # one product of (6, 8) and (9, 8) for each of 2 · 4 heads
        assert count_flops(lambda: functional.scaled_dot_product_attention(query, key, value)) == 2 * once
        both = count_flops(lambda: functional.scaled_dot_product_attention(query, key, value).sum().backward())
        assert both == 2 * once + 5 * once
