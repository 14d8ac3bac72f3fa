"""Writes safetensors files tensor by tensor, so that what is written need never be in memory as a whole."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}
Spec = tuple[torch.dtype, tuple[int, ...]]


class Writable(Protocol):
    """What a file must be able to do."""

    def write(self, data: Any, /) -> Any:
        """Append bytes, or an array's buffer. What it returns is not looked at: a write that stops short must raise."""


def write_safetensors(file: Writable, specs: Mapping[str, Spec], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Stream ``tensors`` into an empty file.

    Args:
        specs: Type and shape of every tensor, in the order they come.
        tensors: (name, tensor), on any device, each released before the next is asked for.

    Raises:
        ValueError: Tensors that are not those of ``specs``.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in specs.items():
        length = dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + length]}
        offset += length
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns data to 8 bytes
    file.write(struct.pack("<Q", len(encoded)) + encoded)
    expected = iter(specs.items())
    for name, tensor in tensors:
        if next(expected, None) != (name, (tensor.dtype, tuple(tensor.shape))):
            raise ValueError(f"{name} {tuple(tensor.shape)} is not the parameter announced at this place")
        if tensor.numel():  # numpy has no bfloat16: bytes are bytes
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    missing = next(expected, None)
    if missing is not None:
        raise ValueError(f"{missing[0]} was announced and never came")
