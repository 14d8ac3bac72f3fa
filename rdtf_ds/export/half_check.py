"""Whether an exported model answers as its checkpoint does: one question asked of DFGN in the exported dtype and in fp32.

That every weight fits a dtype does not say that every activation does; a forward pass does, for the activations of one input.
Legend: F frames, h w latent size, L tokens, Dc Dt widths of the text features, ‖·‖ over all values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rdtf_ds.checkpoints.weights import Weights
from rdtf_ds.errors import UserError
from rdtf_ds.export.exporting import empty_model, open_checkpoint
from rdtf_ds.export.weight_files import DTYPES
from rdtf_ds.models.dfgn import DFGN
from rdtf_ds.models.text_conditioning import TextFeatures
from rdtf_ds.seeding import torch_generator

BARS = {"float16": 0.02, "bfloat16": 0.1, "float32": 1e-5}
"""Relative error above which an export fails its check: more than three times what a small sound model shows (a test holds them to it)."""
_TEXT_LENGTH = 77


@dataclass(frozen=True)
class HalfCheck:
    """How far the exported DFGN is from fp32.

    Attributes:
        dtype: in which it ran.
        values: that it answered.
        nonfinite: how many of them are NaN or infinite.
        relative_error: ‖exported − fp32‖ / ‖fp32‖; None when not all are finite.
        bar: what it may be at most.
    """

    dtype: str
    values: int
    nonfinite: int
    relative_error: float | None
    bar: float

    @property
    def holds(self) -> bool:
        """All finite, and as close as asked."""
        return self.relative_error is not None and self.relative_error <= self.bar

    def __str__(self) -> str:
        if self.nonfinite:
            return f"{self.nonfinite:,} of {self.values:,} values that DFGN answers in {self.dtype} are NaN or infinite: it overflows."
        verdict = "holds" if self.holds else "MISSED"
        return f"DFGN in {self.dtype} is off by {self.relative_error:.2e} of fp32's answer (bar {self.bar:g}: {verdict})."


@torch.no_grad()
def half_check(checkpoint: str | Path, folder: str | Path, weights: Weights, dtype: str) -> HalfCheck:
    """One forward pass of DFGN from the checkpoint in fp32 and one from the exported folder in ``dtype``, on the same seeded input.

    On a GPU where there is one. Takes the memory of a whole fp32 DFGN, unlike the export.

    Args:
        checkpoint, weights: what ``folder`` was exported from.
        dtype: of the export; a key of ``DTYPES``.

    Raises:
        CheckpointError: as :func:`rdtf_ds.export.exporting.export`.
        UserError: the GPU has not the memory for it.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source, section = open_checkpoint(checkpoint)
    full = empty_model(source)
    full.load_state_dict(dict(source.parameters(weights)), assign=True)
    question = seeded_question(full.config, section.data.frames, section.diffusion.steps)
    try:
        expected = _answer(full, question, torch.float32, device)
        del full
        exported: Any = DFGN.from_pretrained(str(folder), subfolder="unet", torch_dtype=DTYPES[dtype], local_files_only=True)
        answer = _answer(exported, question, DTYPES[dtype], device)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"'{folder}' is whole, but was not checked: what is free of the GPU's memory does not do for DFGN in fp32. Let what runs "
            "there end, or check on the CPU, with CUDA_VISIBLE_DEVICES= before the command and another folder."
        ) from error
    return compare(answer, expected, dtype)


def compare(answer: Tensor, expected: Tensor, dtype: str) -> HalfCheck:
    """The verdict over two answers of one shape, in any dtype."""
    nonfinite = int((~torch.isfinite(answer)).sum())
    error = None
    if not nonfinite:
        off, size = float(torch.linalg.vector_norm(answer.double() - expected.double())), float(torch.linalg.vector_norm(expected.double()))
        error = off / size if size else (math.inf if off else 0.0)  # a model that was never trained answers zeros
    return HalfCheck(dtype, answer.numel(), nonfinite, error, BARS[dtype])


Question = tuple[Tensor, Tensor, TextFeatures]
"""Sample (3, C, F, h, w), timesteps (3,) and text features (3, L, Dc), (3, L, Dt)."""


def seeded_question(config: Mapping[str, Any] | Any, frames: int, steps: int) -> Question:
    """Unit noise at the first, middle and last timestep; always the same for a model.

    h = w is twice the network's total downsampling, so that its lowest level still has 2 × 2 positions.
    """
    side = 2 ** len(config.block_out_channels)
    generator = torch_generator("half check")
    sample = torch.randn(3, config.in_channels, frames, side, side, generator=generator)
    clip, t5 = (torch.randn(3, _TEXT_LENGTH, width, generator=generator) for width in (config.clip_dim, config.t5_dim))
    return sample, torch.tensor([0, steps // 2, steps - 1]), TextFeatures(clip, t5)


def _answer(network: DFGN, question: Question, dtype: torch.dtype, device: torch.device) -> Tensor:
    """ε (3, C, F, h, w) on the CPU."""
    sample, timesteps, text = question
    network = network.to(device).eval()
    return network(sample.to(device, dtype), timesteps.to(device), text.to(device, dtype)).cpu()
