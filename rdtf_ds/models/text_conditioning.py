"""Text guidance: frozen CLIP and T5 features, one linear layer each, concatenated along tokens (paper, DFGN).

Legend: B samples, L tokens (77), Dc Dt widths of the CLIP and T5 features, D context width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class TextFeatures(NamedTuple):
    """Features of a batch of captions: ``clip`` (B, L, Dc) and ``t5`` (B, L, Dt)."""

    clip: Tensor
    t5: Tensor

    def to(self, *args: object, **kwargs: object) -> TextFeatures:
        """Both tensors moved or cast as by :meth:`torch.Tensor.to`."""
        return TextFeatures(self.clip.to(*args, **kwargs), self.t5.to(*args, **kwargs))  # type: ignore[call-overload]


class TextProjection(nn.Module):
    """Maps both encoders' features to one space and joins them: (B, L, Dc), (B, L, Dt) -> (B, 2L, D)."""

    def __init__(self, clip_dim: int, t5_dim: int, context_dim: int) -> None:
        super().__init__()
        self.clip = nn.Linear(clip_dim, context_dim)
        self.t5 = nn.Linear(t5_dim, context_dim)

    def forward(self, features: TextFeatures) -> Tensor:
        """Returns the context of the spatial transformers, (B, 2L, D)."""
        return torch.cat([self.clip(features.clip), self.t5(features.t5)], dim=1)
