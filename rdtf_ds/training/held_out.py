"""The loss on held-out clips, the same samples at every validation: what moves in it is the model, not the draw.

Every clip is measured for each task at each timestep, with one fixed mask, noise and choice of frames, and without the min-SNR weight. A
clip is computed alone, the three tasks of a timestep at once, whatever the number of ranks and the micro-batch: the figures are those of
one rank on any number of them. Nothing is drawn from a global generator.

Legend: C latent channels, k frames of a clip, H W pixels, h w latent size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn.functional import interpolate

from rdtf_ds.data.batch import StoredFeatures
from rdtf_ds.data.sources.captions import NO_CAPTION
from rdtf_ds.diffusion.masks import Task, mask_family
from rdtf_ds.seeding import numpy_generator, torch_generator
from rdtf_ds.training.objective import Encoding, Network, Objective, read_features
from rdtf_ds.training.validation_units import go_on

TASKS = tuple(Task)
"""Computed at once: no more than the passes of guidance, so sampling stays the largest that validation needs."""


@dataclass(frozen=True)
class HeldOutClip:
    """A clip whose loss is measured.

    Attributes:
        name: What its draws are seeded with.
        caption: Whole; empty if it has none.
        frames: uint8 (k, H, W, 3), evenly spaced, k in 3..8.
    """

    name: str
    caption: str
    frames: np.ndarray


class SampleLoss(NamedTuple):
    """The loss of one sample."""

    clip: int
    task: Task
    timestep: int
    loss: float


@dataclass(frozen=True)
class _Samples:
    """A `Clips` of one clip: its three tasks at a timestep, or its frames alone, to be encoded."""

    frames: Tensor | None
    features: StoredFeatures | None
    condition_mask: Tensor
    frame_mask: Tensor
    captions: Sequence[str]
    timestep: Tensor
    noise: Tensor


class HeldOutLoss:
    """Measures this rank's share of the clips: every ``world_size``-th.

    Args:
        clips: All of them, on every rank.
        timesteps: At which each is measured.
        seed: Of the run.
        objective: Of training; its guidance, noise schedule, device and precision hold here too.
        encoders: The frozen encoders; asked for once, when the first clip is encoded.
        rank, world_size: Of this process.
    """

    def __init__(
        self,
        clips: Sequence[HeldOutClip],
        timesteps: Sequence[int],
        seed: int,
        objective: Objective,
        encoders: Callable[[], Encoding],
        rank: int,
        world_size: int,
    ) -> None:
        self.clips, self.timesteps, self._seed, self._encoders = clips, tuple(timesteps), seed, encoders
        self._objective = replace(objective, encoding=read_features, min_snr_gamma=None)
        self._mine = range(rank, len(clips), world_size)
        self._features: dict[int, StoredFeatures] = {}

    def prepare(self, hurry: Callable[[], bool] = lambda: False) -> int:
        """Encode this rank's clips, once in each start of a run; their features stay in CPU memory. Returns how many they are.

        Raises:
            Interrupted: ``hurry`` says that the run was asked to stop.
        """
        for number in self._mine:
            if number not in self._features:
                go_on(hurry)
                self._features[number] = self._encode(self.clips[number])
        return len(self._features)

    @property
    def prepared(self) -> bool:
        """Whether this rank's clips are encoded."""
        return len(self._features) == len(self._mine)

    @torch.no_grad()
    def measure(self, network: Network, hurry: Callable[[], bool] = lambda: False) -> list[SampleLoss]:
        """The losses of this rank's samples. No collectives.

        Raises:
            Interrupted: ``hurry`` says that the run was asked to stop.
        """
        self.prepare(hurry)
        measured = []
        for number in self._mine:
            for timestep in self.timesteps:
                go_on(hurry)
                samples = self._samples(number, timestep)
                losses = self._objective.losses(network, self._objective.encode(samples)).tolist()
                measured += [SampleLoss(number, task, timestep, loss) for task, loss in zip(TASKS, losses, strict=True)]
        return measured

    def _encode(self, clip: HeldOutClip) -> StoredFeatures:
        frames = rearrange(torch.from_numpy(np.ascontiguousarray(clip.frames)), "k h w c -> 1 c k h w")
        nothing = torch.empty(0)
        alone = _Samples(frames, None, nothing, nothing, [clip.caption if clip.caption.strip() else NO_CAPTION], nothing, nothing)
        with torch.no_grad():
            latents, pixels, text = self._encoders()(alone, self._objective.device)
        if pixels is not None:
            pixels = _at_latent_size(pixels, latents) if self._objective.guidance == "pixel" else None
        return StoredFeatures(latents, pixels, text.clip, text.t5).map(lambda tensor: tensor.cpu())

    def _samples(self, number: int, timestep: int) -> _Samples:
        """The clip's three tasks at a timestep, each with its own mask and noise."""
        clip, features = self.clips[number], self._features[number]
        k = len(clip.frames)
        masks = [self._mask(clip, task, k) for task in TASKS]
        shape = tuple(features.latents.shape[1:])  # (C, k, h, w)
        noise = [torch.randn(shape, generator=self._generator(clip, task, timestep)) for task in TASKS]
        return _Samples(
            frames=None,
            features=features.map(lambda tensor: repeat(tensor, "1 ... -> n ...", n=len(TASKS))),
            condition_mask=torch.tensor(masks),
            frame_mask=torch.ones(len(TASKS), k, dtype=torch.bool),
            captions=[clip.caption] * len(TASKS),
            timestep=torch.full((len(TASKS),), timestep),
            noise=torch.stack(noise),
        )

    def _mask(self, clip: HeldOutClip, task: Task, k: int) -> tuple[bool, ...]:
        family = mask_family(task, k)
        return family[int(numpy_generator(self._seed, "held-out mask", clip.name, task.value).integers(len(family)))]

    def _generator(self, clip: HeldOutClip, task: Task, timestep: int) -> torch.Generator:
        return torch_generator(self._seed, "held-out noise", clip.name, task.value, timestep)


def _at_latent_size(pixels: Tensor, latents: Tensor) -> Tensor:
    """(1, 3, k, H, W) -> (1, 3, k, h, w), as guidance by pixels will see them."""
    small = interpolate(rearrange(pixels, "1 c k h w -> k c h w"), size=tuple(latents.shape[-2:]), mode="area")
    return rearrange(small, "k c h w -> 1 c k h w")


def means(samples: Iterable[SampleLoss]) -> dict[str, float]:
    """Mean losses by name: ``loss`` of all, ``loss_IPT`` and so on by task, ``loss_t0500`` and so on by timestep.

    Summed in the order of the samples, wherever they were measured.
    """
    parts: dict[str, list[float]] = {}
    for sample in sorted(samples):
        for name in ("loss", f"loss_{sample.task.value}", f"loss_t{sample.timestep:04d}"):
            parts.setdefault(name, []).append(sample.loss)
    return {name: math.fsum(losses) / len(losses) for name, losses in sorted(parts.items())}
