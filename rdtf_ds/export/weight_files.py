"""DFGN's weights as safetensors of one dtype, in one file or in shards of a size, named as diffusers names them.

All shapes are known before the first value, so files, headers and the shards' index follow from them, and the weights pass through one
parameter at a time.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rdtf_ds.checkpoints.durable import Digest, write_file
from rdtf_ds.checkpoints.tensor_files import Spec, write_safetensors
from rdtf_ds.errors import UserError

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
DEFAULT_SHARD = "5GB"
_STEM = "diffusion_pytorch_model"
WEIGHTS_FILE = f"{_STEM}.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class UnexportableWeight(UserError):
    """A weight that the exported dtype cannot hold, or that is no number."""


@dataclass(frozen=True)
class WeightFile:
    """One file to be: its name, and type and shape of its tensors in the order they come."""

    name: str
    specs: Mapping[str, Spec]


def bytes_of(size: str) -> int:
    """``5GB``, ``200MB``, ``1.5GiB`` or a number of bytes, in bytes.

    Raises:
        UserError: it is no size, or none above 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?B)?", size.strip().upper())
    value = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if value < 1:
        raise UserError(f"max_shard_size is '{size}': write a size above 0 such as 5GB, 200MB or 1.5GiB.")
    return value


def plan_files(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, max_shard: int) -> list[WeightFile]:
    """How the parameters are shared out: in order, a new shard before the one that would carry it past ``max_shard`` bytes.

    A single parameter above that size has a shard of its own, as in diffusers. One shard is a file without a number.
    """
    shards: list[dict[str, Spec]] = [{}]
    held = 0
    for name, shape in shapes.items():
        length = dtype.itemsize * math.prod(shape)
        if shards[-1] and held + length > max_shard:
            shards.append({})
            held = 0
        shards[-1][name] = (dtype, tuple(shape))
        held += length
    if len(shards) == 1:
        return [WeightFile(WEIGHTS_FILE, shards[0])]
    return [WeightFile(f"{_STEM}-{n:05d}-of-{len(shards):05d}.safetensors", specs) for n, specs in enumerate(shards, 1)]


def write_weights(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    parameters: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype = torch.float16,
    max_shard: int = 5 * 10**9,
) -> dict[str, Digest]:
    """Streams ``parameters`` into a folder, rounded to nearest as ``Tensor.to`` does; each file is on the disk when this returns.

    Args:
        shapes: of every parameter, in the order they come.
        parameters: (name, floating tensor), each released before the next is asked for.
        dtype: of all that is written.
        max_shard: bytes of weights in one file; one parameter above it is a file of its own.

    Returns:
        The digest of every file, the shards' index included, by name.

    Raises:
        UnexportableWeight: NaN, infinity, or a magnitude that ``dtype`` cannot hold.
        ValueError: parameters that are not those of ``shapes``.
        OSError: as the disk says.
    """
    files = plan_files(shapes, dtype, max_shard)
    cast = _cast(parameters, dtype)
    digests: dict[str, Digest] = {}
    for file in files:

        def fill(handle: Any, specs: Mapping[str, Spec] = file.specs) -> None:
            """One file: its header, then as many of the parameters as it is to hold, whichever come next."""
            write_safetensors(handle, specs, islice(cast, len(specs)))

        digests[file.name] = write_file(folder / file.name, fill)
    if next(cast, None) is not None:
        raise ValueError("there are more parameters than were announced")
    if len(files) > 1:
        index = json.dumps(_index_of(files), indent=2, sort_keys=True).encode() + b"\n"
        digests[INDEX_FILE] = write_file(folder / INDEX_FILE, lambda handle: handle.write(index))
    return digests


def refuse_unexportable(name: str, tensor: Tensor, dtype: torch.dtype = torch.float16) -> None:
    """Raises :class:`UnexportableWeight` if ``dtype`` cannot hold every value of ``tensor``."""
    if not tensor.numel():
        return
    largest = max(abs(bound.item()) for bound in tensor.aminmax())  # one pass and no copy; NaN if there is one
    if not math.isfinite(largest):
        bad = int((~torch.isfinite(tensor)).sum())
        raise UnexportableWeight(
            f"{name} holds {bad} values that are NaN or infinite: the training had diverged by this step. Export an earlier checkpoint."
        )
    limit = torch.finfo(dtype).max
    if largest > limit:
        wider = " or use --dtype bfloat16" if dtype == torch.float16 else ""
        raise UnexportableWeight(
            f"{name} reaches {largest:g}, and {str(dtype).removeprefix('torch.')} ends at {limit:g}: the training is diverging. "
            f"Export an earlier checkpoint{wider}."
        )


def _cast(parameters: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in parameters:
        refuse_unexportable(name, tensor, dtype)
        yield name, tensor.to(dtype)


def _index_of(files: Iterable[WeightFile]) -> dict[str, Any]:
    """What diffusers looks up: which file a parameter is in, and the bytes of all of them."""
    held = [(name, file.name, dtype.itemsize * math.prod(shape)) for file in files for name, (dtype, shape) in file.specs.items()]
    return {"metadata": {"total_size": sum(size for *_, size in held)}, "weight_map": {name: file for name, file, _ in held}}
