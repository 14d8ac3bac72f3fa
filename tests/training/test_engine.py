from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch


def save(engine, folder):
    (folder / "step").mkdir()
    return engine.save_shards(folder / "step")


def load(engine, folder):
    assert engine.read_shards(folder / "step", 1) is None
    engine.load_shards(folder / "step")


def optimizer_of(engine):
    return engine._ds.optimizer.optimizer


def test_moments_have_the_width_of_their_group(make_engine, train):
    engine = make_engine("fp16")
    train(engine, range(1))
    widths = [optimizer_of(engine).state[master]["state1"].dtype for master in engine.masters]
    assert widths == [torch.uint8 if group.bits == 8 else torch.float32 for group in engine.groups]
    assert set(widths) == {torch.uint8, torch.float32}


def test_bits_32_makes_every_moment_fp32(make_engine, train):
    engine = make_engine(bits=32)
    train(engine, range(1))
    assert {state["state1"].dtype for state in optimizer_of(engine).state.values()} == {torch.float32}


def test_first_step_is_adamws(make_engine, train):
    """At the first step Adam's update is the sign of the gradient: each weight moves by the learning rate, decay apart."""
    engine = make_engine(bits=32, weight_decay=0.0, eps=1e-12, warmup_steps=4)
    before = [master.detach().clone() for master in engine.masters]
    (outcome,) = train(engine, range(1))
    assert outcome.learning_rate == pytest.approx(1e-2 / 4)
    moved = torch.cat([(a - b).abs() for a, b in zip(engine.masters, before, strict=True)])
    assert moved[moved > 0].numel() > 1000
    torch.testing.assert_close(moved[moved > 0], torch.full_like(moved[moved > 0], 1e-2 / 4), rtol=1e-3, atol=0)


def test_learning_rate_counts_applied_steps_only(make_engine, train):
    engine = make_engine("fp16")
    rates, applied = [], []
    for step in range(6):
        (outcome,) = train(engine, range(step, step + 1), scale=float("inf") if step in (1, 2) else 1.0)
        rates.append(outcome.learning_rate)
        applied.append(outcome.applied)
    assert applied == [True, False, False, True, True, True]
    assert rates == pytest.approx([0.0025, 0.005, 0.005, 0.005, 0.0075, 0.01])
    assert (engine.attempted_steps, engine.applied_steps) == (6, 4)


def test_overflow_leaves_the_weights_and_lowers_the_scale(make_engine, train):
    engine = make_engine("fp16")
    train(engine, range(2))
    before = [master.detach().clone() for master in engine.masters]
    (skipped,) = train(engine, range(2, 3), scale=float("inf"))
    (following,) = train(engine, range(3, 4))
    assert not skipped.applied and skipped.loss_scale == 2**10
    assert following.applied and following.loss_scale == 2**9
    assert not all(torch.equal(a, b) for a, b in zip(before, engine.masters, strict=True))


def test_an_overflow_at_the_smallest_scale_is_bad_and_one_above_it_is_a_search(make_engine, train):
    engine = make_engine("fp16", scale_power=2)
    before = [master.detach().clone() for master in engine.masters]
    outcomes = train(engine, range(4), scale=1e6)  # finite loss, gradients beyond fp16
    assert [(outcome.applied, outcome.loss_scale) for outcome in outcomes] == [(False, 4.0), (False, 2.0), (False, 1.0), (False, 1.0)]
    assert [outcome.bad for outcome in outcomes] == [False, False, True, True]
    assert engine.attempted_steps == 4 and engine.applied_steps == 0
    assert all(torch.equal(a, b) for a, b in zip(before, engine.masters, strict=True))
    assert train(engine, range(4, 5))[0].applied


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_skips_the_step(make_engine, train, precision, value):
    engine = make_engine(precision)
    train(engine, range(2))
    before = [master.detach().clone() for master in engine.masters]
    (outcome,) = train(engine, range(2, 3), scale=value)
    assert outcome.bad and not outcome.applied and not math.isfinite(outcome.loss)
    assert (engine.attempted_steps, engine.applied_steps) == (3, 2)
    assert all(torch.equal(a, b) for a, b in zip(before, engine.masters, strict=True))
    (outcome,) = train(engine, range(3, 4))
    assert outcome.applied and not outcome.bad


def test_a_bad_loss_with_good_gradients_skips_the_step_too(make_engine):
    engine = make_engine()
    losses = engine.forward(torch.ones(4, 32)).float().square().mean(dim=1)
    engine.backward(losses + torch.tensor([0.0, math.nan, 0.0, 0.0]), torch.arange(4))
    assert engine.step().bad


def test_a_bad_weight_is_named(make_engine, train):
    engine = make_engine("fp16")
    train(engine, range(1))
    assert engine.first_bad_weight() is None
    group, master = engine.groups[-1], engine.masters[-1]
    master.data[group.parameters[0][1].numel()] = 70000.0  # finite, but not in fp16
    assert engine.first_bad_weight() == group.parameters[1][0]


def test_a_bad_moment_is_named(make_engine, train):
    engine = make_engine()
    train(engine, range(1))
    optimizer_of(engine).state[engine.masters[0]]["absmax1"][0] = math.inf
    assert engine.first_bad_weight().startswith("absmax1, a moment of the group weights_000")


def test_accumulation_gives_the_gradient_of_the_whole_batch(make_engine, train):
    """Two micro-batches: mean loss, both sample orders kept, and a clipped norm equal to that of the joint gradient."""
    engine = make_engine(accumulation=2, bits=32)
    reference = make_engine(bits=32).model
    (outcome,) = train(engine, range(7, 8), accumulation=2)
    losses = []
    for micro in range(2):
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(700 + micro))
        losses.append((reference(x) - x[:, :4]).square().mean(dim=1))
    joint = torch.cat(losses)
    assert outcome.sample_losses == pytest.approx(joint.tolist(), rel=1e-6)
    assert outcome.loss == pytest.approx(joint.mean().item(), rel=1e-6)
    assert outcome.timesteps == (0, 1, 2, 3, 10, 11, 12, 13)
    gradients = torch.autograd.grad(joint.mean(), list(reference.parameters()))
    assert outcome.grad_norm == pytest.approx(torch.cat([g.flatten() for g in gradients]).norm().item(), rel=1e-5)


def test_a_step_wants_all_its_micro_batches(make_engine):
    engine = make_engine(accumulation=2)
    x = torch.randn(4, 32)
    engine.backward(engine.forward(x).square().mean(dim=1), torch.arange(4))
    with pytest.raises(RuntimeError, match="1 micro-batches, but a step takes 2"):
        engine.step()


def test_padding_is_named_and_saved_beside_the_model(make_engine, train, tmp_path):
    engine = make_engine()
    train(engine, range(1))
    for group, master in zip(engine.groups, engine.masters, strict=True):
        assert group.padding > 0 and (group.numel + group.padding) == master.numel()
    failure, files = save(engine, tmp_path)
    assert failure is None and files.keys() == {path.name for path in (tmp_path / "step").iterdir()}
    names = torch.load(tmp_path / "step" / "mp_rank_00_model_states.pt", weights_only=False)["module"].keys()
    assert {f"paddings.{group.name}" for group in engine.groups} < set(names)
    assert not any("padding" in name for name in engine.model.state_dict())


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_resumed_engine_goes_on_bit_for_bit(make_engine, train, tmp_path, precision):
    engine = make_engine(precision, clipping=0.5)
    train(engine, range(3))
    if precision == "fp16":
        train(engine, range(3, 4), scale=float("inf"))
    save(engine, tmp_path)
    first = engine.attempted_steps
    straight = train(engine, range(first, first + 3))
    other = make_engine(precision, clipping=0.5)
    train(other, range(50, 52))  # a past that must leave no trace
    load(other, tmp_path)
    assert (other.attempted_steps, other.applied_steps) == (first, 3)
    assert train(other, range(first, first + 3)) == straight
    assert all(torch.equal(a, b) for a, b in zip(engine.masters, other.masters, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(engine.model.parameters(), other.model.parameters(), strict=True))


def test_the_config_in_force_beats_the_checkpoints(make_engine, train, tmp_path):
    engine = make_engine(weight_decay=0.3, betas=(0.5, 0.6))
    train(engine, range(1))
    save(engine, tmp_path)
    other = make_engine(weight_decay=0.1, betas=(0.9, 0.95), clipping=0.25)
    load(other, tmp_path)
    assert [g["weight_decay"] for g in optimizer_of(other).param_groups if g["weight_decay"]][0] == 0.1
    assert all(tuple(g["betas"]) == (0.9, 0.95) for g in optimizer_of(other).param_groups)
    assert other._ds.optimizer.clip_grad == 0.25


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_doctored_shard_runs_no_code(make_engine, train, tmp_path):
    engine = make_engine()
    train(engine, range(1))
    save(engine, tmp_path)
    files = sorted((tmp_path / "step").iterdir())
    assert len(files) == 2
    for path in files:
        intact = path.read_bytes()
        torch.save({**torch.load(path, weights_only=False), "more": Payload(tmp_path / "executed")}, path)
        assert "Weights only load failed" in engine.read_shards(tmp_path / "step", 1)
        assert not (tmp_path / "executed").exists()
        path.write_bytes(intact)
    assert engine.read_shards(tmp_path / "step", 1) is None


def test_a_shard_that_cannot_be_written_is_reported_not_raised(make_engine, train, tmp_path, monkeypatch):
    engine = make_engine()
    train(engine, range(1))

    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    assert "unexpected pos" in save(engine, tmp_path)[0]


def test_upstream_still_loses_overrides_by_group_index(make_engine, train):
    """Why `keep_32bit_moments` goes by identity: ZeRO steps each group as group 0. If this fails, the simpler way works again."""
    from bitsandbytes.optim import GlobalOptimManager

    engine = make_engine()
    overrides = GlobalOptimManager.get_instance().index2config
    overrides[(1, 0)] = {"optim_bits": 32}
    try:
        train(engine, range(1))
    finally:
        del overrides[(1, 0)]
    assert engine.groups[1].bits == 8
    assert optimizer_of(engine).state[engine.masters[1]]["state1"].dtype == torch.uint8


def test_timesteps_are_exchanged_on_the_device_of_the_losses(make_engine):
    """The loader's tensors lie on the CPU, and nccl exchanges nothing that does."""
    engine, timesteps = make_engine(), Mock()
    losses = engine.forward(torch.ones(2, 32, dtype=engine.dtype)).float().mean(dim=1)
    engine.backward(losses, timesteps)
    timesteps.detach().to.assert_called_with(losses.device)


def test_a_port_taken_at_the_last_moment_is_not_the_users_problem(tmp_path):
    """Without a launcher the port is our own choice: the first one is taken by another program between choice and use."""
    script = """
import socket, sys
from rdtf_ds.training import engine
taken = socket.socket(); taken.bind(("127.0.0.1", 0)); taken.listen()
free, ports = engine._free_port, [taken.getsockname()[1]]
engine._free_port = lambda: ports.pop() if ports else free()
print("met", engine.start_distributed("cpu"), not ports)
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MASTER_", "RANK", "WORLD"))}
    environment = {**clean, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert "met (0, 1) True" in done.stdout, done.stderr
