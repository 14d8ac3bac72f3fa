"""Adam's 32-bit moments as the two optimizers write them: bitsandbytes on the device, torch's AdamW when they wait on the CPU.

Both keep the two exponential means of Adam's paper, unscaled, in fp32, and the number of steps; they differ in names alone. So a run
may move its optimizer between GPU and CPU at a resume, and no bit of its state changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rdtf_ds.checkpoints.manifest import CheckpointError

QUANT = "__bnb_optimizer_quant_state__"
"""Under which bitsandbytes nests the tensors of its state on disk."""
_NAMES = {"state1": "exp_avg", "state2": "exp_avg_sq"}


def as_torch_writes(moments: Mapping[str, Any], group: str) -> dict[str, Any]:
    """One group's state for torch's AdamW; what is torch's already stays as it is.

    Raises:
        CheckpointError: Moments of 8 bits, which torch's AdamW does not have.
    """
    if "exp_avg" in moments:
        return dict(moments)
    nested: Mapping[str, Tensor] = moments[QUANT]
    if any(nested[key].dtype != torch.float32 for key in _NAMES):
        raise CheckpointError(
            f"The moments of group {group} are 8 bits wide, but on the CPU they have 32: a run cannot change rdtf.optimizer.bits."
        )
    return {"step": torch.tensor(float(moments["step"])), **{theirs: nested[ours] for ours, theirs in _NAMES.items()}}


def as_bitsandbytes_writes(moments: Mapping[str, Any], group: str) -> dict[str, Any]:
    """One group's state for bitsandbytes; what is bitsandbytes' already stays as it is."""
    if "exp_avg" not in moments:
        return dict(moments)
    return {"step": int(moments["step"]), QUANT: {ours: moments[theirs] for ours, theirs in _NAMES.items()}}
