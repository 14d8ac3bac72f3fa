from __future__ import annotations

from dataclasses import replace

import pytest

from rdtf_ds.memory.activations import TrainingTrace
from rdtf_ds.memory.gpus import GPU
from rdtf_ds.memory.levers import _families, largest_micro_batch, smallest_changes
from rdtf_ds.memory.planner import Setup, plan
from tests.memory.round_numbers import SOURCES, arrivals

SETUP = Setup(
    ranks=1, global_batch=16, micro_batch=4, compute_bytes=2, group_size=20_000_000, ema="gpu", checkpointing="none", autoencoder_slice=8,
    frames=8, reduce_bucket=50_000_000, overlap_comm=False, validates=False,
)  # fmt: skip


def card(size):
    return GPU("card", size, (7, 0))


def peak(**changes):
    return plan(replace(SETUP, **changes), SOURCES, card(0)).peak.total


def told(gpu, setup=SETUP):
    found = smallest_changes(setup, SOURCES, gpu)
    return None if found is None else [change.told.split(" (")[0] for change in found[0]]


def test_nothing_is_changed_that_fits():
    found = smallest_changes(SETUP, SOURCES, card(peak()))
    assert found is not None and found[0] == () and found[1].setup == SETUP


def test_one_change_is_better_than_two_and_a_cheap_one_than_a_dear_one():
    assert told(card(peak() - 1)) == ["zero_optimization.reduce_bucket_size=5000000"]
    assert told(card(peak(checkpointing="selective"))) == ["rdtf.memory.activation_checkpointing=selective"]
    both = told(card(peak(ema="off", checkpointing="selective", micro_batch=1) - 40_000_000), replace(SETUP, ema="off", encoders="cached"))
    assert both is not None and len(both) == 2


SMALL = replace(
    SETUP, checkpointing="blocks_cpu_offload", micro_batch=1, reduce_bucket=5_000_000, group_size=10_000_000, autoencoder_slice=1,
    encoders="cached",
)  # fmt: skip


def peak_of(setup):
    return plan(setup, SOURCES, card(0)).peak.total


def test_time_goes_before_quality_and_quality_before_money():
    assert told(card(peak_of(replace(SMALL, ema="cpu"))), SMALL) == ["rdtf.ema.device=cpu"]
    on_cpu = replace(SMALL, ema="cpu", offload_optimizer=True)
    assert told(card(peak_of(on_cpu)), SMALL) == [
        "zero_optimization.offload_optimizer.device=cpu and rdtf.optimizer.bits=32 and rdtf.ema.device=cpu"
    ]
    assert told(card(peak_of(on_cpu) - 1), on_cpu) is None, "of weights nothing is shared, and NCCL comes on top"


def test_offload_keeps_a_mean_that_is_off():
    off = replace(SMALL, ema="off")
    found = smallest_changes(off, SOURCES, card(peak_of(replace(off, offload_optimizer=True))))
    assert found is not None and found[1].setup == replace(off, offload_optimizer=True)


def test_gpu_counts_share_the_batch_and_what_nothing_helps_is_none():
    alone = replace(SMALL, global_batch=12)
    found = [change.told for changes in [list(_families(alone))[-1]] for change in changes]
    assert found == ["2 GPUs", "3 GPUs", "4 GPUs", "6 GPUs", "12 GPUs"]
    assert told(card(0)) is None


def test_changes_lead_to_the_plan_that_comes_with_them():
    gpu = card(peak(checkpointing="selective"))
    found = smallest_changes(SETUP, SOURCES, gpu)
    assert found is not None
    assert found[1] == plan(replace(SETUP, checkpointing="selective"), SOURCES, gpu)
    assert found[1].fits


@pytest.mark.parametrize(("fitting", "room"), [(1, 1), (2, 2), (2, 3), (4, 4), (8, 15)])
def test_largest_micro_batch_divides_the_batch(fitting, room):
    gpu = card(peak(micro_batch=2) + round(1.05 * 400_000_000 * (room - 2)) + 1000)
    assert largest_micro_batch(SETUP, SOURCES, gpu) == fitting
    assert plan(replace(SETUP, micro_batch=fitting), SOURCES, gpu).fits


def test_largest_micro_batch_at_the_ends():
    assert largest_micro_batch(SETUP, SOURCES, card(peak(micro_batch=16))) == 16
    assert largest_micro_batch(SETUP, SOURCES, card(peak(micro_batch=1) - 1)) is None


def test_a_whole_step_at_once_may_fit_where_half_of_it_does_not():
    """Nothing accumulates then."""
    light = replace(SOURCES, training=lambda mode, clips: TrainingTrace(0, 10**9, arrivals(clips), 0))
    gpu = card(plan(replace(SETUP, micro_batch=16), light, card(0)).peak.total)
    assert not plan(replace(SETUP, micro_batch=8), light, gpu).fits
    assert largest_micro_batch(SETUP, light, gpu) == 16
