"""Reads a checkpoint's fp32 weights parameter by parameter, without DeepSpeed and without ever holding the whole model.

A step folder holds, for each rank, its shard of each flat parameter group: the masters in DeepSpeed's optimizer states, and their
mean over training (EMA) in safetensors. Files are memory-mapped and one group at a time is joined from the ranks' shards.
"""

from __future__ import annotations

import hashlib
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

from rdtf_ds.errors import UserError

Weights = Literal["ema", "master"]
Shard = Callable[[int], Tensor]
"""One rank's flat fp32 part of a group, by the group's number."""

MANIFEST = "MANIFEST.json"
FORMAT = 1
PARTIAL = ".partial"
_DEEPSPEED_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


class CheckpointError(UserError):
    """A checkpoint that is incomplete, damaged, or not of this package."""


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


def find_step_folder(path: str | Path) -> Path:
    """``path`` itself if it is a step folder, else the newest complete step of the run folder (or its ``checkpoints``) that it is.

    Raises:
        CheckpointError: nothing complete there.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"'{path}' is no folder. Give a run folder, or one of the step… folders in its checkpoints.")
    if (path / MANIFEST).is_file():
        return path
    manifests = [*path.glob(f"step*/{MANIFEST}"), *path.glob(f"checkpoints/step*/{MANIFEST}")]
    complete = [manifest.parent for manifest in manifests if not manifest.parent.name.endswith(PARTIAL)]
    if not complete:
        raise CheckpointError(
            f"'{path}' holds no complete checkpoint: neither it nor a step folder in it has a {MANIFEST}, which is written last. "
            "Give a run folder that has saved at least once."
        )
    return max(complete, key=lambda folder: folder.name)


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

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            if self.manifest["format"] != FORMAT:
                raise ValueError(f"format {self.manifest['format']!r} where {FORMAT} is known")
            self.step = int(self.manifest["step"])
            self._world_size = int(self.manifest["world_size"])
            self.model_config = dict(self.manifest["model"])
            self.groups = [_layout(group) for group in self.manifest["groups"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"'{folder / MANIFEST}' cannot be used ({error!r}). Export another step of the run.") from error

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
        """(name, fp32 tensor) of every parameter. One group at a time is in memory.

        Raises:
            CheckpointError: a shard is missing, damaged, or of another length than the manifest says.
        """
        with ExitStack() as files:
            shards = [self._shard(rank, weights, files) for rank in range(self._world_size)]
            for number, group in enumerate(self.groups):
                flat = torch.cat([shard(number) for shard in shards])
                if flat.numel() < group.numel:
                    raise CheckpointError(
                        f"'{self.folder}': the shards of group {group.name} hold {flat.numel()} values, its parameters {group.numel}. "
                        "Shards and manifest are not of one save; export another step."
                    )
                yield from _split(flat, group)

    def _shard(self, rank: int, weights: Weights, files: ExitStack) -> Shard:
        if weights == "master":
            return self._master_shard(rank)
        path = self._intact(f"ema_rank{rank:04d}.safetensors", "It is the mean of the weights; --weights master exports without it.")
        try:
            stored = files.enter_context(safe_open(path, framework="pt"))
            return lambda number: stored.get_tensor(self.groups[number].name)
        except SafetensorError as error:
            raise CheckpointError(f"'{path}' cannot be read ({error}). Export another step.") from error

    def _master_shard(self, rank: int) -> Shard:
        suffix = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        bf16 = (self.folder / f"bf16_{suffix}").is_file()  # DeepSpeed names a bf16 run's shards so
        path = self._intact(f"bf16_{suffix}" if bf16 else suffix, "Export another step of the run.")
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
        path = self.folder / name
        committed = self.manifest.get("files", {}).get(name)
        if committed is None or not path.is_file():
            raise CheckpointError(f"'{self.folder}' has no {name}. {remedy}")
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != committed["sha256"]:
                raise CheckpointError(f"'{path}' was changed or damaged since it was written: its SHA-256 is not the manifest's. {remedy}")
        return path


def _layout(group: dict[str, Any]) -> GroupLayout:
    return GroupLayout(group["name"], tuple((member["name"], tuple(member["shape"])) for member in group["parameters"]))


def _split(flat: Tensor, group: GroupLayout) -> Iterator[tuple[str, Tensor]]:
    """The group's parameters, views of ``flat``; what follows them is padding."""
    offset = 0
    for name, shape in group.parameters:
        length = math.prod(shape)
        yield name, flat[offset : offset + length].reshape(shape)
        offset += length
