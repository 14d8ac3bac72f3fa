"""Names the module where numbers first stop being finite.

One forward and one backward of the network, watched by hooks. No parameter's gradient is accumulated, so neither DeepSpeed nor an
optimizer notices, and no rank has to wait for another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class _Found(Exception):
    """Ends a pass at the first finding, which is its message."""


def first_nonfinite(network: nn.Module, losses: Callable[[], Tensor], scale: float = 1.0) -> str | None:
    """What first stops being finite when ``losses`` is computed and differentiated.

    Looked for in this order: weights; what the network is given; outputs of modules, in the order they finish, so that the innermost
    is named; the losses; gradients at outputs of modules, in backward order; gradients of weights.

    Args:
        network: Called by ``losses``; with activation checkpointing too, if non-reentrant.
        losses: (B,) losses of the samples, with graph.
        scale: Of the loss whose gradient is taken, which is the mean of ``losses``.

    Returns:
        A phrase such as "output of mid_block.temporals.0 (STILayer) is inf", or None when everything is finite.
    """
    if bad_weight := nonfinite_weight(network):
        return bad_weight
    watch = _Watch(network)
    devices = sorted({p.device.index for p in network.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices), torch.enable_grad():
            with watch.modules():
                sample_losses = losses()
            _check_losses(sample_losses)
            with watch.weights() as weights:  # modules that checkpointing runs again are not watched: they were seen before
                _differentiate(sample_losses.float().mean() * scale, weights)
    except _Found as found:
        return str(found)
    return watch.bad_weight_gradient


def nonfinite_weight(network: nn.Module) -> str | None:
    """The first weight that holds a number which is not finite, as a phrase, or None."""
    for name, parameter in network.named_parameters():
        if flaw := _flaw(parameter):
            return f"weight {name} holds {flaw}"
    return None


def _check_losses(losses: Tensor) -> None:
    for sample, loss in enumerate(losses.detach().flatten()):
        if flaw := _flaw(loss):
            raise _Found(f"loss of sample {sample} of its micro-batch is {flaw}, though every output of the network is finite")


def _differentiate(loss: Tensor, weights: list[nn.Parameter]) -> None:
    if loss.requires_grad and weights:
        torch.autograd.grad(loss, weights, allow_unused=True)


class _Watch:
    """Hooks on the modules, outputs and weights of one network.

    Hooks on outputs stay with the graph and go with it; they hold names, never tensors, so activations are freed as ever.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._last_finite_gradient: str | None = None
        self._fine_inputs: list[bool] = []  # of the modules being run, the outermost first
        self._made: set[tuple[Any, int]] = set()  # outputs that are watched already, as places in the graph
        self.bad_weight_gradient: str | None = None

    @contextmanager
    def modules(self) -> Iterator[None]:
        """Watch inputs and outputs of every module, and gradients at the outputs."""
        handles: list[RemovableHandle] = []
        try:
            for name, module in self._network.named_modules():
                title = f"{name or 'the network'} ({type(module).__name__})"
                handles.append(module.register_forward_pre_hook(partial(self._before, title), with_kwargs=True))
                handles.append(module.register_forward_hook(partial(self._after, title)))
            yield
        finally:
            self._made.clear()  # or graph and hooks would hold each other
            for handle in handles:
                handle.remove()

    @contextmanager
    def weights(self) -> Iterator[list[nn.Parameter]]:
        """The weights to differentiate by, watched: every output that has a gradient lies on the way to one of them."""
        weights = {name: parameter for name, parameter in self._network.named_parameters() if parameter.requires_grad}
        handles: list[RemovableHandle] = [
            parameter.register_hook(partial(self._weight_gradient, name))  # type: ignore[no-untyped-call]
            for name, parameter in weights.items()
        ]
        try:
            yield list(weights.values())
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, title: str, module: nn.Module, inputs: tuple[Any, ...], named_inputs: dict[str, Any]) -> None:
        # Judged here, not after the call: a module may work in place.
        flaw = next(filter(None, map(_flaw, _tensors((inputs, named_inputs)))), None)
        if flaw and module is self._network:
            raise _Found(f"an input of {title} is {flaw}")
        self._fine_inputs.append(flaw is None)

    def _after(self, title: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        inputs_were_fine = self._fine_inputs.pop()
        for tensor in _tensors(output):
            flaw = _flaw(tensor)
            if flaw and inputs_were_fine:
                raise _Found(f"output of {title} is {flaw}")
            # What a module passes on is its maker's; what no function made is a weight or an input.
            if tensor.grad_fn is not None and (tensor.grad_fn, tensor.output_nr) not in self._made:
                self._made.add((tensor.grad_fn, tensor.output_nr))
                tensor.register_hook(partial(self._gradient, title))  # type: ignore[no-untyped-call]

    def _gradient(self, title: str, gradient: Tensor) -> None:
        if flaw := _flaw(gradient):
            before = self._last_finite_gradient
            after = f"; the one before it, at the output of {before}, is finite" if before else ""
            raise _Found(f"gradient at the output of {title} is {flaw}{after}")
        self._last_finite_gradient = title

    def _weight_gradient(self, name: str, gradient: Tensor) -> Tensor:
        if self.bad_weight_gradient is None and (flaw := _flaw(gradient)):
            self.bad_weight_gradient = f"gradient of weight {name} is {flaw}, though it is finite at every module's output"
        # autograd.grad keeps what is returned here: one number, seen in the shape of the weight, instead of a second set of weights.
        return gradient.new_zeros(()).expand_as(gradient)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor of nested tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


def _flaw(tensor: Tensor) -> str | None:
    """``nan`` or ``inf`` if the tensor holds one, NaN before infinity; None if it is finite or of integers."""
    tensor = tensor.detach()
    if not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()):
        return None
    return "nan" if bool(torch.isnan(tensor).any()) else "inf"
