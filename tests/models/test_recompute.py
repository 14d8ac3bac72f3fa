"""Which results are dear, and that what is kept of them is not computed again and changes no bit."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from rdtf_ds.benchmarks.peers import SIZES
from rdtf_ds.benchmarks.train_step import count_step
from rdtf_ds.models.recompute import MODES, multiply_adds_per_element, run_unit

aten = torch.ops.aten


class Recorder(TorchDispatchMode):
    """Every operation with the multiply-adds of one element of its result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((str(func.overloadpacket), multiply_adds_per_element(func, args)))
        return func(*args, **(kwargs or {}))


def worth(run) -> int:
    with Recorder() as recorder, torch.no_grad():
        run()
    return max(value for _, value in recorder.calls)


def test_worth_is_the_length_of_the_sums() -> None:
    picture, tokens = torch.randn(2, 12, 5, 5), torch.randn(2, 7, 12)
    assert worth(lambda: nn.Conv2d(12, 3, 3)(picture)) == 12 * 9
    assert worth(lambda: nn.Conv2d(12, 4, (3, 1), groups=2)(picture)) == 6 * 3
    assert worth(lambda: nn.Linear(12, 5)(tokens)) == 12
    assert worth(lambda: nn.Linear(12, 5, bias=False)(tokens)) == 12
    assert worth(lambda: tokens @ torch.randn(2, 12, 3)) == 12
    assert worth(lambda: torch.baddbmm(torch.randn(2, 7, 3), tokens, torch.randn(2, 12, 3))) == 12
    assert worth(lambda: functional.gelu(functional.layer_norm(picture, (5,)) + 1)) == 0
    key = torch.randn(1, 2, 9, 8)
    assert worth(lambda: functional.scaled_dot_product_attention(torch.randn(1, 2, 4, 8), key, key)) == 2 * 9


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("_scaled_dot_product_flash_attention", (1, 2, 9, 8)),
        ("_scaled_dot_product_efficient_attention", (1, 2, 9, 8)),
        ("_scaled_dot_product_cudnn_attention", (1, 2, 9, 8)),
        ("_efficient_attention_forward", (1, 9, 2, 8)),  # xformers keeps tokens before heads
    ],
)
def test_attention_on_gpus_counts_its_keys(name: str, key: tuple[int, ...]) -> None:
    assert multiply_adds_per_element(getattr(aten, name).default, (torch.zeros(1), torch.zeros(key))) == 18


class Unit(nn.Module):
    """Something dear (a convolution over 8 · 9), something cheap (a linear layer over 8), and an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.dear = nn.Conv2d(8, 8, 3, padding=1)
        self.cheap = nn.Linear(8, 8)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = functional.silu(self.dear(functional.silu(hidden)))
        return functional.silu(self.cheap(hidden.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def step(mode: str, keep_from: int) -> tuple[list[torch.Tensor], Counter[str]]:
    torch.manual_seed(0)
    unit, hidden = Unit(), torch.randn(2, 8, 4, 4, requires_grad=True)
    with Recorder() as recorder:
        run_unit(mode, keep_from, unit, hidden).square().sum().backward()
    return [hidden.grad, *(parameter.grad for parameter in unit.parameters())], Counter(name for name, _ in recorder.calls)


@pytest.mark.parametrize(
    ("mode", "keep_from", "convolutions", "products"),
    [
        ("none", 0, 1, 1), ("blocks", 0, 2, 2), ("blocks_cpu_offload", 0, 2, 2),
        ("selective", 73, 2, 2), ("selective", 72, 1, 2), ("selective", 9, 1, 2), ("selective", 8, 1, 1),
    ],
)  # fmt: skip
def test_dear_results_are_computed_once_and_no_bit_changes(mode: str, keep_from: int, convolutions: int, products: int) -> None:
    expected, _ = step("none", 0)
    gradients, calls = step(mode, keep_from)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    assert calls["aten.convolution"] == convolutions
    assert calls["aten.mm"] == products + 2, "the gradients of a product are two more"
    # Of the cheap results none is kept; nobody needs the last one in backward.
    assert calls["aten.silu"] == (3 if mode == "none" else 5)


@pytest.mark.parametrize("mode", MODES)
def test_without_gradients_everything_runs_once(mode: str) -> None:
    with torch.no_grad(), Recorder() as recorder:
        run_unit(mode, 0, Unit(), torch.randn(1, 8, 4, 4))
    assert Counter(name for name, _ in recorder.calls)["aten.convolution"] == 1


def test_full_size_keeps_a_third_and_computes_little_again() -> None:
    """The row of the table, counted without data: peak activations at most 1/3 of none, at most 3.3 forward passes of work."""
    work, peak = {}, {}
    for mode in ("none", "selective", "blocks"):
        work[mode], peak[mode] = count_step(SIZES["full"], 8, mode, torch.bfloat16)
    assert peak["blocks"] < peak["selective"] <= peak["none"] / 3
    again = (work["selective"] - work["none"]) / (work["blocks"] - work["none"])
    assert 0 < again < 0.35, "of what `blocks` computes again"
