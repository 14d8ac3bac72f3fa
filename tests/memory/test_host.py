"""The CPU as device, by hand; measured by ``tools/benchmark.py memory``, see docs/memory.md."""

from __future__ import annotations

from dataclasses import replace

from rdtf_ds.memory.host import COMPILED_BYTES, RUNNING_BYTES, STARTED_BYTES, plan_on_cpu, update_bytes
from rdtf_ds.memory.planner import plan
from tests.memory.test_planner import GROUPS, SETUP, SOURCES


def phases(**changes):
    return {phase.name: phase.bytes for phase in plan_on_cpu(replace(SETUP, **changes), SOURCES).phases}


def test_an_update_needs_the_most_for_the_largest_group():
    assert update_bytes(GROUPS[0], 1) == 20 * 2560 and update_bytes(GROUPS[0], 2) == 20 * 1280
    assert update_bytes(GROUPS[1], 1) == 12 * 256
    # The gradients of the first group are fp32 by then, and those they were cast from let go.
    assert phases()["step"]["fp32 working copies"] == (4 + 20) * 2560
    assert phases()["step"]["gradients"] == 2 * 256


def test_libraries_grow_with_the_shapes_they_compile_for():
    one, six = phases(), phases(frame_counts=6)
    assert one["initialise"]["libraries"] == six["initialise"]["libraries"] == STARTED_BYTES
    assert one["forward"]["libraries"] == RUNNING_BYTES + COMPILED_BYTES
    assert six["step"]["libraries"] - one["step"]["libraries"] == 5 * COMPILED_BYTES


def test_a_bucket_is_resident_as_far_as_it_was_written():
    whole = {phase.name: phase.bytes for phase in plan(replace(SETUP, reduce_bucket=5000), SOURCES).phases}
    assert whole["backward"]["buckets"] == 2 * 5000
    assert phases(reduce_bucket=5000)["backward"]["buckets"] == 2 * 2200


def test_what_waits_on_the_cpu_is_here():
    away = phases(ema="cpu", offload_optimizer=True, micro_batch=1)
    assert away["step"]["masters"] == 4 * 2816 and away["step"]["moments"] == 8 * 2816 and away["step"]["EMA"] == 4 * 2816
    assert phases(encoders="cpu")["step"]["encoders"] == 5000 and "encoders" not in phases(encoders="cached", validates=False)["step"]


def test_cached_encoders_are_loaded_by_the_first_validation_and_stay():
    cached, resident = phases(encoders="cached", validates=True), phases(validates=True)
    assert [cached[name].get("encoders", 0) for name in ("initialise", "forward", "step", "validation")] == [0, 5000, 5000, 5000]
    assert cached["validation"]["encoders"] == resident["validation"]["encoders"]
