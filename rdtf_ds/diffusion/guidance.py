"""Visual guidance, the channels that show the model its visible frames, and two-way classifier-free guidance.

Legend: B samples, C channels, F frames, H W pixels, h w latent size.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import interpolate


def latent_guidance(latents: Tensor, condition_mask: Tensor) -> Tensor:
    """The visible frames' clean latents, zero where hidden: (B, C, F, h, w) from the same shape and a (B, F) bool mask."""
    return torch.where(_per_frame(condition_mask, latents), latents, torch.zeros((), dtype=latents.dtype, device=latents.device))


def pixel_guidance(frames: Tensor, condition_mask: Tensor, size: tuple[int, int]) -> Tensor:
    """The visible frames' RGB at latent size and the mask itself: (B, 4, F, h, w).

    Black is a colour, so without the mask as the fourth channel a hidden frame would look like a grey one.

    Args:
        frames: in [-1, 1], (B, 3, F, H, W).
        condition_mask: (B, F) bool, True = visible.
        size: (h, w); each value is the mean of the pixels it covers.
    """
    batch = frames.shape[0]
    small = interpolate(rearrange(frames, "b c f h w -> (b f) c h w"), size=size, mode="area")
    small = rearrange(small, "(b f) c h w -> b c f h w", b=batch)
    visible = _per_frame(condition_mask, small)
    return torch.cat([latent_guidance(small, condition_mask), visible.expand(-1, 1, -1, *size).to(small.dtype)], dim=1)


def combine_guidance(eps_none: Tensor, eps_image: Tensor, eps_both: Tensor, image_scale: float, text_scale: float) -> Tensor:
    """ε = ε(∅,∅) + s_I·[ε(∅,I) − ε(∅,∅)] + s_T·[ε(T,I) − ε(∅,I)]; both scales 1 give ε(T,I) (Table 6: 7.5 and 7.5).

    Args:
        eps_none: predicted without text and image.
        eps_image: predicted with the visible frames alone.
        eps_both: predicted with text and visible frames.
        image_scale: s_I.
        text_scale: s_T.
    """
    return eps_none + image_scale * (eps_image - eps_none) + text_scale * (eps_both - eps_image)


def _per_frame(mask: Tensor, like: Tensor) -> Tensor:
    """(B, F) -> (B, 1, F, 1, 1) bool on the device of ``like``."""
    expected = (like.shape[0], like.shape[2])
    if mask.shape != expected:
        raise ValueError(f"condition_mask must be {expected} for frames of {tuple(like.shape)}, got {tuple(mask.shape)}")
    return rearrange(mask.to(device=like.device, dtype=torch.bool), "b f -> b 1 f 1 1")
