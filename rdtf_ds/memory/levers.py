"""What to change so that a run fits: the smallest set of changes, the cheaper first; and the largest micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations, product

from rdtf_ds.experiment import RANK_QUANTUM
from rdtf_ds.memory.gpus import GPU
from rdtf_ds.memory.planner import MemoryPlan, Setup, Sources, plan

SMALL_GROUPS, SMALL_BUCKETS = 10_000_000, 5_000_000
_HARDER: dict[str, tuple[tuple[str, int], ...]] = {
    "none": (("selective", 3), ("blocks", 4), ("blocks_cpu_offload", 7)),
    "selective": (("blocks", 2), ("blocks_cpu_offload", 6)),
    "blocks": (("blocks_cpu_offload", 5),),
    "blocks_cpu_offload": (),
}
"""Ways to keep less for backward, and their costs."""


@dataclass(frozen=True)
class Change:
    """One change: what to type, and what it costs. ``cost`` orders those that are as many: time first, then quality, then money."""

    told: str
    cost: int
    apply: Callable[[Setup], Setup]


def smallest_changes(setup: Setup, sources: Sources, gpu: GPU) -> tuple[tuple[Change, ...], MemoryPlan] | None:
    """The fewest changes with which the run fits on ``gpu``, the cheapest of as many, with its plan; none when it fits as it is.

    Sets are tried from the smallest on, so that what is found early is all that is planned.

    Returns:
        None when no set of these changes makes it fit.
    """
    families = list(_families(setup))
    for size in range(len(families) + 1):
        sets = [changes for chosen in combinations(families, size) for changes in product(*chosen)]
        for changes in sorted(sets, key=lambda changes: sum(change.cost for change in changes)):
            changed = setup
            for change in changes:
                changed = change.apply(changed)
            if _possible(changed) and (made := plan(changed, sources, gpu)).fits:
                return changes, made
    return None


def largest_micro_batch(setup: Setup, sources: Sources, gpu: GPU) -> int | None:
    """The largest micro-batch that fits and divides the global batch on these ranks; None when not even one clip does."""
    each = setup.global_batch // setup.ranks
    sizes = [size for size in range(1, each + 1) if each % size == 0]

    def fits(number: int) -> bool:
        """Whether a micro-batch of ``sizes[number]`` clips does."""
        return plan(replace(setup, micro_batch=sizes[number]), sources, gpu).fits

    # More clips never need less, but for the last: a whole step at once has no accumulated gradients beside its own.
    if fits(len(sizes) - 1):
        return sizes[-1]
    if not fits(0):
        return None
    fitting, too_large = 0, len(sizes) - 1
    while too_large - fitting > 1:
        middle = (fitting + too_large) // 2
        fitting, too_large = (middle, too_large) if fits(middle) else (fitting, middle)
    return sizes[fitting]


def _families(setup: Setup) -> Iterator[list[Change]]:
    """Changes that exclude each other stand in one list."""
    if setup.reduce_bucket > SMALL_BUCKETS:
        told = f"zero_optimization.reduce_bucket_size={SMALL_BUCKETS}"
        yield [Change(told, 1, _set(reduce_bucket=SMALL_BUCKETS))]
    if setup.autoencoder_slice > 1:
        yield [Change("rdtf.memory.autoencoder_slice=1", 1, _set(autoencoder_slice=1))]
    if setup.group_size > SMALL_GROUPS:
        yield [Change(f"rdtf.optimizer.group_size={SMALL_GROUPS} (for a new run)", 2, _set(group_size=SMALL_GROUPS))]
    if harder := _HARDER[setup.checkpointing]:
        yield [Change(f"rdtf.memory.activation_checkpointing={mode}", cost, _set(checkpointing=mode)) for mode, cost in harder]
    if setup.micro_batch > 1:
        yield [Change("train_micro_batch_size_per_gpu=1", 4, _set(micro_batch=1))]
    if setup.encoders == "resident":
        yield [
            Change("rdtf.memory.encoders=cached (after tools/cache_dataset.py)", 3, _set(encoders="cached")),
            Change("rdtf.memory.encoders=cpu", 5, _set(encoders="cpu")),
        ]
    if not setup.offload_optimizer:
        yield from _of_the_optimizer(setup)
    more = [ranks for ranks in range(setup.ranks + 1, RANK_QUANTUM + 1) if _possible(replace(setup, ranks=ranks, micro_batch=1))]
    yield [Change(f"{ranks} GPUs", 32 * ranks, _set(ranks=ranks)) for ranks in more]


def _of_the_optimizer(setup: Setup) -> Iterator[list[Change]]:
    """Masters, moments, gradients and mean: narrower, elsewhere, or not at all."""
    told = "zero_optimization.offload_optimizer.device=cpu and rdtf.optimizer.bits=32"
    if setup.ema == "gpu":
        told += " and rdtf.ema.device=cpu"
        yield [
            Change("rdtf.ema.device=cpu", 6, _set(ema="cpu")),
            Change("rdtf.ema.enabled=false (for a new run; clips get worse)", 16, _set(ema="off")),
        ]
    yield [Change(f"{told} (for a new run)", 24, _offloaded)]
    if setup.gradient_bytes > setup.compute_bytes:
        yield [Change("data_types.grad_accum_dtype=null", 2, _set(grad_bytes=0))]


def _offloaded(setup: Setup) -> Setup:
    """With the masters on the CPU, the mean is there too, and gradients are summed there in compute precision."""
    return replace(setup, offload_optimizer=True, grad_bytes=0, ema="off" if setup.ema == "off" else "cpu")


def _set(**values: object) -> Callable[[Setup], Setup]:
    return lambda setup: replace(setup, **values)  # type: ignore[arg-type]


def _possible(setup: Setup) -> bool:
    """Whether so many ranks can share the global batch and the optimizer's state."""
    return setup.global_batch % (setup.micro_batch * setup.ranks) == 0 and RANK_QUANTUM % setup.ranks == 0
