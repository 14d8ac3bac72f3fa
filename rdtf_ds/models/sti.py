"""Spatial-temporal interaction (paper, DFGN a-b): how frames of one clip look at each other.

Legend: B clips, F frames, C channels, h w latent size at this level, γ downsampling of the semantic branch,
f = F frames inside einops patterns, (b f) frames as images.
"""

from __future__ import annotations

import torch
from diffusers.models.embeddings import get_timestep_embedding
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional

from rdtf_ds.models.attention import attention

# γ is 2 where tokens are many; below this side they are few enough to keep.
GAMMA_SIDE = 16

# Of the last frame: that of the most frames a clip has, so that eight frames stand at 0, 1, ..., 7.
POSITION_RANGE = 7


def default_gamma(side: int) -> int:
    """γ of a level whose shorter side is ``side``: 2 from 16 on, else 1."""
    return 2 if side >= GAMMA_SIDE else 1


def frame_positions(clips: int, frames: int, channels: int, frame_mask: Tensor | None, like: Tensor) -> Tensor:
    """Sinusoidal positions of the frames, (B*F, C, 1, 1), on the device and in the dtype of ``like``.

    Frames are chosen to spread over their whole clip, so a position is relative: the first of k frames stands at 0, the last at
    ``POSITION_RANGE``, whatever k is. Padded frames stand beyond.
    """
    numbers = torch.arange(frames, device=like.device, dtype=torch.float32)
    real = torch.full((clips,), frames, device=like.device) if frame_mask is None else frame_mask.sum(dim=1)
    steps = POSITION_RANGE / (real - 1).clamp(min=1)
    positions = rearrange(steps[:, None] * numbers, "b f -> (b f)")
    return rearrange(get_timestep_embedding(positions, channels, downscale_freq_shift=0), "n c -> n c 1 1").to(like.dtype)


def mask_frames(hidden: Tensor, frame_mask: Tensor | None) -> Tensor:
    """Zeroes padded frames of (B*F, C, h, w); ``frame_mask`` (B, F) bool, True for real frames."""
    if frame_mask is None:
        return hidden
    return hidden * rearrange(frame_mask, "b f -> (b f) 1 1 1").to(hidden.dtype)


class SemanticInteraction(nn.Module):
    """(a) Every region of every frame attends to every region of every frame at 1/γ resolution.

    h (F, H, W, d) -> downsample by γ -> unfold to F·(H/γ)·(W/γ) tokens -> one self-attention layer -> upsample by γ.
    """

    def __init__(self, channels: int, heads: int, head_dim: int, gamma: int | None, attention_backend: str) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads, self.gamma, self.attention_backend = heads, gamma, attention_backend
        self.to_q = nn.Linear(channels, inner, bias=False)
        self.to_k = nn.Linear(channels, inner, bias=False)
        self.to_v = nn.Linear(channels, inner, bias=False)
        self.to_out = nn.Linear(inner, channels)

    def forward(self, hidden: Tensor, frames: int, frame_mask: Tensor | None) -> Tensor:
        """(B*F, C, h, w) -> same; padded frames are nobody's key. ValueError if γ does not divide the size."""
        height, width = hidden.shape[-2:]
        gamma = self.gamma or default_gamma(min(height, width))
        if height % gamma or width % gamma:
            raise ValueError(f"γ = {gamma} does not divide a latent level of {height}×{width}")
        coarse = functional.avg_pool2d(hidden, gamma) if gamma > 1 else hidden
        tokens = rearrange(coarse, "(b f) c h w -> b (f h w) c", f=frames)

        query, key, value = (
            rearrange(projection(tokens), "b l (g d) -> b g l d", g=self.heads) for projection in (self.to_q, self.to_k, self.to_v)
        )
        key_mask = None
        if frame_mask is not None:
            key_mask = repeat(frame_mask, "b f -> b (f n)", n=coarse.shape[-2] * coarse.shape[-1])
        mixed = attention(query, key, value, key_mask, self.attention_backend)
        mixed = self.to_out(rearrange(mixed, "b g l d -> b l (g d)"))

        coarse = rearrange(mixed, "b (f h w) c -> (b f) c h w", f=frames, h=height // gamma)
        return functional.interpolate(coarse, scale_factor=gamma, mode="nearest") if gamma > 1 else coarse


class FrameConvolution(nn.Conv2d):
    """A (k, 1, 1) convolution along frames at full resolution.

    Held as a (k, 1) kernel over (F, h·w): in channels-last memory that layout is a view of the frames, so nothing is copied.
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__(channels, channels, (kernel_size, 1), padding=(kernel_size // 2, 0))

    def forward(self, hidden: Tensor, frames: int, frame_mask: Tensor | None) -> Tensor:
        """(B*F, C, h, w) -> same; a padded frame reads as the zeros that lie beyond the last frame of a shorter clip."""
        height = hidden.shape[-2]
        planes = rearrange(mask_frames(hidden, frame_mask), "(b f) c h w -> b c f (h w)", f=frames)
        return rearrange(super().forward(planes), "b c f (h w) -> (b f) c h w", h=height)


class DetailMaintenance(nn.Module):
    """(b) Two (k, 1, 1) convolutions along frames keep what the coarse branch loses."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.first = FrameConvolution(channels, kernel_size)
        self.second = FrameConvolution(channels, kernel_size)

    def forward(self, hidden: Tensor, frames: int, frame_mask: Tensor | None) -> Tensor:
        """(B*F, C, h, w) -> same."""
        hidden = functional.silu(self.first(hidden, frames, frame_mask))
        return self.second(hidden, frames, frame_mask)


class Fusion(nn.Module):
    """(c) Both branches normalised frame by frame, weighted by a linear gate, summed.

    The affine scales start at zero, so the sum does too. They come *after* the norms: a zeroed convolution before a norm would
    be divided by its own vanishing spread and blow its gradients up.
    """

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels, affine=False)
        self.gate = nn.Linear(2 * channels, 2)
        self.semantic_scale = nn.Parameter(torch.zeros(channels))
        self.semantic_bias = nn.Parameter(torch.zeros(channels))
        self.detail_scale = nn.Parameter(torch.zeros(channels))
        self.detail_bias = nn.Parameter(torch.zeros(channels))

    def forward(self, semantic: Tensor, detail: Tensor) -> Tensor:
        """Two (B*F, C, h, w) -> one."""
        semantic, detail = self.norm(semantic), self.norm(detail)
        weights = rearrange(self._logits(semantic, detail).softmax(dim=-1), "n h w two -> two n 1 h w")
        semantic = torch.addcmul(self.semantic_bias[:, None, None], semantic, self.semantic_scale[:, None, None])
        detail = torch.addcmul(self.detail_bias[:, None, None], detail, self.detail_scale[:, None, None])
        return weights[0] * semantic + weights[1] * detail

    def _logits(self, semantic: Tensor, detail: Tensor) -> Tensor:
        """The gate on both branches side by side, (n, h, w, two): each by its half of the weight, so that nothing is put together."""
        of_semantic, of_detail = self.gate.weight.chunk(2, dim=1)
        logits = functional.linear(rearrange(semantic, "n c h w -> n h w c"), of_semantic, self.gate.bias)
        return logits + functional.linear(rearrange(detail, "n c h w -> n h w c"), of_detail)


class STILayer(nn.Module):
    """Spatial-temporal interaction layer: semantic interaction and detail maintenance, fused; starts as the identity.

    Sinusoidal frame positions enter both branches: attention alone is blind to order, and the convolutions alone can tell only
    the first and last frames from the rest.

    Args:
        channels: width d of the level.
        norm_groups: groups of the norms; each frame is normalised by itself.
        heads, head_dim: of the one attention layer (Table 6: 8 of 32).
        kernel_size: k of the (k, 1, 1) convolutions (Table 6: 3).
        gamma: γ of the semantic branch; None takes :func:`default_gamma` of the level's size.
        attention_backend: see :func:`rdtf_ds.models.attention.resolve_backend`.
    """

    def __init__(
        self,
        channels: int,
        norm_groups: int = 32,
        heads: int = 8,
        head_dim: int = 32,
        kernel_size: int = 3,
        gamma: int | None = None,
        attention_backend: str = "auto",
    ) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels)
        self.semantic = SemanticInteraction(channels, heads, head_dim, gamma, attention_backend)
        self.detail = DetailMaintenance(channels, kernel_size)
        self.fusion = Fusion(channels, norm_groups)

    def forward(self, hidden: Tensor, frames: int, frame_mask: Tensor | None = None) -> Tensor:
        """(B*F, C, h, w) -> same; ``frame_mask`` (B, F) bool, False for padded frames, None when there are none."""
        normed = self.norm(hidden) + frame_positions(hidden.shape[0] // frames, frames, hidden.shape[1], frame_mask, like=hidden)
        return hidden + self.fusion(self.semantic(normed, frames, frame_mask), self.detail(normed, frames, frame_mask))

    def zero_initialised(self) -> list[str]:
        """Names of the parameters that start at zero and make the layer the identity."""
        return ["fusion.semantic_scale", "fusion.detail_scale"]


class TemporalConvLayer(nn.Module):
    """The plain 3-D convolution of Table 3's first row, in place of STI: norm, SiLU, one (k, 3, 3) convolution, residual."""

    def __init__(self, channels: int, norm_groups: int = 32, kernel_size: int = 3) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels)
        self.conv = nn.Conv3d(channels, channels, (kernel_size, 3, 3), padding=(kernel_size // 2, 1, 1))
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, hidden: Tensor, frames: int, frame_mask: Tensor | None = None) -> Tensor:
        """(B*F, C, h, w) -> same; padded frames enter the convolution as zeros."""
        masked = mask_frames(functional.silu(self.norm(hidden)), frame_mask)
        mixed = self.conv(rearrange(masked, "(b f) c h w -> b c f h w", f=frames))
        return hidden + rearrange(mixed, "b c f h w -> (b f) c h w")

    def zero_initialised(self) -> list[str]:
        """Names of the parameters that start at zero and make the layer the identity."""
        return ["conv.weight", "conv.bias"]
