"""What to change so that a run fits: the smallest set of changes, the cheaper first; and the largest micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from rdtf_ds.experiment import RANK_QUANTUM
from rdtf_ds.memory.gpus import GPU
from rdtf_ds.memory.planner import MemoryPlan, Setup, Sources, plan

SMALL_GROUPS, SMALL_BUCKETS = 10_000_000, 5_000_000


@dataclass(frozen=True)
class Change:
    """One change: what to type, and what it costs. ``cost`` orders those that are as many: time first, then quality, then money."""

    told: str
    cost: int
    apply: Callable[[Setup], Setup]



def smallest_changes(setup: Setup, sources: Sources, gpu: GPU) -> tuple[tuple[Change, ...], MemoryPlan] | None:
    """The fewest changes with which the run fits on ``gpu``, the cheapest of as many, with its plan; none when it fits as it is.

    Returns:
        None when no set of these changes makes it fit.
    """
    families = [(None, *family) for family in _families(setup)]
    chosen = [tuple(change for change in changes if change is not None) for changes in product(*families)]
    for changes in sorted(chosen, key=lambda changes: (len(changes), sum(change.cost for change in changes))):
        changed = setup
        for change in changes:
            changed = change.apply(changed)
        if _splits(changed) and (made := plan(changed, sources, gpu)).fits:
            return changes, made
    return None


def largest_micro_batch(setup: Setup, sources: Sources, gpu: GPU) -> int | None:
    """The largest micro-batch that fits and divides the global batch on these ranks; None when not even one clip does."""
    each = setup.global_batch // setup.ranks
    sizes = [size for size in range(1, each + 1) if each % size == 0]

    def fits(number: int) -> bool:
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
    if setup.checkpointing == "none":
        yield [Change("rdtf.memory.activation_checkpointing=blocks", 4, _set(checkpointing="blocks"))]
    if setup.micro_batch > 1:
        yield [Change("train_micro_batch_size_per_gpu=1", 4, _set(micro_batch=1))]
    if setup.ema:
        yield [Change("rdtf.ema.enabled=false (for a new run; clips get worse)", 16, _set(ema=False))]
    more = [ranks for ranks in range(setup.ranks + 1, RANK_QUANTUM + 1) if _splits(replace(setup, ranks=ranks, micro_batch=1))]
    yield [Change(f"{ranks} GPUs", 32 * ranks, _set(ranks=ranks)) for ranks in more]


def _set(**values: object) -> Callable[[Setup], Setup]:
    return lambda setup: replace(setup, **values)  # type: ignore[arg-type]


def _splits(setup: Setup) -> bool:
    """Whether so many ranks can share the global batch and the optimizer's state."""
    return setup.global_batch % (setup.micro_batch * setup.ranks) == 0 and RANK_QUANTUM % setup.ranks == 0
