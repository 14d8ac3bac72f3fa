from __future__ import annotations

import pytest
import torch

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
