from __future__ import annotations

from dataclasses import replace

from rdtf_ds.memory.host import plan_on_cpu
from rdtf_ds.memory.host_levers import smallest_changes_on_cpu
from rdtf_ds.memory.levers import SMALL_BUCKETS, SMALL_GROUPS
from rdtf_ds.memory.planner import Setup
from tests.memory.round_numbers import SOURCES

SETUP = Setup(
    ranks=4, global_batch=16, micro_batch=2, compute_bytes=4, group_size=100_000_000, ema="gpu", checkpointing="none", autoencoder_slice=1,
    frames=8, reduce_bucket=50_000_000, overlap_comm=False, validates=False,
)  # fmt: skip


def all_ranks(**changes):
    made = plan_on_cpu(replace(SETUP, **changes), SOURCES)
    return made.peak.total * made.setup.ranks


def told(available, setup=SETUP):
    found = smallest_changes_on_cpu(setup, SOURCES, available)
    return None if found is None else [change.split(" (")[0] for change in found[0]]


def test_nothing_is_changed_that_fits():
    assert told(all_ranks()) == [] and told(all_ranks() - 1) != []


def test_one_change_is_better_than_two_and_a_cheap_one_than_a_dear_one():
    assert told(all_ranks() - 1) == [f"zero_optimization.reduce_bucket_size={SMALL_BUCKETS}"]
    blocks = all_ranks(checkpointing="blocks")
    assert told(blocks) == ["rdtf.memory.activation_checkpointing=blocks"]
    assert len(told(blocks - 1)) == 1 or "rdtf.memory.activation_checkpointing=blocks" in told(blocks - 1)


def test_fewer_ranks_take_less_together():
    smallest = {"reduce_bucket": SMALL_BUCKETS, "group_size": SMALL_GROUPS, "checkpointing": "blocks", "micro_batch": 1, "ema": "off"}
    alone = all_ranks(**smallest, ranks=1)
    assert alone < all_ranks(**smallest, ranks=2) < all_ranks(**smallest)
    changes = told(alone)
    assert changes is not None and {"1 rank(s)", "rdtf.ema.enabled=false"} < set(changes)
    assert "2 rank(s)" not in changes and told(1) is None


def test_what_is_small_already_is_not_told_to_change():
    small = replace(SETUP, ranks=1, micro_batch=1, ema="off", checkpointing="blocks", group_size=SMALL_GROUPS, reduce_bucket=SMALL_BUCKETS)
    assert told(1, small) is None and told(10**12, small) == []
