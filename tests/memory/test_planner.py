"""The planner's arithmetic by hand, against bitsandbytes' state and against all tensors of real ZeRO-2 steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from rdtf_ds.memory.activations import GradientArrival, TrainingTrace
from rdtf_ds.memory.gpus import GPU, context_bytes
from rdtf_ds.memory.planner import AUTOENCODER, GUIDANCE_PASSES, Group, Setup, Sources, plan
from rdtf_ds.training.engine import _free_port
from tests.memory.zero_steps import predicted_and_measured

GROUPS = (Group((1000, 1000), 560, 8), Group((200,), 56, 32))  # lengths 2560 and 256
TRACE = TrainingTrace(
    saved=700,
    forward_peak=900,
    arrivals=(GradientArrival(200, 1100, 800), GradientArrival(1000, 2600, 2500), GradientArrival(1000, 2400, 2300)),
    backward_tail=100,
)
SETUP = Setup(
    ranks=1, global_batch=4, micro_batch=4, compute_bytes=2, group_size=0, ema="off", checkpointing="none", autoencoder_slice=2, frames=8,
    reduce_bucket=1300, overlap_comm=False, validates=True,
)  # fmt: skip
SOURCES = Sources(
    groups=lambda size: GROUPS,
    training=lambda mode, clips: TRACE,
    sampling=lambda clips: 10 * clips,
    encode=lambda frames: 1000 * frames,
    decode=lambda frames: 3000 * frames,
    encoders={AUTOENCODER: 2000, "t5": 3000},
)


def phases(setup=SETUP, sources=SOURCES, gpu=None):
    return {phase.name: phase.bytes for phase in plan(setup, sources, gpu).phases}


def test_what_stays_through_a_run_by_hand():
    found = phases(replace(SETUP, ema="gpu"))
    assert list(found) == ["initialise", "forward", "backward", "step", "save", "validation", "resume"]
    moments = 2 * (2560 + 4 * 10) + 8 * 256  # a float for each block of 256
    for name in ("forward", "backward", "step", "save", "validation"):
        assert found[name]["weights"] == 2 * 2816 and found[name]["masters"] == found[name]["EMA"] == 4 * 2816
        assert found[name]["moments"] == moments and found[name]["encoders"] == 5000
    assert found["resume"]["moments"] == moments, "those of a checkpoint become the live ones"
    assert found["resume"]["fp32 working copies"] == 4 * 2560
    assert "moments" not in found["initialise"]
    assert found["initialise"]["gradients"] == 4 * 2816, "DeepSpeed makes an fp32 gradient of every group at once"


def test_every_phase_at_its_worst_moment_by_hand():
    found = phases()
    assert found["forward"]["activations"] == 2000, "the autoencoder, two frames at a time"
    assert phases(sources=replace(SOURCES, encode=lambda frames: 0))["forward"]["activations"] == 900
    assert "gradients" not in found["forward"]
    # 200 and 1000 elements fill a bucket of 1300; the third gradient sends it off, and the rank's buffer of 2816 elements is made.
    assert found["backward"] | {} == found["backward"]
    backward = {key: found["backward"][key] for key in ("activations", "buckets", "gradients")}
    assert backward == {"activations": 2300, "buckets": 2600, "gradients": 2 * 2816}
    assert found["step"]["gradients"] == 2 * 2816
    assert found["step"]["fp32 working copies"] == 4 * 2560, "beside the group's own gradients, which are let go after it"
    assert found["save"]["fp32 working copies"] == 5 * 2560 and "gradients" not in found["save"]
    assert found["validation"]["activations"] == 6000
    sampled = phases(sources=replace(SOURCES, decode=lambda frames: 0))
    assert sampled["validation"]["activations"] == 10 * GUIDANCE_PASSES
    assert "validation" not in phases(replace(SETUP, validates=False))


def test_gradients_of_all_micro_batches_are_summed_in_one_buffer():
    found = phases(replace(SETUP, micro_batch=1))
    assert found["forward"]["gradients"] == found["backward"]["gradients"] == found["step"]["gradients"] == 2 * 2816
    wide = phases(replace(SETUP, micro_batch=1, grad_bytes=4))
    assert wide["forward"]["gradients"] == wide["step"]["gradients"] == 4 * 2816
    assert wide["backward"]["buckets"] == 2600 + 2 * 1200, "a sum wider than the bucket is added from a copy of the bucket"
    assert wide["step"]["fp32 working copies"] == 8 * 1000, "what is fp32 already is not copied, but for its norm"


def test_fp32_needs_no_copy_of_what_is_fp32():
    found = phases(replace(SETUP, compute_bytes=4))
    assert found["step"]["fp32 working copies"] == 8 * 1000, "those of the norm alone"
    assert found["step"]["weights"] == found["step"]["gradients"] == 4 * 2816


def test_two_ranks_share_all_but_weights_and_encoders():
    one, two = phases(), phases(replace(SETUP, ranks=2))
    assert two["step"]["weights"] == one["step"]["weights"] and two["step"]["encoders"] == one["step"]["encoders"]
    assert 2 * two["step"]["masters"] == one["step"]["masters"] and 2 * two["step"]["moments"] == one["step"]["moments"]
    assert 2 * two["step"]["gradients"] == one["step"]["gradients"], "each rank sums its own part, wherever a border cuts a parameter"
    late = replace(SOURCES, training=lambda mode, clips: replace(TRACE, backward_tail=9000))
    joined = phases(replace(SETUP, ranks=2), late)["backward"]
    assert joined["buckets"] == 2600 + 2 * 1000, "a bucket is joined from pieces before it is sent"


def test_offload_leaves_weights_and_one_parameters_gradient_on_the_gpu():
    setup = replace(SETUP, offload_optimizer=True, ema="cpu", micro_batch=1)
    found, made = phases(setup), plan(setup, SOURCES)
    assert found["step"] == {"weights": 2 * 2816, "encoders": 5000, "gradients": 2 * 1000}
    assert found["backward"]["gradients"] == 2 * 1000 and "masters" not in found["backward"]
    assert made.host["masters"] == 4 * 2816 and made.host["moments"] == 8 * 2816 and made.host["weights"] == 2 * 2816
    assert made.host["gradients"] == (4 + 2) * 2816 + 2 * 1000 and made.host["EMA"] == 4 * 2816
    assert plan(replace(setup, micro_batch=4), SOURCES).host["gradients"] == 4 * 2816 + 2 * 1000, "nothing is summed over one"
    passes = {name: seconds for name, seconds in made.seconds.items()}
    assert passes.keys() == {"zero_optimization.offload_optimizer", "rdtf.ema.device"}
    # Four micro-batches go down and three come back up, then fp32 down and weights up; 42 bytes touched.
    assert passes["zero_optimization.offload_optimizer"] == pytest.approx((2 * 7 + 4 + 2) * 2816 / 12e9 + 42 * 2816 / 20e9)
    assert passes["rdtf.ema.device"] == pytest.approx(12 * 2816 / 20e9), "masters are there already"


def test_a_mean_on_the_cpu_is_not_on_the_gpu():
    made = plan(replace(SETUP, ema="cpu"), SOURCES)
    assert all("EMA" not in phase.bytes for phase in made.phases)
    assert made.host == {"EMA": 4 * 2816 + 4 * 2560}, "and a buffer for the largest group"
    assert made.seconds == {"rdtf.ema.device": pytest.approx(4 * 2816 / 12e9 + 12 * 2816 / 20e9)}


def test_encoders_visit_one_at_a_time_or_not_at_all():
    visiting, cached = phases(replace(SETUP, encoders="cpu")), phases(replace(SETUP, encoders="cached"))
    assert visiting["forward"]["encoders"] + visiting["forward"]["activations"] == 2000 + 2000, "the autoencoder and its frames"
    large = replace(SOURCES, encoders={AUTOENCODER: 2000, "t5": 9000})
    assert phases(replace(SETUP, encoders="cpu"), large)["forward"]["encoders"] == 9000, "never both"
    assert "encoders" not in cached["forward"] and cached["forward"]["activations"] == 900
    for found in (visiting, cached):
        assert "encoders" not in found["backward"] and "encoders" not in found["step"]
        assert found["validation"]["encoders"] == 2000 and found["validation"]["activations"] == 6000
    assert plan(replace(SETUP, encoders="cpu"), SOURCES).host["encoders"] == 5000
    assert plan(replace(SETUP, encoders="cpu", micro_batch=1), SOURCES).seconds == {"rdtf.memory.encoders": 4 * 5000 / 12e9}


def test_activations_that_wait_on_the_cpu_are_the_hosts():
    sources = replace(SOURCES, training=lambda mode, clips: replace(TRACE, host=600 if mode == "blocks_cpu_offload" else 0))
    made = plan(replace(SETUP, checkpointing="blocks_cpu_offload", micro_batch=2), sources)
    assert made.host == {"activations": 600}
    assert made.seconds == {"rdtf.memory.activation_checkpointing": 2 * 2 * 600 / 12e9}, "there and back, twice a step"


def test_gradients_larger_than_a_bucket_stay_where_they_are():
    found = phases(replace(SETUP, reduce_bucket=500))
    assert found["backward"]["buckets"] == 1000 + 2 * 1000
    assert phases(replace(SETUP, reduce_bucket=5000, overlap_comm=True))["backward"]["buckets"] == 2 * 2 * 5000


def test_a_gpu_adds_context_and_slack_and_has_a_margin():
    gpu = GPU("card", 2**30, (7, 0))
    made = plan(SETUP, SOURCES, gpu)
    bare = max(sum(phase.values()) for phase in phases().values())
    assert made.peak.total == bare + round(0.05 * bare) + context_bytes(1)
    assert made.margin == 2**30 - made.peak.total and made.fits
    assert not plan(SETUP, SOURCES, replace(gpu, bytes=made.peak.total - 1)).fits
    assert plan(SETUP, SOURCES, replace(gpu, bytes=made.peak.total)).fits


def test_moments_are_as_large_as_bitsandbytes(make_engine, train):
    engine = make_engine("bf16")
    train(engine, range(1))
    states = engine._ds.optimizer.optimizer.state
    held = sum(
        tensor.nbytes for master in engine.masters for name, tensor in states[master].items() if name[:5] in ("state", "absma")
    )
    groups = tuple(Group(tuple(p.numel() for _, p in group.parameters), group.padding, group.bits) for group in engine.groups)
    assert phases(sources=replace(SOURCES, groups=lambda size: groups))["step"]["moments"] == held


@pytest.mark.parametrize(("precision", "accumulation", "bucket"), [("bf16", 2, 60_000), ("bf16", 1, 20_000), ("fp32", 2, 500_000)])
def test_phases_are_those_of_real_steps(process_group, precision, accumulation, bucket):
    """Every tensor alive in DeepSpeed's engine, one rank: the largest sum of each phase against the plan's."""
    agree(predicted_and_measured(precision, accumulation, bucket))


def test_phases_are_those_of_real_steps_of_two_ranks(project_root):
    """Where a border cuts parameters: DeepSpeed keeps their gradients whole, on both sides."""
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.memory.zero_steps"],
            cwd=project_root,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        answers = [process.communicate(timeout=300) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for process, (out, err) in zip(ranks, answers, strict=True):
        assert process.returncode == 0, err[-2000:]
        agree(json.loads(out.splitlines()[-1]))


def agree(peaks):
    assert peaks.keys() == {"initialise", "forward", "backward", "step"}
    for name, (predicted, measured) in peaks.items():
        assert predicted == pytest.approx(measured, rel=0.05), name
