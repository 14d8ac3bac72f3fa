from __future__ import annotations

import pytest
import torch

from rdtf_ds.experiment import load_experiment
from rdtf_ds.training import assembly
from rdtf_ds.training import ema as ema_module
from rdtf_ds.training.ema import ShardedEMA


def test_mean_follows_the_ramp_exactly():
    master = torch.tensor([1.0, -2.0], dtype=torch.float32)
    ema = ShardedEMA({"g": master}, decay=0.3)
    expected = master.double()
    for n, value in enumerate((3.0, 5.0, -7.0, 11.0)):
        master.fill_(value)
        ema.update()
        decay = min(0.3, (1 + n) / (10 + n))  # 0.1, 2/11, 0.25, 0.3 (capped)
        expected = decay * expected + (1 - decay) * value
        torch.testing.assert_close(ema.shards["g"].double(), expected, rtol=1e-6, atol=0)
    assert ema.updates == 4


def test_mean_is_a_copy_and_leaves_the_masters_alone():
    master = torch.ones(3)
    ema = ShardedEMA({"g": master}, decay=0.9)
    master.mul_(2)
    assert torch.equal(ema.shards["g"], torch.ones(3))
    ema.update()
    assert torch.equal(master, torch.full((3,), 2.0))


def test_state_goes_on_where_it_was():
    masters = {"a": torch.randn(5), "b": torch.randn(2)}
    ema = ShardedEMA(masters, decay=0.99)
    for _ in range(5):
        masters["a"].add_(1.0)
        ema.update()
    saved = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
    other = ShardedEMA(masters, decay=0.99)
    other.load_state_dict(saved)
    masters["b"].mul_(3.0)
    ema.update()
    other.update()
    assert all(torch.equal(ema.shards[name], other.shards[name]) for name in masters)
    assert other.updates == ema.updates == 6


def test_other_shards_are_refused():
    ema = ShardedEMA({"a": torch.zeros(4)}, decay=0.9)
    with pytest.raises(ValueError, match="do not fit"):
        ema.load_state_dict({"a": torch.zeros(5), "updates": torch.tensor(0)})
    with pytest.raises(ValueError, match="between 0 and 1"):
        ShardedEMA({}, decay=1.0)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_swap_shows_the_mean_and_restores_the_weights_bit_for_bit(make_engine, train, precision):
    engine = make_engine(precision)
    ema = ShardedEMA(dict(zip([group.name for group in engine.groups], engine.masters, strict=True)), decay=0.9)
    for step in range(4):
        train(engine, range(step, step + 1))
        ema.update()
    before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    masters = [master.detach().clone() for master in engine.masters]
    with ema.applied_to(engine):
        for group in engine.groups:
            offset = 0
            for name, parameter in group.parameters:
                mean = ema.shards[group.name][offset : offset + parameter.numel()].view_as(parameter)
                assert torch.equal(dict(engine.model.named_parameters())[name], mean.to(engine.dtype)), name
                offset += parameter.numel()
        assert not torch.equal(engine.model.first.weight, before["first.weight"])
    assert all(torch.equal(p, before[name]) for name, p in engine.model.named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(masters, engine.masters, strict=True))


def test_a_rank_that_fails_alone_enters_no_collective():
    class Engine:
        def __init__(self):
            self.masters, self.shown = [torch.ones(3)], []

        def show(self, shards):
            self.shown.append([shard.clone() for shard in shards])

    engine = Engine()
    ema = ShardedEMA({"g": torch.zeros(3)}, decay=0.9)
    with pytest.raises(RuntimeError, match="out of memory"), ema.applied_to(engine):
        raise RuntimeError("out of memory")
    assert len(engine.shown) == 1 and torch.equal(engine.shown[0][0], torch.zeros(3))


def named(engine):
    return dict(zip([group.name for group in engine.groups], engine.masters, strict=True))


def staged(ema):
    """The way of an update whose masters are on a GPU, walked on a machine without one."""
    ema._staging = ema_module._staging(list(ema._masters.values()))
    return ema


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_mean_that_waits_elsewhere_is_the_same_to_the_bit(make_engine, train, precision):
    engine = make_engine(precision)
    beside = ShardedEMA(named(engine), decay=0.9)
    waiting = staged(ShardedEMA(named(engine), decay=0.9, device=torch.device("cpu")))
    for step in range(4):
        train(engine, range(step, step + 1))
        beside.update()
        waiting.update()
    assert beside.updates == waiting.updates == 4
    shown = {}
    for name, ema in (("beside", beside), ("waiting", waiting)):
        with ema.applied_to(engine):
            shown[name] = [p.detach().clone() for p in engine.model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(shown["beside"], shown["waiting"], strict=True))
    assert all(torch.equal(beside.shards[name], waiting.shards[name]) for name in beside.shards)


def test_a_mean_may_go_on_on_another_device(make_engine, train):
    engine = make_engine()
    first = ShardedEMA(named(engine), decay=0.9)
    train(engine, range(1))
    first.update()
    second = staged(ShardedEMA(named(engine), decay=0.9, device=torch.device("cpu")))
    second.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
    third = ShardedEMA(named(engine), decay=0.9)
    third.load_state_dict({name: tensor.clone() for name, tensor in second.state_dict().items()})
    train(engine, range(1, 2))
    for ema in (first, second, third):
        ema.update()
    assert all(torch.equal(first.shards[name], ema.shards[name]) for ema in (second, third) for name in first.shards)


def test_the_staging_memory_is_that_of_the_largest_shard_and_only_there_when_needed(make_engine):
    engine = make_engine()
    assert ShardedEMA(named(engine), decay=0.9)._staging is None
    assert ShardedEMA(named(engine), decay=0.9, device=torch.device("cpu"))._staging is None, "the masters are on the CPU already"
    masters = {"small": torch.empty(3, device="meta"), "large": torch.empty(7, device="meta")}
    staging = ema_module._staging(list(masters.values()))
    assert staging.numel() == 7 and staging.device.type == "cpu"


def test_the_key_puts_the_mean_on_the_cpu(process_group, project_root, tmp_path, monkeypatch):
    """`rdtf.ema.device` reaches the EMA, and a run may go on with another one: it is no part of what must match."""
    devices = []

    class Watched(ShardedEMA):
        def __init__(self, masters, decay, device=None):
            devices.append(device)
            super().__init__(masters, decay, device)

    monkeypatch.setattr(assembly, "ShardedEMA", Watched)
    identities = []
    for device in ("gpu", "cpu"):
        settings = [f"rdtf.ema.device={device}", "rdtf.data.synthetic_clips=10", "train_batch_size=1", "rdtf.data.workers=0"]
        experiment = load_experiment(project_root / "ds_configs" / "tiny_cpu.json", settings, output_dir=tmp_path / "run")
        identities.append(assembly.build_run(experiment, 0, 1, torch.device("cpu")).identity)
    assert devices == [None, torch.device("cpu")]
    assert identities[0] == identities[1]


def test_the_mean_is_where_it_is_told_to_wait():
    ema = ShardedEMA({"a": torch.zeros(3)}, decay=0.9, device=torch.device("meta"))
    assert ema.shards["a"].device.type == "meta" and ema._staging is not None
