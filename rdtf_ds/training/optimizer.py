"""AdamW over aligned parameter groups, with 8-bit moments where they are safe, on the CPU if need be. The only importer of bitsandbytes.

DeepSpeed flattens each group, cuts it among the ranks and steps group by group, so the size of a group bounds the optimizer's
working memory. bitsandbytes quantises flat tensors in blocks of 256; a group whose length is a multiple of
256 · lcm(supported rank counts) keeps block borders on shard borders for all of those counts.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rdtf_ds.experiment import RANK_QUANTUM

QUANTISATION_BLOCK = 256
"""Values that share one absmax in bitsandbytes' block-wise 8-bit state."""
GROUP_ALIGNMENT = QUANTISATION_BLOCK * RANK_QUANTUM
"""49,152."""


@dataclass(frozen=True)
class ParameterGroup:
    """A run of the model's parameters that DeepSpeed flattens together.

    Attributes:
        name: Stable name, also that of the group's padding parameter.
        parameters: (name, parameter) in module order.
        bits: 8 or 32, width of the two Adam moments.
        weight_decay: Whether AdamW's decay applies.
        padding: Elements to add so that the length is a multiple of the alignment; may be 0.
    """

    name: str
    parameters: tuple[tuple[str, nn.Parameter], ...]
    bits: int
    weight_decay: bool
    padding: int

    @property
    def numel(self) -> int:
        """Elements without the padding."""
        return sum(parameter.numel() for _, parameter in self.parameters)

    def parameter_at(self, position: int) -> str:
        """Name of the parameter that holds an element of the flat group."""
        for name, parameter in self.parameters:
            position -= parameter.numel()
            if position < 0:
                return name
        return f"the padding of {self.name}"


def split_parameters(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    group_size: int,
    alignment: int = GROUP_ALIGNMENT,
    zero_initialised: frozenset[str] | set[str] = frozenset(),
    bits: int = 8,
) -> list[ParameterGroup]:
    """Cut a model's parameters into groups of about ``group_size`` elements, in module order.

    Weights (two dimensions or more) get ``bits``-wide moments and weight decay. Norms, biases and zero-initialised outputs get
    32-bit moments and no decay: they are few, and an 8-bit block cannot hold moments that start at exactly zero next to large ones.

    Args:
        named_parameters: As from ``Module.named_parameters()``; frozen ones are left out.
        group_size: Elements after which the next group begins; a single larger parameter is a group of its own.
        alignment: Every group's length plus its padding is a multiple of this.
        zero_initialised: Names of parameters the model starts at zero.
        bits: 8 or 32, for the weights.

    Raises:
        ValueError: Nothing to train, a size that is not positive, or a name in ``zero_initialised`` that does not exist.
    """
    if group_size < 1 or alignment < 1:
        raise ValueError(f"group_size and alignment must be positive, got {group_size} and {alignment}")
    trainable = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    if not trainable:
        raise ValueError("the model has no trainable parameter")
    unknown = set(zero_initialised) - {name for name, _ in trainable}
    if unknown:
        raise ValueError(f"zero-initialised parameters that the model does not have: {sorted(unknown)}")
    weights = [(name, p) for name, p in trainable if p.ndim >= 2 and name not in zero_initialised]
    chosen = {name for name, _ in weights}
    others = [(name, p) for name, p in trainable if name not in chosen]
    groups = []
    for label, members, width, decay in (("weights", weights, bits, True), ("no_decay", others, 32, False)):
        for number, run in enumerate(_runs(members, group_size)):
            length = sum(parameter.numel() for _, parameter in run)
            groups.append(ParameterGroup(f"{label}_{number:03d}", run, width, decay, -length % alignment))
    return groups


def _runs(members: Sequence[tuple[str, nn.Parameter]], group_size: int) -> list[tuple[tuple[str, nn.Parameter], ...]]:
    """Consecutive runs; one ends before the parameter that would carry it past ``group_size``."""
    runs: list[list[tuple[str, nn.Parameter]]] = []
    length = 0
    for name, parameter in members:
        if not runs or length + parameter.numel() > group_size:
            runs.append([])
            length = 0
        runs[-1].append((name, parameter))
        length += parameter.numel()
    return [tuple(run) for run in runs]


def build_optimizer(
    groups: Sequence[ParameterGroup],
    paddings: Mapping[str, nn.Parameter],
    *,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """bitsandbytes AdamW over ``groups``, the padding of each at its end.

    The width of the moments is settled later, by `keep_32bit_moments`, since DeepSpeed replaces these parameters by flat ones.

    Args:
        paddings: Group name to padding parameter, for the groups that need one.
    """
    from bitsandbytes.optim.adamw import AdamW

    # min_8bit_size 0: the width is ours to choose, per group, whatever the length of a shard.
    optimizer: torch.optim.Optimizer = AdamW(  # type: ignore[no-untyped-call]
        _with_paddings(groups, paddings, weight_decay), lr=learning_rate, betas=betas, eps=eps, optim_bits=8, min_8bit_size=0
    )
    return optimizer


def build_offloaded_optimizer(
    groups: Sequence[ParameterGroup],
    paddings: Mapping[str, nn.Parameter],
    *,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """AdamW for masters in CPU memory: torch's fused one, which reads and writes each number once.

    bitsandbytes does the same step on a CPU ten times slower with 32-bit moments, and twenty times with 8-bit ones.

    Args:
        paddings: As of `build_optimizer`.

    Raises:
        ValueError: A group of 8-bit moments, which torch's AdamW does not have.
    """
    narrow = [group.name for group in groups if group.bits != 32]
    if narrow:
        raise ValueError(f"the optimizer on the CPU has 32-bit moments, but the group {narrow[0]} asks for 8-bit ones")
    members = _with_paddings(groups, paddings, weight_decay)
    return torch.optim.AdamW(members, lr=learning_rate, betas=betas, eps=eps, fused=True)


def _with_paddings(groups: Sequence[ParameterGroup], paddings: Mapping[str, nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """The groups as optimizers take them, the padding of each at its end."""
    members: list[dict[str, Any]] = []
    for group in groups:
        parameters = [parameter for _, parameter in group.parameters]
        if group.padding:
            parameters.append(paddings[group.name])
        members.append({"params": parameters, "name": group.name, "weight_decay": weight_decay if group.weight_decay else 0.0})
    return members


def keep_32bit_moments(groups: Sequence[ParameterGroup], flat: Sequence[torch.Tensor]) -> None:
    """Give the groups that ask for it 32-bit moments.

    Must run before the first step. ``optim_bits`` in a parameter group is ignored by bitsandbytes, and an override by
    (group, index) is lost because ZeRO shows the optimizer one group at a time, always as group 0; the override by identity holds.

    Args:
        flat: The tensor that the optimizer steps for each group: this rank's fp32 shard.
    """
    from bitsandbytes.optim.optimizer import GlobalOptimManager

    overrides = GlobalOptimManager.get_instance().pid2config  # type: ignore[no-untyped-call]
    for group, tensor in zip(groups, flat, strict=True):
        if group.bits == 32:
            overrides[id(tensor)] = {"optim_bits": 32}
            # Identities are reused once a tensor is gone, and the manager outlives every optimizer of the process.
            weakref.finalize(tensor, overrides.pop, id(tensor), None)


def warmed_up(learning_rate: float, warmup_steps: int, applied_steps: int) -> float:
    """Learning rate of the next applied step: linear up to ``learning_rate`` over ``warmup_steps`` applied steps, then constant."""
    return learning_rate * min(1.0, (applied_steps + 1) / max(1, warmup_steps))
