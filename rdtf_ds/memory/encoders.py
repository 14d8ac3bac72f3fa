"""Sizes of the frozen encoders, from their configs alone; Table 6's default takes the place of one that is not on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from rdtf_ds.config import EncodersSection
from rdtf_ds.memory.activations import trace_inference, without_data
from rdtf_ds.models.autoencoder import AUTOENCODER, FrameAutoencoder, HaarAutoencoder
from rdtf_ds.models.missing import EncoderNotFound, load_part
from rdtf_ds.models.text_conditioning import CLIP, T5
from rdtf_ds.models.tiny_encoders import tiny_autoencoder, tiny_clip, tiny_t5, tiny_width

# stable-diffusion-2-1's text encoder, t5-v1_1-large and sd-vae-ft-mse, as their config.json have it.
_DEFAULT_CLIP = CLIPTextConfig(
    vocab_size=49408, hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, max_position_embeddings=77
)
_DEFAULT_T5 = T5Config(
    vocab_size=32128, d_model=1024, d_kv=64, d_ff=2816, num_layers=24, num_heads=16, feed_forward_proj="gated-gelu"
)
_DEFAULT_AUTOENCODER = {
    "_class_name": "AutoencoderKL",
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 256,
}


@dataclass(frozen=True)
class Encoders:
    """Sizes of the three.

    Attributes:
        clip_dim, t5_dim: Widths of their features.
        clip_parameters, t5_parameters: Of the text encoders.
        autoencoder: Config to build it from.
        assumed: Sources that are not on this machine and were taken for Table 6's.
    """

    clip_dim: int
    t5_dim: int
    clip_parameters: int
    t5_parameters: int
    autoencoder: dict[str, Any]
    assumed: tuple[str, ...]


class AutoencoderTracer:
    """Bytes one autoencoder has alive beyond its weights and its input.

    Args:
        config: From `Encoders`.
        image_size: Side of a frame in pixels.
        dtype: It computes in.
    """

    def __init__(self, config: dict[str, Any], image_size: int, dtype: torch.dtype) -> None:
        self._config, self._image_size, self._dtype = config, image_size, dtype
        with without_data(dtype):
            frames = self._build(1)
            self.channels, self.factor = frames.channels, frames.factor
            self.parameters = _count(frames.vae)

    def encode(self, frames: int) -> int:
        """Of ``frames`` frames passed through at once."""
        with without_data(self._dtype):
            autoencoder = self._build(frames)
            pixels = torch.zeros(1, 3, frames, self._image_size, self._image_size, dtype=torch.float32)
            return trace_inference(autoencoder.vae, lambda: autoencoder.encode(pixels), [pixels])

    def decode(self, frames: int) -> int:
        """Of ``frames`` frames made at once."""
        side = self._image_size // self.factor
        with without_data(self._dtype):
            autoencoder = self._build(frames)
            latents = torch.zeros(1, self.channels, frames, side, side, dtype=torch.float32)
            return trace_inference(autoencoder.vae, lambda: autoencoder.decode(latents), [latents])

    def _build(self, slice_frames: int) -> FrameAutoencoder:
        known = HaarAutoencoder if self._config["_class_name"] == "HaarAutoencoder" else AutoencoderKL
        return FrameAutoencoder(known.from_config(self._config), slice_frames)


def read_encoders(sources: EncodersSection) -> Encoders:
    """What the encoders' configs say; weights are neither read nor needed.

    Only what is in a folder or in the hub's cache is looked at when the hub's client is told to stay offline (HF_HUB_OFFLINE).

    Raises:
        UserError: A source of ours that cannot be made, such as ``tiny:3``, or a folder without a readable config.
    """
    assumed: list[str] = []

    def or_default(read: Callable[[], Any], source: str, default: Any) -> Any:
        """What ``read`` gives; ``default`` for a source that is not here, which is noted.

        Raises:
            EncoderNotFound: A folder without a readable config.
        """
        try:
            return read()
        except EncoderNotFound:
            if Path(source).expanduser().is_dir():
                raise  # it is here, and broken
            assumed.append(source)
            return default

    if (width := tiny_width(sources.clip)) is not None:
        clip, clip_parameters = tiny_clip(width)[0].config, _count(tiny_clip(width)[0])
    else:
        clip = or_default(lambda: load_part(CLIPTextConfig.from_pretrained, sources.clip, CLIP), sources.clip, _DEFAULT_CLIP)
        clip_parameters = _parameters_of(CLIPTextModel, clip)
    if (width := tiny_width(sources.t5)) is not None:
        t5, t5_parameters = tiny_t5(width)[0].config, _count(tiny_t5(width)[0])
    else:
        t5 = or_default(lambda: load_part(T5Config.from_pretrained, sources.t5, T5), sources.t5, _DEFAULT_T5)
        t5_parameters = _parameters_of(T5EncoderModel, t5)
    if sources.autoencoder == "tiny":
        autoencoder = dict(tiny_autoencoder().config, _class_name="AutoencoderKL")
    elif sources.autoencoder.startswith("haar:"):
        factor = int(sources.autoencoder.removeprefix("haar:"))
        autoencoder = {"_class_name": "HaarAutoencoder", "factor": factor}
    else:
        autoencoder = or_default(
            lambda: load_part(AutoencoderKL.load_config, sources.autoencoder, AUTOENCODER), sources.autoencoder, _DEFAULT_AUTOENCODER
        )
    return Encoders(clip.hidden_size, t5.d_model, clip_parameters, t5_parameters, autoencoder, tuple(assumed))


def _parameters_of(model: Any, config: Any) -> int:
    with torch.device("meta"):
        return _count(model(config))


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
