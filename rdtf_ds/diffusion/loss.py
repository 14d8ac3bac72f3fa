"""The noise schedule and the training loss (Eq. 1 under the loss mask).

Legend: B samples, C channels, F frames, h w latent size.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def alphas_cumprod(schedule: Literal["linear", "scaled_linear"], beta_start: float, beta_end: float, steps: int) -> Tensor:
    """ᾱ_t = Π (1 − β_s), float64 (steps,): ``linear`` spaces β evenly, ``scaled_linear`` √β (Table 6; names as in diffusers).

    Raises:
        ValueError: an unknown schedule, steps < 1, or not 0 < beta_start <= beta_end < 1.
    """
    if steps < 1 or not 0 < beta_start <= beta_end < 1:
        raise ValueError(f"noise schedule needs 0 < beta_start <= beta_end < 1 and steps >= 1, got {beta_start}, {beta_end}, {steps}")
    if schedule == "linear":
        betas = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
    elif schedule == "scaled_linear":
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64).square()
    else:
        raise ValueError(f"unknown noise schedule {schedule!r}: use 'linear' or 'scaled_linear'")
    return (1 - betas).cumprod(dim=0)


def add_noise(latents: Tensor, noise: Tensor, timestep: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """x_t = √ᾱ_t · x + √(1 − ᾱ_t) · ε (paper, Definitions), in the dtype of ``latents``.

    Args:
        latents: clean, (B, C, F, h, w).
        noise: standard normal, same shape.
        timestep: (B,) integers, one t for all frames of a sample.
        alphas_cumprod: of :func:`alphas_cumprod`.
    """
    _check_same_shape("noise", noise, "latents", latents)
    alpha = alphas_cumprod.to(latents.device)[timestep.to(latents.device)].view(-1, 1, 1, 1, 1)  # (B, 1, 1, 1, 1)
    return alpha.sqrt().to(latents.dtype) * latents + (1 - alpha).sqrt().to(latents.dtype) * noise


def masked_mse(prediction: Tensor, target: Tensor, frame_mask: Tensor, weight: Tensor | None = None) -> Tensor:
    """Squared error of each sample, averaged over the frames under the loss mask: (B,) float32 (Eq. 1).

    Frames outside the mask have no part in value or gradient, whatever they hold. A sample without any frame gives NaN.

    Args:
        prediction: ε predicted, (B, C, F, h, w).
        target: ε, same shape.
        frame_mask: (B, F) bool, True = the frame counts.
        weight: (B,), e.g. of :func:`min_snr_weight`; None: 1.

    Raises:
        ValueError: shapes do not match (broadcasting would hide it).
    """
    _check_same_shape("prediction", prediction, "target", target)
    batch, channels, frames, height, width = prediction.shape
    if frame_mask.shape != (batch, frames):
        shapes = f"{(batch, frames)} for a prediction of {tuple(prediction.shape)}, got {tuple(frame_mask.shape)}"
        raise ValueError(f"frame_mask must be {shapes}")
    difference = prediction.float() - target.float()
    # Zeroed before it is squared: a NaN in a padded frame would survive a product with 0.
    difference = torch.where(frame_mask[:, None, :, None, None], difference, 0.0)
    elements = frame_mask.sum(dim=1) * (channels * height * width)
    loss = difference.square().sum(dim=(1, 2, 3, 4)) / elements
    if weight is None:
        return loss
    _check_same_shape("weight", weight, "the per-sample loss", loss)
    return loss * weight.to(loss)


def min_snr_weight(alphas_cumprod: Tensor, timestep: Tensor, gamma: float) -> Tensor:
    """min(SNR_t, γ) / SNR_t, float32 (B,): keeps nearly clean timesteps from ruling the ε-prediction loss (Hang et al. 2023)."""
    alpha = alphas_cumprod.to(timestep.device)[timestep]
    snr = alpha / (1 - alpha)
    return (gamma / snr).clamp(max=1.0).float()


def _check_same_shape(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.shape != other.shape:
        raise ValueError(f"{name} must have the shape of {other_name}, {tuple(other.shape)}, got {tuple(tensor.shape)}")
