"""How time and work are measured: turns, medians, the limit of the machine, operations counted without doing them.

Legend: n side of a square matrix, FLOP one addition or multiplication (a product of n × n matrices has 2 n³).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

# Sides of the products that the machine's rate is taken from: the best of them, so that a slow shape does not flatter us.
MATMUL_SIDES = (512, 1024, 2048, 3072, 4096)


@dataclass(frozen=True)
class Timing:
    """Seconds of one contestant, in the order they were taken."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds of the middle repetition; of an even number the mean of the two in the middle."""
        return median(self.seconds)

    @property
    def spread(self) -> float:
        """(largest − smallest) / median."""
        return (max(self.seconds) - min(self.seconds)) / self.median


def take_turns(contestants: Mapping[str, Callable[[], object]], repetitions: int, warm_up: int = 1) -> dict[str, Timing]:
    """Times each contestant ``repetitions`` times, all of them once before any is timed again.

    So what slows the machine for a while slows all. What a call returns is freed outside of the measured time, as is garbage.

    Args:
        contestants: What to call, by name; waited for until the device is done.
        warm_up: Rounds that are not counted.

    Raises:
        ValueError: fewer than one repetition.
    """
    if repetitions < 1:
        raise ValueError(f"repetitions is {repetitions}: at least 1 is needed")
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(warm_up + repetitions):
        for name, run in contestants.items():
            taken = seconds_of(run)
            if turn >= warm_up:
                seconds[name].append(taken)
    return {name: Timing(tuple(taken)) for name, taken in seconds.items()}


def seconds_of(run: Callable[[], object]) -> float:
    """Seconds of one call, the device's work included."""
    gc.collect()
    _wait()
    start = time.perf_counter()
    result = run()
    _wait()
    taken = time.perf_counter() - start
    del result
    return taken


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass(frozen=True)
class SquareProduct:
    """A product of two n × n matrices, called as often as one of 2048 needs time, so that a small one is no flicker of the clock."""

    left: Tensor
    right: Tensor
    times: int

    @classmethod
    def of(cls, side: int, dtype: torch.dtype, device: torch.device) -> SquareProduct:
        """Of two matrices of normal numbers, ``side`` × ``side``; ``times`` is at least 1."""
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        return cls(left, right, max(1, (2048 // side) ** 3))

    @property
    def flops(self) -> int:
        """Of one call: 2 n³ for each of its products."""
        return 2 * len(self.left) ** 3 * self.times

    def __call__(self) -> None:
        for _ in range(self.times):
            self.left @ self.right


def square_products(dtype: torch.dtype, device: torch.device, sides: Sequence[int] = MATMUL_SIDES) -> dict[str, SquareProduct]:
    """Contestants that show what the machine can do; `best_rate` reads them."""
    return {f"product of {side} x {side}": SquareProduct.of(side, dtype, device) for side in sides}


def best_rate(products: Mapping[str, SquareProduct], timings: Mapping[str, Timing]) -> float:
    """FLOP/s of the fastest square product, each by its median."""
    return max(product.flops / timings[name].median for name, product in products.items())


def count_flops(run: Callable[[], object]) -> int:
    """FLOP of the matrix products, convolutions and attention in ``run``, backward and recomputation included if it runs them.

    Cheap where the tensors hold no data (`rdtf_ds.memory.activations.without_data`): the operations are then only named.
    """
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        run()
    return int(counter.get_total_flops())


def _attention_flops(query: Sequence[int], key: Sequence[int], *_: object, **__: object) -> int:
    """Scores and sum of values: two products of (L_q, D) and (L_k, D) for each of B × heads."""
    batch, heads, tokens, width = query
    return 4 * batch * heads * tokens * key[2] * width


def _attention_backward_flops(_: object, query: Sequence[int], key: Sequence[int], *__: object, **___: object) -> int:
    """Five such products: the scores again, and the gradients of values, scores, queries and keys."""
    return _attention_flops(query, key) * 5 // 2


# torch counts attention on GPUs only.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
