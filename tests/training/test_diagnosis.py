"""Planted faults are named where they happen, with and without activation checkpointing, and nothing is left behind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rdtf_ds.models.dfgn import DFGN
from rdtf_ds.models.text_conditioning import TextFeatures
from rdtf_ds.training.diagnosis import first_nonfinite
from tests.small_models import CHANNELS, small_dfgn

MODES = ("none", "blocks", "blocks_cpu_offload")


class Poison(torch.autograd.Function):
    """The identity, whose backward gives NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * float("nan")


class Poisonous(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Poison.apply(x)


def network(mode: str = "none", dtype: torch.dtype = torch.float32) -> DFGN:
    model = small_dfgn().to(dtype)
    model.set_activation_checkpointing(mode)
    return model.train()


def losses_of(model: DFGN) -> Callable[[], Tensor]:
    generator, dtype = torch.Generator().manual_seed(3), model.dtype
    sample = torch.randn(2, 2 * CHANNELS, 3, 8, 8, generator=generator).to(dtype)
    text = TextFeatures(*(torch.randn(2, 5, 16, generator=generator).to(dtype) for _ in range(2)))
    frame_mask = torch.tensor([[True, True, True], [True, True, False]])
    return lambda: model(sample, torch.tensor([10, 900]), text, frame_mask).float().square().mean(dim=(1, 2, 3, 4))


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def diagnose(model: DFGN, scale: float = 1.0) -> str | None:
    return first_nonfinite(model, losses_of(model), scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_sound_network_has_no_finding(mode: str, dtype: torch.dtype) -> None:
    assert diagnose(network(mode, dtype), scale=8.0) is None


def test_the_first_bad_weight(mode: str) -> None:
    model = network(mode)
    with torch.no_grad():
        model.up_blocks[0].resnets[1].conv1.bias[3] = float("inf")
        assert diagnose(model) == "weight up_blocks.0.resnets.1.conv1.bias holds inf"
        model.down_blocks[0].temporals[0].semantic.to_q.weight[1, 2] = float("nan")
        model.down_blocks[0].temporals[0].semantic.to_q.weight[0, 0] = float("inf")
        assert diagnose(model) == "weight down_blocks.0.temporals.0.semantic.to_q.weight holds nan"


def test_a_module_that_overflows_in_half_precision_only(mode: str) -> None:
    def planted(dtype: torch.dtype) -> str | None:
        model = network(mode, dtype)
        with torch.no_grad():
            model.mid_block.resnets[0].conv2.weight.fill_(6e4)
            model.up_blocks[0].resnets[0].conv2.weight.fill_(6e4)  # later, and not to be named
        return diagnose(model)

    assert planted(torch.float16) == "output of mid_block.resnets.0.conv2 (Conv2d) is inf"
    assert planted(torch.float32) is None


def test_a_module_whose_own_sum_overflows_is_named_itself(mode: str) -> None:
    """Its parts are finite, so it is neither of them, nor anything around it."""
    model = network(mode, torch.float16)
    with torch.no_grad():
        model.mid_block.attentions[0].proj_out.bias.fill_(4e4)
        for bias in (model.mid_block.temporals[0].fusion.semantic_bias, model.mid_block.temporals[0].fusion.detail_bias):
            bias.fill_(4e4)
    assert diagnose(model) == "output of mid_block.temporals.0 (STILayer) is inf"


def test_what_the_network_is_given() -> None:
    model = network()
    text = TextFeatures(torch.zeros(1, 5, 16), torch.full((1, 5, 16), float("nan")))

    def losses() -> Tensor:
        return model(torch.zeros(1, 2 * CHANNELS, 3, 8, 8), torch.tensor([10]), text).square().mean(dim=(1, 2, 3, 4))

    assert first_nonfinite(model, losses) == "an input of the network (DFGN) is nan"


def test_a_loss_that_goes_bad_by_itself() -> None:
    model = network()
    losses = losses_of(model)
    found = first_nonfinite(model, lambda: losses() * torch.tensor([1.0, float("inf")]))
    assert found == "loss of sample 1 of its micro-batch is inf, though every output of the network is finite"


def test_the_first_bad_gradient_in_backward_order(mode: str) -> None:
    model = network(mode)
    model.mid_block.resnets[0].nonlinearity = Poisonous()  # earlier in the forward, so later in the backward
    model.mid_block.resnets[1].nonlinearity = Poisonous()
    found = diagnose(model)
    before = "mid_block.resnets.1.nonlinearity (Poisonous)"
    # A dropout of 0 passes that output on, and is not its maker.
    assert found == (
        f"gradient at the output of mid_block.resnets.1.norm2 (GroupNorm) is nan; the one before it, at the output of {before}, is finite"
    )


def test_the_scale_of_the_loss_counts(mode: str) -> None:
    model = network(mode, torch.float16)
    assert diagnose(model, scale=16.0) is None
    assert diagnose(model, scale=2.0**31) == "gradient at the output of the network (DFGN) is inf"


def test_a_gradient_that_only_weights_have(mode: str) -> None:
    """It never shows at an output, and is told when no other is bad."""
    model = network(mode)
    position = model.frame_position_scale
    del model.frame_position_scale
    poisoned = nn.Parameter(position.detach().clone())
    model.register_parameter("frame_position_scale", poisoned)
    forward = model.forward

    def with_poison(*inputs: Any) -> Tensor:
        del model._parameters["frame_position_scale"]
        model.frame_position_scale = Poison.apply(poisoned)
        try:
            return forward(*inputs)
        finally:
            del model.frame_position_scale
            model._parameters["frame_position_scale"] = poisoned

    model.forward = with_poison
    assert diagnose(model) == "gradient of weight frame_position_scale is nan, though it is finite at every module's output"
    model.mid_block.resnets[1].nonlinearity = Poisonous()
    found = diagnose(model)
    assert found is not None and found.startswith("gradient at the output of mid_block.resnets.1.norm2")


class Poisoned(nn.Module):
    """Gradients go bad on the way to the weights alone."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.late = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * Poison.apply(self.early) * Poison.apply(self.late)


def test_of_bad_weight_gradients_the_first_in_backward_order() -> None:
    model = Poisoned()
    found = first_nonfinite(model, lambda: model(torch.ones(2, 3)).sum(dim=1))
    assert found == "gradient of weight late is nan, though it is finite at every module's output"


@dataclass
class Box:
    value: Tensor
    note: str = "not a tensor"


class Named(NamedTuple):
    box: Box
    more: dict[str, list[Tensor]]


class Boxed(nn.Module):
    """Takes and gives tensors inside dataclasses, named tuples, dictionaries and lists; its fault is in one of them, or made in place."""

    def __init__(self, fault: float, place: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.fault, self.place = fault, place

    def forward(self, box: Box, *, more: Tensor) -> Named:
        if self.place == "dataclass":
            return Named(Box(box.value * self.weight + self.fault), {"more": [more]})
        if self.place == "in place":
            more.mul_(1 + self.fault)
            return Named(Box(box.value * self.weight), {"more": [more]})
        return Named(Box(box.value * self.weight), {"more": [more, more + self.fault]})


class Boxes(nn.Module):
    def __init__(self, faults: tuple[float, float], place: str) -> None:
        super().__init__()
        self.first, self.second = Boxed(faults[0], place), Boxed(faults[1], place)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(Box(x), more=x.clone())
        second = self.second(first.box, more=first.more["more"][-1])
        return second.box.value + second.more["more"][-1]


@pytest.mark.parametrize("place", ["dataclass", "list", "in place"])
@pytest.mark.parametrize(
    ("faults", "found"),
    [
        ((0.0, 0.0), None),
        ((float("inf"), 0.0), "output of first (Boxed) is inf"),
        ((0.0, float("nan")), "output of second (Boxed) is nan"),
    ],
)
def test_tensors_are_found_inside_anything(faults: tuple[float, float], found: str | None, place: str) -> None:
    """A module that works in place is judged by what it was given, not by what it made of it."""
    model = Boxes(faults, place)
    assert first_nonfinite(model, lambda: model(torch.ones(2, 3)).sum(dim=1)) == found


class Parent(nn.Module):
    """Gives its part something bad that it was not given itself."""

    def __init__(self, by_name: bool) -> None:
        super().__init__()
        self.part, self.by_name = nn.Bilinear(3, 3, 3), by_name

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x, input2=x / 0) if self.by_name else self.part(x / 0, x)


@pytest.mark.parametrize("by_name", [False, True])
def test_a_part_is_not_blamed_for_what_it_was_given(by_name: bool) -> None:
    model = nn.Sequential(nn.Identity(), Parent(by_name), nn.Identity())
    assert str(first_nonfinite(model, lambda: model(torch.ones(2, 3)).sum(dim=1))).startswith("output of 1 (Parent) is ")


def test_a_module_without_weights_or_without_gradients() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Softmax(dim=1)).requires_grad_(False)
    assert first_nonfinite(model, lambda: model(torch.ones(2, 3)).sum(dim=1)) is None
    assert first_nonfinite(nn.ReLU(), lambda: torch.ones(2, requires_grad=True)) is None


def test_whole_numbers_and_grad_mode_do_not_matter() -> None:
    model = nn.Sequential(nn.Embedding(4, 3), Poisonous())
    with torch.no_grad():
        found = first_nonfinite(model, lambda: model(torch.tensor([1, 3])).sum(dim=1))
        assert not torch.is_grad_enabled()
    assert found is not None and found.startswith("gradient at the output of 0 (Embedding) is nan")


class Given(nn.Module):
    """Gives its own weight, as learned prompts do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.weight, x


def test_outputs_that_are_weights_or_inputs_keep_no_hook() -> None:
    model, x = Given(), torch.ones(2, 3, requires_grad=True)
    before = state_of(model)

    def losses(fault: bool) -> Tensor:
        weight, passed_on = model(x)
        return (Poison.apply(weight) if fault else weight * passed_on).sum(dim=1)

    assert first_nonfinite(model, lambda: losses(False)) is None
    found = first_nonfinite(model, lambda: losses(True))
    assert found == "gradient of weight weight is nan, though it is finite at every module's output"
    assert_equal(state_of(model), before)
    assert not x._backward_hooks and x.grad is None


class Drawing(nn.Module):
    """Draws random numbers, as a dropout would, inside reentrance-free checkpointing."""

    def __init__(self, fault: float) -> None:
        super().__init__()
        self.inner, self.fault = nn.Linear(3, 3), fault

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda y: self.inner(y) * torch.rand(3) + self.fault, x, use_reentrant=False)


def state_of(model: nn.Module) -> dict[str, Any]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "modules": {name: [list(getattr(module, kind)) for kind in hooks] for name, module in model.named_modules()},
        "kwargs": [len(module._forward_hooks_with_kwargs) + len(module._forward_pre_hooks_with_kwargs) for module in model.modules()],
        "weights": {name: (p.requires_grad, list(p._backward_hooks or {}), p.detach().clone()) for name, p in model.named_parameters()},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "training": [module.training for module in model.modules()],
        "random": torch.get_rng_state(),
        "saving": torch._C._autograd._top_saved_tensors_default_hooks(True),
    }


def assert_equal(mine: Any, other: Any) -> None:
    if isinstance(mine, dict):
        assert mine.keys() == other.keys()
        for key in mine:
            assert_equal(mine[key], other[key])
    elif isinstance(mine, list | tuple):
        assert len(mine) == len(other)
        for one, two in zip(mine, other, strict=True):
            assert_equal(one, two)
    elif isinstance(mine, Tensor):
        assert torch.equal(mine, other)
    else:
        assert mine == other


def cases() -> Iterator[tuple[nn.Module, Callable[[], Tensor], str | None]]:
    for mode in MODES:
        sound = network(mode)
        yield sound, losses_of(sound), None
        overflowing = network(mode, torch.float16)
        with torch.no_grad():
            overflowing.mid_block.resnets[0].conv2.weight.fill_(6e4)
        yield overflowing, losses_of(overflowing), "output of"
        poisoned = network(mode)
        poisoned.mid_block.resnets[1].nonlinearity = Poisonous()
        yield poisoned, losses_of(poisoned), "gradient at"
    for fault, found in ((0.0, None), (float("nan"), "output of the network (Drawing)")):
        drawing = Drawing(fault)
        yield drawing, lambda drawing=drawing: drawing(torch.ones(2, 3)).sum(dim=1), found


def test_nothing_is_left_behind() -> None:
    for model, losses, expected in cases():
        frozen = next(model.parameters()).requires_grad_(False)
        for number, parameter in enumerate(model.parameters()):
            if number % 2 and parameter is not frozen:
                parameter.grad = torch.full_like(parameter, number)
        activations: list[weakref.ref[Tensor]] = []

        def remember(module: nn.Module, inputs: Any, output: Any, activations: list[Any] = activations) -> None:
            activations.extend(weakref.ref(tensor) for tensor in (output if isinstance(output, tuple) else (output,)))

        for module in model.modules():
            module.register_forward_hook(remember)
        before = state_of(model)
        gc.collect()
        gc.disable()  # nothing may wait for it
        try:
            found = first_nonfinite(model, losses)
            assert found is expected is None or found.startswith(expected)
            assert_equal(state_of(model), before)
            assert activations and all(activation() is None for activation in activations)
        finally:
            gc.enable()


def test_it_costs_one_forward_and_one_backward_and_no_second_set_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model, kept = network(), []
    calls = [0]
    model.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    differentiate = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **options: kept.append(differentiate(*args, **options)))
    assert diagnose(model) is None
    assert calls == [1] and len(kept) == 1
    gradients = [gradient for gradient in kept[0] if gradient is not None]
    assert len(gradients) == len(list(model.parameters()))
    assert {gradient.untyped_storage().nbytes() for gradient in gradients} == {4}


def test_deepspeed_notices_nothing(make_engine: Callable[..., Any], train: Callable[..., list[Any]]) -> None:
    """A diagnosis between two micro-batches of a step leaves the step what it would have been, bit for bit."""

    def masters(with_diagnosis: bool) -> list[Tensor]:
        engine = make_engine(accumulation=2)
        train(engine, range(2), accumulation=2)
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(9))
        for micro in range(2):
            engine.backward(engine.forward(x + micro).square().mean(dim=1), torch.arange(4))
            if with_diagnosis:
                assert first_nonfinite(engine.model, lambda: engine.model(x).square().mean(dim=1), scale=4.0) is None
        engine.step()
        return [master.detach().clone() for master in engine.masters]

    assert_equal(masters(True), masters(False))
