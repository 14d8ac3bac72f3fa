"""Where a module's calls compute, which is not where its weights lie while an offloading hook keeps them elsewhere."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn


def compute_device(module: nn.Module) -> torch.device:
    """The device to which accelerate's hooks on ``module`` or its parts bring it for a call; without hooks that of its weights.

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
