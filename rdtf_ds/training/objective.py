"""What is learned: Eq. 1 under the loss mask, from pixels and captions to one loss per sample.

Legend: B samples, C latent channels, F frames, H W pixels, h w latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rdtf_ds.data.batch import StoredFeatures
from rdtf_ds.diffusion.guidance import latent_guidance, pixel_guidance
from rdtf_ds.diffusion.loss import add_noise, masked_mse, min_snr_weight
from rdtf_ds.models.autoencoder import FrameAutoencoder
from rdtf_ds.models.text_conditioning import TextEncoders, TextFeatures

Network = Callable[[Tensor, Tensor, TextFeatures, Tensor | None], Tensor]
"""(sample, timestep, text, frame_mask) -> predicted noise, as `DFGN.forward`."""


class Clips(Protocol):
    """The part of a `Batch` the objective reads: see `rdtf_ds.data.dataset`."""

    @property
    def frames(self) -> Tensor | None:
        """uint8 (B, 3, F, H, W); None if `features` take their place."""

    @property
    def features(self) -> StoredFeatures | None:
        """What a cache holds of the clips, zero in padded frames; None if they are to be encoded."""

    @property
    def condition_mask(self) -> Tensor:
        """bool (B, F), True = the model sees this frame clean."""

    @property
    def frame_mask(self) -> Tensor:
        """bool (B, F), True = a real frame, which counts in the loss."""

    @property
    def captions(self) -> Sequence[str]:
        """B texts, hidden words as "#"; with `features` those that they are of."""

    @property
    def timestep(self) -> Tensor:
        """int64 (B,), diffusion steps from 0."""

    @property
    def noise(self) -> Tensor:
        """float32 (B, C, F, h, w), zero in padded frames."""


class Features(NamedTuple):
    """A micro-batch as the frozen encoders see it, on the device of training."""

    latents: Tensor  # (B, C, F, h, w) fp32
    pixels: Tensor | None  # in [-1, 1], (B, 3, F, ·, ·) at the frames' own size or the latents'; only guidance by pixels needs them
    text: TextFeatures


class Encoding(Protocol):
    """Where the features of a micro-batch come from: `FrozenEncoders` or `read_features`."""

    def __call__(self, batch: Clips, device: torch.device) -> Features: ...


@dataclass(frozen=True)
class FrozenEncoders:
    """Features from the encoders themselves."""

    autoencoder: FrameAutoencoder
    text: TextEncoders

    def __call__(self, batch: Clips, device: torch.device) -> Features:
        """Encode frames and captions."""
        if batch.frames is None:
            raise ValueError("a batch of stored features has no frames to encode")
        frames = batch.frames.to(device, non_blocking=True).float() / 127.5 - 1.0
        return Features(self.autoencoder.encode(frames), frames, self.text.encode(batch.captions).to(device))


def read_features(batch: Clips, device: torch.device) -> Features:
    """Features that the loader read from a cache."""
    if batch.features is None:
        raise ValueError("a batch of frames has no stored features")
    stored = batch.features.map(lambda tensor: tensor.to(device, non_blocking=True))
    pixels = None if stored.pixels is None else stored.pixels.float()
    return Features(stored.latents.float(), pixels, TextFeatures(stored.clip, stored.t5))


class Encoded(NamedTuple):
    """What the network is shown of a micro-batch, and what it must answer: all on the device, without graph."""

    sample: Tensor  # (B, C + guidance, F, h, w), noisy latents first
    timestep: Tensor  # (B,)
    text: TextFeatures
    frame_mask: Tensor  # (B, F) bool
    padded: bool  # whether any frame is
    noise: Tensor  # (B, C, F, h, w) fp32
    weight: Tensor | None  # (B,)


@dataclass(frozen=True)
class Objective:
    """ε-prediction of the frames under the loss mask, given the visible frames and the caption.

    Attributes:
        encoding: Makes or reads the features of a micro-batch.
        alphas_cumprod: (steps,) of the noise schedule.
        guidance: ``latent`` or ``pixel``: what the network sees of visible frames.
        min_snr_gamma: γ of the min-SNR weights; None: unweighted.
        device, dtype: Where and in what precision the network computes; latents, noise and loss are fp32.
    """

    encoding: Encoding
    alphas_cumprod: Tensor
    guidance: str
    min_snr_gamma: float | None
    device: torch.device
    dtype: torch.dtype

    @torch.no_grad()
    def encode(self, batch: Clips) -> Encoded:
        """The features of a micro-batch, noise added."""
        # Pinned by the loader, so that the host need not wait until they are there.
        timestep, noise, condition_mask, frame_mask = (
            tensor.to(self.device, non_blocking=True) for tensor in (batch.timestep, batch.noise, batch.condition_mask, batch.frame_mask)
        )
        latents, pixels, text = self.encoding(batch, self.device)
        noisy = add_noise(latents, noise, timestep, self.alphas_cumprod)
        visible = self._visible(pixels, latents, condition_mask)
        weight = None if self.min_snr_gamma is None else min_snr_weight(self.alphas_cumprod, timestep, self.min_snr_gamma)
        sample = torch.cat([noisy, visible], dim=1).to(self.dtype)
        padded = not bool(batch.frame_mask.all())
        return Encoded(sample, timestep, text.to(dtype=self.dtype), frame_mask, padded, noise, weight)

    def losses(self, network: Network, encoded: Encoded) -> Tensor:
        """Loss of each sample, (B,) fp32, with graph into the network."""
        # Nothing padded: the network skips the masking, with the same result.
        frame_mask = encoded.frame_mask if encoded.padded else None
        predicted = network(encoded.sample, encoded.timestep, encoded.text, frame_mask)
        return masked_mse(predicted, encoded.noise, encoded.frame_mask, encoded.weight)

    def _visible(self, pixels: Tensor | None, latents: Tensor, condition_mask: Tensor) -> Tensor:
        if self.guidance == "latent":
            return latent_guidance(latents, condition_mask)
        if pixels is None:
            raise ValueError("guidance by pixels needs them among the features")
        return pixel_guidance(pixels, condition_mask, (latents.shape[-2], latents.shape[-1]))
