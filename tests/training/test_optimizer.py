from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rdtf_ds.training.optimizer import GROUP_ALIGNMENT, build_optimizer, keep_32bit_moments, split_parameters, warmed_up


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 5), nn.Linear(5, 2))


def test_every_parameter_is_in_one_group_in_module_order():
    model = network()
    groups = split_parameters(model.named_parameters(), 300, 64, {"5.weight"})
    weights = [name for group in groups if group.weight_decay for name, _ in group.parameters]
    others = [name for group in groups if not group.weight_decay for name, _ in group.parameters]
    assert weights == ["0.weight", "2.weight", "4.weight"]
    assert others == ["0.bias", "1.weight", "1.bias", "2.bias", "4.bias", "5.weight", "5.bias"]
    members = {name: p for group in groups for name, p in group.parameters}
    assert all(members[name] is p for name, p in model.named_parameters())


def test_only_weights_get_eight_bits_and_decay():
    for group in split_parameters(network().named_parameters(), 10**6, 64, {"5.weight"}):
        assert group.bits == (8 if group.weight_decay else 32)
    assert {group.bits for group in split_parameters(network().named_parameters(), 10**6, 64, bits=32)} == {32}


def test_groups_end_before_the_parameter_that_would_exceed_the_size():
    sizes = [30, 30, 30, 100, 20, 50]
    named = [(str(i), nn.Parameter(torch.zeros(size, 1))) for i, size in enumerate(sizes)]
    groups = split_parameters(named, 60, 8)
    assert [[p.numel() for _, p in group.parameters] for group in groups] == [[30, 30], [30], [100], [20], [50]]
    assert [group.padding for group in groups] == [4, 2, 4, 4, 6]


@given(st.lists(st.integers(1, 500), min_size=1, max_size=20), st.integers(1, 400), st.integers(1, 64))
def test_padded_groups_are_aligned(sizes, group_size, alignment):
    named = [(str(i), nn.Parameter(torch.zeros(size, 1))) for i, size in enumerate(sizes)]
    groups = split_parameters(named, group_size, alignment)
    assert sum(group.numel for group in groups) == sum(sizes)
    for group in groups:
        assert 0 <= group.padding < alignment and (group.numel + group.padding) % alignment == 0
        assert group.numel <= group_size or len(group.parameters) == 1


def test_alignment_keeps_quantisation_blocks_whole_on_every_supported_rank_count():
    assert GROUP_ALIGNMENT == 256 * math.lcm(1, 2, 3, 4, 6, 8, 12, 16, 32, 64) == 49_152


def test_frozen_parameters_are_left_out_and_unknown_names_refused():
    model = network()
    model[0].requires_grad_(False)
    names = [name for group in split_parameters(model.named_parameters(), 300, 64) for name, _ in group.parameters]
    assert not any(name.startswith("0.") for name in names)
    with pytest.raises(ValueError, match="nowhere.weight"):
        split_parameters(model.named_parameters(), 300, 64, {"nowhere.weight"})
    with pytest.raises(ValueError, match="no trainable"):
        split_parameters(model.requires_grad_(False).named_parameters(), 300, 64)


def test_padding_comes_last_and_norms_do_not_decay():
    groups = split_parameters(network().named_parameters(), 10**6, 64)
    paddings = {group.name: nn.Parameter(torch.zeros(group.padding)) for group in groups}
    optimizer = build_optimizer(groups, paddings, learning_rate=1e-3, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.25)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.0]
    for group, built in zip(groups, optimizer.param_groups, strict=True):
        assert built["params"][-1] is paddings[group.name]
        assert (tuple(built["betas"]), built["eps"], built["lr"]) == ((0.8, 0.9), 1e-6, 1e-3)


def least_squares(step_weights, steps: int = 100) -> None:
    """Minimises |Xw − y|² of a fixed problem with the given optimizer step."""
    generator = torch.Generator().manual_seed(5)
    x, truth = torch.randn(512, 64, generator=generator), torch.randn(64, 96, generator=generator)
    y = x @ truth + 0.1 * torch.randn(512, 96, generator=generator)
    for _ in range(steps):
        step_weights(lambda w: (x @ w - y).square().mean())


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.03), (32, 1e-5)])
def test_adamw_follows_torch(bits, tolerance):
    start = 0.1 * torch.randn(64, 96, generator=torch.Generator().manual_seed(6))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    groups = split_parameters([("w", ours)], 10**6, 256, bits=bits)
    settings = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.05}
    optimizer = build_optimizer(groups, {}, learning_rate=0.03, **settings)
    keep_32bit_moments(groups, [ours])
    reference = torch.optim.AdamW([theirs], lr=0.03, **settings)

    def step(optimizer, weight, loss):
        optimizer.zero_grad()
        loss(weight).backward()
        optimizer.step()

    least_squares(lambda loss: step(optimizer, ours, loss))
    least_squares(lambda loss: step(reference, theirs, loss))
    assert optimizer.state[ours]["state1"].dtype == (torch.uint8 if bits == 8 else torch.float32)
    assert (theirs - start).norm() > 5 * (ours - theirs).norm(), "the problem moves the weights"
    assert (ours - theirs).norm() / theirs.norm() <= tolerance


def test_32_bits_are_forgotten_with_their_tensor():
    from bitsandbytes.optim import GlobalOptimManager

    weight = nn.Parameter(torch.zeros(256, 1))
    groups = split_parameters([("w", weight)], 10**6, 256, bits=32)
    flat = copy.deepcopy(weight)
    keep_32bit_moments(groups, [flat])
    address = id(flat)
    assert GlobalOptimManager.get_instance().pid2config[address] == {"optim_bits": 32}
    del flat
    assert address not in GlobalOptimManager.get_instance().pid2config


def test_warm_up_is_linear_then_constant():
    assert [warmed_up(8.0, 4, applied) for applied in (0, 1, 2, 3, 4, 1000)] == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0]
    assert warmed_up(8.0, 0, 0) == 8.0
