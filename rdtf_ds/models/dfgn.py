"""DFGN, the discrete frame generation network (paper, Figure 2 and Table 6).

A Stable-Diffusion-2.1-shaped U-Net over single frames, with one temporal layer (STI) after each spatial transformer. Module names
follow diffusers' UNet2DConditionModel, so that its weights fit the spatial part and tests can hold one against the other.

Legend: B clips, F frames, C channels, h w latent size, (b f) frames as images, temb time embedding, L text tokens, D context width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.upsampling import Upsample2D
from einops import rearrange
from torch import Tensor, nn

from rdtf_ds.models.recompute import MODES, run_unit
from rdtf_ds.models.spatial import Resnet, SpatialTransformer
from rdtf_ds.models.sti import STILayer, TemporalConvLayer, frame_positions
from rdtf_ds.models.text_conditioning import TextFeatures, TextProjection

# What one resnet-transformer-temporal unit is called with: hidden, temb, context, frames, frame_mask -> hidden.
Unit = Callable[[Tensor, Tensor, Tensor, int, Tensor | None], Tensor]


class _Level(nn.Module):
    """One level of one side of the U-Net: resnets, and after each (where the level attends) a transformer and a temporal layer."""

    def __init__(self, widths_in: list[int], width: int, attends: bool, build: _LayerFactory) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(build.resnet(width_in, width) for width_in in widths_in)
        self.attentions = nn.ModuleList(build.transformer(width) for _ in widths_in if attends)
        self.temporals = nn.ModuleList(build.temporal(width) for _ in widths_in if attends)

    def unit(self, i: int) -> Unit:
        """Layer ``i`` as one function: what activation checkpointing recomputes at a time."""

        def run(hidden: Tensor, temb: Tensor, context: Tensor, frames: int, frame_mask: Tensor | None) -> Tensor:
            """(b f, C, h, w) -> (b f, the level's width, h, w)."""
            hidden = self.resnets[i](hidden, temb)
            return self.attend(i, hidden, context, frames, frame_mask)

        return run

    def attend(self, i: int, hidden: Tensor, context: Tensor, frames: int, frame_mask: Tensor | None) -> Tensor:
        """Spatial transformer ``i``, then its temporal layer; the identity where the level does not attend."""
        if len(self.attentions) == 0:
            return hidden
        hidden = self.attentions[i](hidden, context)
        return self.temporals[i](hidden, frames, frame_mask)


class DownBlock(_Level):
    """Layers of a level on the way down, then a halving (but on the last level)."""

    def __init__(self, width_in: int, width: int, layers: int, attends: bool, last: bool, build: _LayerFactory) -> None:
        super().__init__([width_in] + [width] * (layers - 1), width, attends, build)
        halvings = [] if last else [Downsample2D(width, use_conv=True, out_channels=width, padding=1, name="op")]
        self.downsamplers = nn.ModuleList(halvings)


class UpBlock(_Level):
    """Layers of a level on the way up, each fed one skip, then a doubling (but on the top level)."""

    def __init__(self, widths_in: list[int], width: int, attends: bool, top: bool, build: _LayerFactory) -> None:
        super().__init__(widths_in, width, attends, build)
        self.upsamplers = nn.ModuleList([] if top else [Upsample2D(width, use_conv=True, out_channels=width)])


class MidBlock(_Level):
    """Resnet, transformer and temporal layer, resnet."""

    def __init__(self, width: int, build: _LayerFactory) -> None:
        super().__init__([width], width, True, build)
        self.resnets.append(build.resnet(width, width))

    def unit(self, i: int) -> Unit:
        """The whole middle as one function (``i`` is 0)."""
        first = super().unit(0)

        def run(hidden: Tensor, temb: Tensor, context: Tensor, frames: int, frame_mask: Tensor | None) -> Tensor:
            """(b f, C, h, w) -> same."""
            return self.resnets[1](first(hidden, temb, context, frames, frame_mask), temb)

        return run


class _LayerFactory:
    """The three kinds of layer, with everything but their widths settled."""

    def __init__(
        self, temb_width: int, norm_groups: int, head_channels: int, context_dim: int, temporal: Callable[[int], nn.Module]
    ) -> None:
        self.temb_width, self.norm_groups = temb_width, norm_groups
        self.head_channels, self.context_dim = head_channels, context_dim
        self.temporal = temporal

    def resnet(self, width_in: int, width: int) -> Resnet:
        """(b f, width_in, h, w) and temb -> (b f, width, h, w)."""
        return Resnet(width_in, width, self.temb_width, self.norm_groups)

    def transformer(self, width: int) -> SpatialTransformer:
        """(b f, width, h, w) and the text -> same; heads of ``head_channels`` each."""
        return SpatialTransformer(width, self.head_channels, self.context_dim, self.norm_groups)


class DFGN(ModelMixin, ConfigMixin):
    """Predicts the noise of every frame of a clip, given some frames clean and a caption.

    Args:
        in_channels: noisy latents and visual guidance together (Table 6: 8).
        out_channels: of the predicted noise (Table 6: 4).
        block_out_channels: width of each level.
        attention_levels: which levels have spatial transformers and temporal layers.
        layers_per_block: resnets of a level on the way down; one more on the way up (Table 6: 2).
        head_channels: width of a head of the spatial transformers (Table 6: 64).
        norm_groups: of every GroupNorm.
        context_dim: width both text features are projected to (Table 6: 1024).
        clip_dim, t5_dim: widths of the text features.
        temporal_layer: ``sti``, or ``conv3d`` for Table 3's first row.
        sti_heads, sti_head_dim, sti_kernel_size: Table 6: 8, 32, 3.
        sti_gamma: γ of each level; None takes 2 where the side is at least 16, else 1.
        guidance: ``latent`` or ``pixel``: what the guidance channels hold; the pipeline reads it.
        attention_backend: of the STI attention.

    Raises:
        ValueError: widths that groups or heads do not divide, or level lists of different lengths.
    """

    config_name = "config.json"
    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        in_channels: int = 8,
        out_channels: int = 4,
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        attention_levels: tuple[bool, ...] = (True, True, True, False),
        layers_per_block: int = 2,
        head_channels: int = 64,
        norm_groups: int = 32,
        context_dim: int = 1024,
        clip_dim: int = 1024,
        t5_dim: int = 1024,
        temporal_layer: str = "sti",
        sti_heads: int = 8,
        sti_head_dim: int = 32,
        sti_kernel_size: int = 3,
        sti_gamma: tuple[int, ...] | None = None,
        guidance: str = "latent",
        attention_backend: str = "auto",
    ) -> None:
        super().__init__()
        widths = tuple(block_out_channels)
        gammas = tuple(sti_gamma) if sti_gamma else (None,) * len(widths)
        _check_widths(widths, tuple(attention_levels), gammas, norm_groups, head_channels)
        self.checkpointing = "none"
        # A linear layer of the widest level and a feed-forward's second one on the first are the cheapest results that are kept.
        self.keep_from = 4 * widths[0]

        temb_width = 4 * widths[0]
        self.time_proj = Timesteps(widths[0], flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(widths[0], temb_width)
        self.text_projection = TextProjection(clip_dim, t5_dim, context_dim)
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)

        def factory(gamma: int | None) -> _LayerFactory:
            """What makes the layers of a level; ``gamma`` None: by the size of what they are called with."""

            def temporal(width: int) -> nn.Module:
                """(b f, width, h, w) -> same, across the frames of a clip: STI, or the convolution it is compared with."""
                if temporal_layer == "conv3d":
                    return TemporalConvLayer(width, norm_groups, sti_kernel_size)
                return STILayer(width, norm_groups, sti_heads, sti_head_dim, sti_kernel_size, gamma, attention_backend)

            return _LayerFactory(temb_width, norm_groups, head_channels, context_dim, temporal)

        self.down_blocks = nn.ModuleList()
        skips, width_in = [widths[0]], widths[0]
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            self.down_blocks.append(DownBlock(width_in, width, layers_per_block, attention_levels[i], last, factory(gammas[i])))
            skips += [width] * (layers_per_block if last else layers_per_block + 1)
            width_in = width

        self.mid_block = MidBlock(width_in, factory(gammas[-1]))

        self.up_blocks = nn.ModuleList()
        for i, width in reversed(list(enumerate(widths))):
            widths_in = []
            for _ in range(layers_per_block + 1):
                widths_in.append(width_in + skips.pop())
                width_in = width
            self.up_blocks.append(UpBlock(widths_in, width, attention_levels[i], i == 0, factory(gammas[i])))

        self.conv_norm_out = nn.GroupNorm(norm_groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)
        # Which frame of the clip this is, told at the very input: a motion that the caption names is a function of it.
        self.frame_position_scale = nn.Parameter(torch.ones(widths[0]))
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, sample: Tensor, timestep: Tensor, context: TextFeatures, frame_mask: Tensor | None = None) -> Tensor:
        """Predicts ε.

        Args:
            sample: (B, in_channels, F, h, w), noisy latents and visual guidance; h and w divisible by 2^(levels − 1).
            timestep: (B,) integer diffusion steps.
            context: text features of both encoders.
            frame_mask: (B, F) bool, False for padded frames; None when no frame is padded (the same result, less work).

        Returns:
            (B, out_channels, F, h, w); the values of padded frames mean nothing.
        """
        frames = sample.shape[2]
        hidden = rearrange(sample, "b c f h w -> (b f) c h w")
        if self.conv_in.weight.is_contiguous(memory_format=torch.channels_last):
            hidden = hidden.contiguous(memory_format=torch.channels_last)
        temb = self.time_embedding(self.time_proj(timestep).to(sample.dtype))
        text = self.text_projection(context)

        def run(unit: Unit, hidden: Tensor) -> Tensor:
            """A unit with what all units of this call share."""
            return run_unit(self.checkpointing, self.keep_from, unit, hidden, temb, text, frames, frame_mask)

        positions = frame_positions(sample.shape[0], frames, len(self.frame_position_scale), frame_mask, like=hidden)
        hidden = self.conv_in(hidden) + self.frame_position_scale[:, None, None] * positions
        skips = [hidden]
        for block in self.down_blocks:
            for i in range(len(block.resnets)):
                hidden = run(block.unit(i), hidden)
                skips.append(hidden)
            for downsampler in block.downsamplers:
                hidden = downsampler(hidden)
                skips.append(hidden)

        hidden = run(self.mid_block.unit(0), hidden)

        for block in self.up_blocks:
            for i in range(len(block.resnets)):
                hidden = run(block.unit(i), torch.cat([hidden, skips.pop()], dim=1))
            for upsampler in block.upsamplers:
                hidden = upsampler(hidden)

        hidden = self.conv_out(nn.functional.silu(self.conv_norm_out(hidden)))
        return rearrange(hidden, "(b f) c h w -> b c f h w", f=frames)

    def set_activation_checkpointing(self, mode: str) -> None:
        """Chooses what backward computes again: a mode of `rdtf_ds.models.recompute`."""
        if mode not in MODES:
            raise ValueError(f"activation checkpointing is {mode!r}; choose one of {', '.join(MODES)}")
        self.checkpointing = mode

    def zero_initialised_parameters(self) -> set[str]:
        """Names of the parameters that start at zero so that a part of the network starts silent."""
        names = {"conv_out.weight", "conv_out.bias"}
        for prefix, module in self.named_modules():
            if isinstance(module, STILayer | TemporalConvLayer):
                names |= {f"{prefix}.{name}" for name in module.zero_initialised()}
        return names


def _check_widths(
    widths: tuple[int, ...], attends: tuple[bool, ...], gammas: tuple[int | None, ...], norm_groups: int, head_channels: int
) -> None:
    if not len(widths) == len(attends) == len(gammas):
        raise ValueError(f"{len(widths)} widths, {len(attends)} attention levels and {len(gammas)} γ: one of each per level is needed")
    for width in widths:
        if width % norm_groups or width % head_channels:
            raise ValueError(f"width {width} must be a multiple of norm_groups {norm_groups} and head_channels {head_channels}")
