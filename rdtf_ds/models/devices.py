"""What a model computes on, and in: as a command was asked, and as a loaded module answers."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn

from rdtf_ds.errors import UserError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""By the names that the commands' ``--dtype`` takes besides ``auto``."""


def choose_device(device: str, dtype: str) -> tuple[str, str]:
    """What ``--device`` and ``--dtype`` mean on this machine.

    Args:
        device: ``cpu``, ``cuda``, or ``auto``: the GPU if torch sees one.
        dtype: a name of `DTYPES`, or ``auto``: float16 on a GPU, float32 without.

    Returns:
        ``cpu`` or ``cuda``, and a name of `DTYPES`.

    Raises:
        UserError: ``cuda``, and torch sees no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here. python tools/doctor.py says why; --device cpu works without one.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "float16" if device == "cuda" else "float32"
    return device, dtype


def compute_device(module: nn.Module) -> torch.device:
    """Where a module's calls compute, which is not where its weights lie while an offloading hook keeps them elsewhere.

    That is the device to which accelerate's hooks on ``module`` or its parts bring it for a call; without hooks that of its weights.

    Raises:
        ValueError: a module without weights, buffers and hooks, which is nowhere.
    """
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    weight = next(chain(module.parameters(), module.buffers()), None)
    if weight is None:
        raise ValueError(f"{type(module).__name__} has no weights, so it is on no device")
    return weight.device
