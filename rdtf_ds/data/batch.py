"""What the loader hands to the training loop: one micro-batch, of pixels and captions or of features from a cache.

Legend: B samples, F frames of the longest sample, H W pixels, C h w latent channels and size, L text tokens, Dc Dt widths of the CLIP and
T5 features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from rdtf_ds.data.indexing.problem import Problem
from rdtf_ds.diffusion.masks import Task


@dataclass(frozen=True, slots=True)
class StoredFeatures:
    """What the frozen encoders made of a micro-batch, from the cache; zero in padded frames.

    Attributes:
        latents: (B, C, F, h, w), float32 or float16.
        pixels: RGB in [-1, 1] at latent size, (B, 3, F, h, w), where the cache has it; else None.
        clip, t5: (B, L, Dc) and (B, L, Dt).
    """

    latents: torch.Tensor
    pixels: torch.Tensor | None
    clip: torch.Tensor
    t5: torch.Tensor

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> StoredFeatures:
        """The same with every tensor changed."""
        pixels = None if self.pixels is None else change(self.pixels)
        return StoredFeatures(change(self.latents), pixels, change(self.clip), change(self.t5))


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch, of pixels or of features from a cache. Padded frames are black, hidden, and False in ``frame_mask``.

    Attributes:
        frames: uint8 (B, 3, F, H, W); None if ``features`` take their place.
        condition_mask: bool (B, F), True = the model sees this frame clean.
        frame_mask: bool (B, F), True = a real frame, which counts in the loss.
        captions: with hidden words as "#"; `NO_CAPTION` for a clip without one.
        timestep: int64 (B,).
        noise: float32 (B, C, F, h, w), zero in padded frames.
        tasks, levels, sample_numbers: as planned; ``levels`` counts masked frames before a drop hides all.
        clip_ids: of the clips used, stand-ins included.
        problems: clips that failed to decode on the way.
        features: in the place of ``frames``; ``captions`` are then the texts they are of.
    """

    frames: torch.Tensor | None
    condition_mask: torch.Tensor
    frame_mask: torch.Tensor
    captions: list[str]
    timestep: torch.Tensor
    noise: torch.Tensor
    tasks: list[Task]
    levels: list[int]
    sample_numbers: list[int]
    clip_ids: list[int]
    problems: list[Problem]
    features: StoredFeatures | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch with its tensors in page-locked memory; a DataLoader with ``pin_memory`` calls this."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return replace(
            self,
            frames=None if self.frames is None else change(self.frames),
            features=None if self.features is None else self.features.map(change),
            **{name: change(getattr(self, name)) for name in ("condition_mask", "frame_mask", "timestep", "noise")},
        )
