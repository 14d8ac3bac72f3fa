"""Frozen autoencoders between pixels and latents: AutoencoderKL, or an orthonormal Haar transform that needs no weights.

Legend: B samples, F frames, H W pixels, h w latent side (H/f, W/f), C latent channels, f the downsampling factor.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from einops import rearrange
from torch import Tensor

from rdtf_ds.errors import UserError
from rdtf_ds.models.devices import compute_device
from rdtf_ds.models.missing import Part, load_part
from rdtf_ds.models.tiny_encoders import tiny_autoencoder
from rdtf_ds.models.visiting import Visitor

AUTOENCODER = Part("autoencoder", "rdtf.encoders.autoencoder", "stabilityai/sd-vae-ft-mse", ("", "vae"))

# Mean of a 2 x 2 or 4 x 4 block's first band over the synthetic stickers on white in [-1, 1] (64 px, 8 frames of each colour x shape x
# motion used in training; tests/models/test_autoencoder.py measures it again). All other bands average to 0.
_BLOCK_MEAN = {2: 1.800, 4: 3.599}


class HaarAutoencoder(ModelMixin, ConfigMixin):
    """Orthonormal Haar packet of f x f pixel blocks: 3f² channels at 1/f of the size, its own inverse transposed, no weights.

    Channels run from low to high frequency, the three colours of a band side by side; channels 0-2 are f times the block mean.

    Args:
        factor: f, 2 or 4.
        latents_mean, latents_std: of each channel (3f²), for :class:`FrameAutoencoder` to normalise by; None: white-based stickers are
            centred, and one scale f/2 serves all bands, which gives the block mean a deviation of about 0.7 and leaves edges as small
            beside it as they are in the picture. (Each band scaled to unit variance would spend the network on edges.)

    Raises:
        ValueError: another factor, or a wrong number of statistics.
    """

    config: Any  # diffusers' FrozenDict with attributes
    packet: Tensor

    @register_to_config
    def __init__(
        self, factor: int = 2, latents_mean: list[float] | None = None, latents_std: list[float] | None = None
    ) -> None:
        super().__init__()
        if factor not in _BLOCK_MEAN:
            raise ValueError(f"the Haar autoencoder's factor is 2 or 4, got {factor}")
        mean = [_BLOCK_MEAN[factor]] * 3 + [0.0] * (3 * factor**2 - 3)
        std = [factor / 2] * (3 * factor**2)
        self.register_to_config(latents_mean=latents_mean or mean, latents_std=latents_std or std)
        if not len(self.config.latents_mean) == len(self.config.latents_std) == 3 * factor**2:
            raise ValueError(f"latents_mean and latents_std need {3 * factor**2} values at factor {factor}")
        # Saved with the model, though it follows from the factor: diffusers' loader wants a file of weights.
        self.register_buffer("packet", _packet(factor))

    @apply_forward_hook
    def encode(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 3f², H/f, W/f) in the same dtype; H and W multiples of f."""
        f = self.config.factor
        blocks = rearrange(pixels, "n c (h y) (w x) -> n h w c (y x)", y=f, x=f)
        return rearrange(blocks @ self.packet.to(blocks).T, "n h w c band -> n (band c) h w").contiguous()

    @apply_forward_hook
    def decode(self, latents: Tensor) -> Tensor:
        """(N, 3f², h, w) -> (N, 3, hf, wf): the transposed transform, exact to rounding."""
        f = self.config.factor
        bands = rearrange(latents, "n (band c) h w -> n h w c band", c=3)
        return rearrange(bands @ self.packet.to(bands), "n h w c (y x) -> n c (h y) (w x)", y=f, x=f).contiguous()


def _packet(factor: int) -> Tensor:
    """(f², f²): rows are the f x f packet's basis blocks by rising frequency. All entries are ±1/f, exact in every dtype."""
    haar = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    rows = haar if factor == 2 else torch.kron(haar, haar)  # factor 4: both bands of the first level are split again
    sign_changes = (rows.diff(dim=1) != 0).sum(dim=1)
    rows = rows[sign_changes.argsort()]
    frequency = torch.arange(factor)
    order = (frequency[:, None] + frequency[None, :]).flatten().argsort(stable=True)
    return torch.kron(rows, rows)[order] / factor


class FrameAutoencoder:
    """Encodes and decodes clips with a frozen autoencoder, a few frames at a time, in centred and scaled latents.

    Args:
        vae: AutoencoderKL or :class:`HaarAutoencoder`; put in eval mode, its parameters lose their gradients.
        slice_frames: frames that pass through it at once; bounds memory, changes no result beyond rounding.
    """

    def __init__(self, vae: Any, slice_frames: int = 8) -> None:
        self.vae: Any = vae.eval().requires_grad_(False)
        self.slice_frames = slice_frames
        self._device = compute_device(vae)
        self._dtype = next(chain(vae.parameters(), vae.buffers())).dtype
        self._on_device: AbstractContextManager[None] = nullcontext()
        if isinstance(vae, HaarAutoencoder):
            self.factor: int = vae.config.factor
            self.channels: int = 3 * self.factor**2
            self._mean, self._std = (
                torch.tensor(stats)[:, None, None] for stats in (vae.config.latents_mean, vae.config.latents_std)
            )
        else:
            self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
            self.channels = vae.config.latent_channels
            self._mean = torch.full((1, 1, 1), float(vae.config.shift_factor or 0.0))
            self._std = torch.full((1, 1, 1), 1.0 / float(vae.config.scaling_factor))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> FrameAutoencoder:
        """Moves and casts the autoencoder; returns itself."""
        if isinstance(self._on_device, Visitor):
            raise RuntimeError("this autoencoder visits its device: it cannot be moved or cast any more")
        if device is not None:
            self.vae.to(torch.device(device))
            self._device = torch.device(device)
        if dtype is not None and dtype != self._dtype:  # diffusers warns of every cast
            self.vae.to(dtype)
            self._dtype = dtype
        return self

    def visit(self, device: torch.device | str) -> FrameAutoencoder:
        """From now on the weights wait in CPU memory and are on the device for the time of a call; returns itself.

        The dtype must be final: `to` afterwards is refused.
        """
        self._on_device, self._device = Visitor(self.vae, device), torch.device(device)
        return self

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Frames in [-1, 1] (B, 3, F, H, W) -> latents (B, C, F, h, w), the posterior's mean, on the frames' device and in their dtype.

        Raises:
            ValueError: H or W is no multiple of the factor.
        """
        batch, _, _, height, width = frames.shape
        if height % self.factor or width % self.factor:
            raise ValueError(f"frames of {width}x{height} pixels cannot be encoded: both sides must be multiples of {self.factor}")
        flat = rearrange(frames, "b c f h w -> (b f) c h w")
        with self._on_device:
            latents = torch.cat([self._encode(part.to(self._device, self._dtype)) for part in flat.split(self.slice_frames)])
        latents = (latents.float() - self._mean.to(latents.device)) / self._std.to(latents.device)  # fp32: half precision rounds once
        return rearrange(latents.to(frames), "(b f) c h w -> b c f h w", b=batch)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, F, h, w) -> frames (B, 3, F, H, W), about in [-1, 1] and not clamped, in the latents' dtype and device."""
        flat = rearrange(latents, "b c f h w -> (b f) c h w").float()
        flat = flat * self._std.to(flat.device) + self._mean.to(flat.device)
        with self._on_device:
            frames = torch.cat([self._decode(part.to(self._device, self._dtype)) for part in flat.split(self.slice_frames)])
        return rearrange(frames.to(latents), "(b f) c h w -> b c f h w", b=latents.shape[0])

    def _encode(self, pixels: Tensor) -> Tensor:
        if isinstance(self.vae, HaarAutoencoder):
            return self.vae.encode(pixels)
        return self.vae.encode(pixels).latent_dist.mode()

    def _decode(self, latents: Tensor) -> Tensor:
        if isinstance(self.vae, HaarAutoencoder):
            return self.vae.decode(latents)
        return self.vae.decode(latents).sample



def load_autoencoder(source: str, dtype: torch.dtype = torch.float32, slice_frames: int = 8) -> FrameAutoencoder:
    """``haar:2``, ``haar:4``, ``tiny``, a folder (the autoencoder's or a pipeline's with ``vae/``) or a hub id, as a frozen autoencoder.

    Raises:
        EncoderNotFound: nothing there, or unreadable; the message says what to download where.
        UserError: a Haar factor other than 2 and 4.
    """
    vae: Any
    if source.startswith("haar:"):
        if source not in ("haar:2", "haar:4"):
            raise UserError(f"rdtf.encoders.autoencoder is {source!r}: the Haar autoencoder comes as 'haar:2' and 'haar:4'.")
        vae = HaarAutoencoder(int(source.removeprefix("haar:")))
    elif source == "tiny":
        vae = tiny_autoencoder()
    else:
        vae = load_part(partial(_from_pretrained, dtype), source, AUTOENCODER)
    return FrameAutoencoder(vae, slice_frames).to(dtype=dtype)


def _from_pretrained(dtype: torch.dtype, source: str, subfolder: str | None = None) -> Any:
    """Loads whichever of the two classes the folder's config names."""
    config: Any = AutoencoderKL.load_config(source, subfolder=subfolder)
    cls = {"AutoencoderKL": AutoencoderKL, "HaarAutoencoder": HaarAutoencoder}.get(config.get("_class_name", ""))
    if cls is None:
        raise ValueError(f"its config.json names the class {config.get('_class_name')}, not AutoencoderKL or HaarAutoencoder")
    return cls.from_pretrained(source, subfolder=subfolder, torch_dtype=dtype)
