"""One buffer of gradients: the same numbers as DeepSpeed's own two, in less memory."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from rdtf_ds.memory.activations import LiveBytes
from rdtf_ds.training import engine as engine_module
from tests.small_engines import micro_batch

BUCKETS = {"whole": 100_000, "several parameters": 400, "smaller than the largest": 200}
"""Elements of a reduction bucket; the largest of the model's parameters has 1280."""
PRECISIONS = ("fp32", "bf16", "fp16")
OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}


@pytest.fixture
def deepspeeds_own(monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """Runs something while engines are built without the adapter."""

    def run(build: Callable[[], object]) -> object:
        with monkeypatch.context() as patch:
            patch.setattr(engine_module, "use_one_buffer", lambda optimizer: None)
            return build()

    return run


def state_of(engine):
    moments = [dict(engine._ds.optimizer.optimizer.state[master]) for master in engine.masters]
    return [master.detach().clone() for master in engine.masters], moments, [p.detach().clone() for p in engine.model.parameters()]


def equal(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bucket", BUCKETS.values(), ids=BUCKETS)
def test_every_number_is_deepspeeds_own(make_engine, train, deepspeeds_own, precision, accumulation, bucket):
    options = {"accumulation": accumulation, "clipping": 0.5, "zero": {"reduce_bucket_size": bucket}}
    engine, own = make_engine(precision, **options), deepspeeds_own(lambda: make_engine(precision, **options))
    assert "copy_grads_in_partition" in vars(engine._ds.optimizer) and "copy_grads_in_partition" not in vars(own._ds.optimizer)
    outcomes = train(engine, range(4), accumulation)
    assert outcomes == train(own, range(4), accumulation) and all(outcome.applied for outcome in outcomes)
    assert equal(state_of(engine), state_of(own))


@pytest.mark.parametrize("more", [{"reduce_scatter": False}, {"overlap_comm": True}], ids=str)
def test_other_ways_to_reduce_give_deepspeeds_own_numbers_too(make_engine, train, deepspeeds_own, more):
    options = {"accumulation": 2, "zero": {"reduce_bucket_size": 400, **more}}
    engine, own = make_engine("bf16", **options), deepspeeds_own(lambda: make_engine("bf16", **options))
    assert train(engine, range(3), 2) == train(own, range(3), 2)
    assert equal(state_of(engine), state_of(own))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sums_in_fp32_are_deepspeeds_own_as_well(make_engine, train, deepspeeds_own, precision):
    options = {"accumulation": 4, "sums": "fp32", "zero": {"reduce_bucket_size": 200}}
    engine, own = make_engine(precision, **options), deepspeeds_own(lambda: make_engine(precision, **options))
    assert train(engine, range(3), 4) == train(own, range(3), 4)
    assert equal(state_of(engine), state_of(own))


def test_sums_in_fp32_lose_less(make_engine, train):
    """Against the same micro-batches summed in double precision; the key is not ignored."""

    def gradients(micros, **options):
        engine = make_engine("bf16", bits=32, **options)
        for micro in micros:
            micro_batch(engine, 0, micro)
        return torch.cat([group.flat_partition for group in engine._ds.optimizer.averaged_gradients.values()])

    sums = {dtype: gradients(range(4), accumulation=4, sums=dtype) for dtype in (None, "fp32")}
    assert sums[None].dtype == torch.bfloat16 and sums["fp32"].dtype == torch.float32
    exact = sum(gradients([micro]).double() for micro in range(4)) / 4
    errors = {dtype: float((flat.double() - exact).abs().max()) for dtype, flat in sums.items()}
    assert errors["fp32"] < 1e-6 and errors[None] > 100 * errors["fp32"]


@pytest.mark.parametrize("bucket", BUCKETS.values(), ids=BUCKETS)
@pytest.mark.parametrize("sums", [None, "fp32"])
def test_no_gradient_outlives_its_reduction(make_engine, sums, bucket):
    """But for the bucket that the last ones are in: a gradient larger than a bucket used to stay until the end of the pass."""
    engine = make_engine("bf16", accumulation=2, sums=sums, zero={"reduce_bucket_size": bucket})
    optimizer, alive = engine._ds.optimizer, []
    reduce = optimizer.reduce_ipg_grads

    def watched(*args, **kwargs):
        reduced = [optimizer.bit16_groups[group][index] for entry in optimizer.ipg_buckets.values() for group, index, _ in entry.params]
        reduce(*args, **kwargs)
        alive.extend(parameter.grad is not None for parameter in reduced)

    optimizer.reduce_ipg_grads = watched
    micro_batch(engine, 0, 0)
    assert len(alive) == len(list(engine.model.parameters())) and not any(alive)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_second_micro_batch_needs_no_second_buffer(make_engine, deepspeeds_own, precision):
    """Peak of all tensors in a backward pass that adds to the gradients of one before it."""
    peaks = {}
    for name, build in (("ours", lambda make: make()), ("own", deepspeeds_own)):
        with LiveBytes() as live:
            engine = build(lambda: make_engine(precision, accumulation=2, bits=32, zero={"reduce_bucket_size": 300}))
            micro_batch(engine, 0, 0)
            live.restart_peak()
            micro_batch(engine, 0, 1)
            peaks[name] = live.peak
    gradients = sum(master.numel() for master in engine.masters) * engine.dtype.itemsize
    assert peaks["ours"] <= peaks["own"] - 0.9 * gradients


def test_infinity_in_one_micro_batch_skips_the_step(make_engine, train):
    engine = make_engine("fp16", accumulation=2)
    train(engine, range(1), 2)
    before = state_of(engine)
    micro_batch(engine, 1, 0, scale=1e6)  # a finite loss, gradients beyond fp16
    micro_batch(engine, 1, 1)
    outcome = engine.step()
    assert not outcome.applied and math.isfinite(outcome.loss) and equal(before, state_of(engine))
    (following,) = train(engine, range(2, 3), 2)
    other = make_engine("fp16", accumulation=2)
    train(other, range(1), 2)
    (expected,) = train(other, range(2, 3), 2)
    # Nothing of the skipped step is left, and half the loss scale leaves no trace in powers of two.
    assert following.applied and following.grad_norm == pytest.approx(expected.grad_norm, rel=1e-3)


@pytest.mark.parametrize("options", [{}, {"sums": "fp32"}, {"zero": OFFLOAD}], ids=["own precision", "fp32", "offload"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_load_in_the_middle_of_a_step_forgets_its_gradients(make_engine, train, tmp_path, precision, options):
    engine, other = (make_engine(precision, accumulation=2, bits=32, **options) for _ in range(2))
    train(engine, range(2), 2)
    (tmp_path / "step").mkdir()
    assert engine.save_shards(tmp_path / "step")[0] is None
    straight = train(engine, range(2, 4), 2)
    train(other, range(1), 2)
    micro_batch(other, 50, 0, scale=100.0)  # the first of two
    assert other.read_shards(tmp_path / "step", 1) is None
    other.load_shards(tmp_path / "step")
    assert train(other, range(2, 4), 2) == straight
    assert equal(state_of(other), state_of(engine))


def test_two_ranks_agree_with_deepspeed_to_the_bit(project_root, tmp_path):
    command = [sys.executable, "-m", "tests.training.two_ranks", "gradient_buffer", str(tmp_path)]
    ended = subprocess.run(command, cwd=project_root, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr[-5000:]
    cases = torch.load(tmp_path / "gradient_buffer_0.pt", weights_only=False)
    assert len(cases) == 8
    for rank in range(2):
        for name, (ours, own) in torch.load(tmp_path / f"gradient_buffer_{rank}.pt", weights_only=False).items():
            assert equal(ours, own), f"{name} on rank {rank}"
            assert all(outcome.applied for outcome in ours[0]), name


def test_another_deepspeed_is_refused(make_engine):
    optimizer = make_engine()._ds.optimizer
    optimizer.copy_grads_in_partition = lambda param: None
    with pytest.raises(RuntimeError, match="copy_grads_in_partition.*written anew"):
        engine_module.use_one_buffer(optimizer)
    del optimizer.copy_grads_in_partition, optimizer.grad_start_offset
    with pytest.raises(RuntimeError, match="no grad_start_offset"):
        engine_module.use_one_buffer(optimizer)


def test_an_optimizer_of_another_kind_is_refused(make_engine):
    optimizer = make_engine(bits=32, zero=OFFLOAD)._ds.optimizer
    with pytest.raises(RuntimeError, match="stay on the device"):
        engine_module.use_one_buffer(optimizer)


def test_upstream_still_makes_two_buffers(make_engine, deepspeeds_own):
    """Why the adapter is there. If this fails, DeepSpeed may do by itself what `use_one_buffer` does."""
    engine = deepspeeds_own(lambda: make_engine("bf16", accumulation=2))
    for group in range(len(engine.groups)):
        assert not engine._ds.optimizer._use_compact_grad_partition_buffer(group)
    micro_batch(engine, 0, 0)
    assert all(len(tensors) > 0 for tensors in engine._ds.optimizer.all_grad_tensors.values())
