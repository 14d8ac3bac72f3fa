"""What to change so that a run on CPUs fits: as `rdtf_ds.memory.levers`, for ranks that share one machine's memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

from rdtf_ds.memory.host import plan_on_cpu
from rdtf_ds.memory.levers import SMALL_BUCKETS, SMALL_GROUPS
from rdtf_ds.memory.planner import MemoryPlan, Setup, Sources

Change = tuple[str, dict[str, Any]]
"""What to type, and the fields of a setup it sets."""


def smallest_changes_on_cpu(setup: Setup, sources: Sources, available: int) -> tuple[tuple[str, ...], MemoryPlan] | None:
    """The fewest changes with which all ranks together fit into ``available`` bytes, with the plan; of as many, the cheaper first.

    Returns:
        None when no set of these changes makes it fit.
    """
    able = list(_changes(setup))
    for count in range(len(able) + 1):
        for chosen in combinations(able, count):
            fields = {key: value for _, changed in chosen for key, value in changed.items()}
            if len(fields) < sum(len(changed) for _, changed in chosen):
                continue  # two values of one field
            made = plan_on_cpu(replace(setup, **fields), sources)
            if made.peak.total * made.setup.ranks <= available:
                return tuple(told for told, _ in chosen), made
    return None


def _changes(setup: Setup) -> Iterator[Change]:
    """The cheap ones first."""
    if setup.autoencoder_slice > 1:
        yield "rdtf.memory.autoencoder_slice=1", {"autoencoder_slice": 1}
    if setup.reduce_bucket > SMALL_BUCKETS:
        yield f"zero_optimization.reduce_bucket_size={SMALL_BUCKETS}", {"reduce_bucket": SMALL_BUCKETS}
    if setup.group_size > SMALL_GROUPS:
        yield f"rdtf.optimizer.group_size={SMALL_GROUPS} (for a new run)", {"group_size": SMALL_GROUPS}
    if setup.checkpointing in ("none", "selective"):
        yield "rdtf.memory.activation_checkpointing=blocks", {"checkpointing": "blocks"}
    if setup.micro_batch > 1:
        yield "train_micro_batch_size_per_gpu=1", {"micro_batch": 1}
    for ranks in range(setup.ranks - 1, 0, -1):
        if setup.global_batch % (ranks * setup.micro_batch) == 0 and setup.ranks % ranks == 0:
            yield f"{ranks} rank(s)", {"ranks": ranks}
    if setup.ema != "off":
        yield "rdtf.ema.enabled=false (for a new run; clips get worse)", {"ema": "off"}
