"""Reads a checkpoint's fp32 weights parameter by parameter, without DeepSpeed and without ever holding the whole model.

A step folder holds, for each rank, its shard of each flat parameter group: the masters in DeepSpeed's optimizer states, and their
mean over training (EMA) in safetensors. Files are memory-mapped; one parameter at a time is joined from the ranks' shards, and what was
read of the files for it is let go again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rdtf_ds.checkpoints.manifest import MANIFEST, CheckpointError, flaw_of, read_manifest
from rdtf_ds.checkpoints.mapped_pages import let_go

Weights = Literal["ema", "master"]
Shard = Callable[[int], Tensor]
"""One rank's flat fp32 part of a group, by the group's number."""

_DEEPSPEED_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


MODEL_STATES = "mp_rank_00_model_states.pt"
"""DeepSpeed's file of compute-precision weights and counters, the same for all ranks."""


def shard_path(folder: Path, rank: int) -> Path:
    """DeepSpeed's file of one rank's masters, moments and loss scale."""
    name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    of_bf16 = folder / f"bf16_{name}"  # DeepSpeed names a bf16 run's shards so
    return of_bf16 if of_bf16.is_file() else folder / name


def ema_name(rank: int) -> str:
    """File of one rank's mean weights."""
    return f"ema_rank{rank:04d}.safetensors"


class _Opaque:
    """Stands for DeepSpeed's own objects in a shard. None is needed here, so DeepSpeed need not be installed to export."""

    def __init__(self, *args: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


@dataclass(frozen=True)
class GroupLayout:
    """One flat group: its parameters' names and shapes in order. Padding follows them and is not counted."""

    name: str
    parameters: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def numel(self) -> int:
        """Elements of all parameters together."""
        return sum(math.prod(shape) for _, shape in self.parameters)


class CheckpointWeights:
    """The weights of one complete step folder.

    Attributes:
        folder: the step folder.
        manifest: what the training run says about it.
        step: attempted optimizer steps.
        groups: layout of the flat groups.

    Raises:
        CheckpointError: no or an unreadable manifest.
    """

    def __init__(self, folder: Path, key: bytes | None = None) -> None:
        self.folder = folder
        try:
            self.manifest: dict[str, Any] = read_manifest(folder, key)
            self.step = int(self.manifest["step"])
            self._world_size = int(self.manifest["world_size"])
            self.model_config = dict(self.manifest["model"])
            self.groups = [_layout(group) for group in self.manifest["groups"]]
        except CheckpointError as error:
            raise CheckpointError(f"The checkpoint '{folder}' cannot be used: {error}. Take another step of the run.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"'{folder / MANIFEST}' cannot be used ({error!r}). Take another step of the run.") from error

    def run_config(self) -> dict[str, Any]:
        """The ``rdtf`` object of the run's resolved experiment, ``config.json`` in the run folder.

        Raises:
            CheckpointError: the step folder was taken out of its run.
        """
        path = self.folder.resolve().parent.parent / "config.json"
        try:
            return dict(json.loads(path.read_text(encoding="utf-8"))["rdtf"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"'{path}', the run's resolved experiment, cannot be read ({error!r}). Keep step folders in RUN/checkpoints/, beside "
                "RUN/config.json."
            ) from error

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's shape by name, in the order in which :meth:`parameters` gives them."""
        return {name: shape for group in self.groups for name, shape in group.parameters}

    def parameters(self, weights: Weights) -> Iterator[tuple[str, Tensor]]:
        """(name, fp32 tensor) of every parameter, a copy of its own. No more than it is in memory, whatever the length of its group.

        Raises:
            CheckpointError: a shard is missing, damaged, or of another length than the manifest says.
        """
        with ExitStack() as files:
            shards = [self._shard(rank, weights, files) for rank in range(self._world_size)]
            for number, group in enumerate(self.groups):
                flats = [shard(number) for shard in shards]
                held = sum(flat.numel() for flat in flats)
                if held < group.numel:
                    raise CheckpointError(
                        f"'{self.folder}': the shards of group {group.name} hold {held} values, its parameters {group.numel}. "
                        "Shards and manifest are not of one save; export another step."
                    )
                yield from _split(flats, group)

    def _shard(self, rank: int, weights: Weights, files: ExitStack) -> Shard:
        if weights == "master":
            return self._master_shard(rank)
        path = self._intact(ema_name(rank), "It is the mean of the weights; --weights master exports without it.")
        try:
            stored = files.enter_context(safe_open(path, framework="pt"))
            return lambda number: stored.get_tensor(self.groups[number].name)
        except SafetensorError as error:
            raise CheckpointError(f"'{path}' cannot be read ({error}). Export another step.") from error

    def _master_shard(self, rank: int) -> Shard:
        path = self._intact(shard_path(self.folder, rank).name, "Export another step of the run.")
        try:
            with torch.serialization.safe_globals([(_Opaque, name) for name in _DEEPSPEED_CLASSES]):
                state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["optimizer_state_dict"]
            flats = [flat.detach() for flat in state["single_partition_of_fp32_groups"]]
            aligned = any(any(paddings) for paddings in state.get("param_alignment_paddings", []))
        except (RuntimeError, UnpicklingError, KeyError, EOFError) as error:
            raise CheckpointError(f"'{path}' is no shard of a ZeRO-2 run ({error}). Export another step.") from error
        if aligned or len(flats) != len(self.groups):
            reason = "zero_optimization.parameter_alignment was on" if aligned else f"it has {len(flats)} groups, not {len(self.groups)}"
            raise CheckpointError(f"'{path}' is laid out in a way this package does not write: {reason}.")
        return lambda number: flats[number]

    def _intact(self, name: str, remedy: str) -> Path:
        """The path of a file whose bytes are those that were committed."""
        if name not in self.manifest["files"] or not (self.folder / name).is_file():
            raise CheckpointError(f"'{self.folder}' has no {name}. {remedy}")
        if (flaw := flaw_of(self.folder, self.manifest, {name})) is not None:
            raise CheckpointError(f"'{self.folder}': {flaw}. {remedy}")
        return self.folder / name


def _layout(group: dict[str, Any]) -> GroupLayout:
    return GroupLayout(group["name"], tuple((member["name"], tuple(member["shape"])) for member in group["parameters"]))


def _split(flats: list[Tensor], group: GroupLayout) -> Iterator[tuple[str, Tensor]]:
    """The group's parameters, copied one by one from the ranks' parts of it; what follows them is padding."""
    start = 0
    for name, shape in group.parameters:
        stop = start + math.prod(shape)
        parts = _overlaps(flats, start, stop)
        parameter = torch.cat(parts).reshape(shape)
        for part in parts:
            let_go(part)
        yield name, parameter
        start = stop


def _overlaps(flats: list[Tensor], start: int, stop: int) -> list[Tensor]:
    """Where the elements ``start`` to ``stop`` of all ranks' parts, one after the other, lie: views, in order."""
    parts, offset = [], 0
    for flat in flats:
        low, high = max(start - offset, 0), min(stop - offset, flat.numel())
        if low < high:
            parts.append(flat[low:high])
        offset += flat.numel()
    return parts or [flats[0][:0]]
