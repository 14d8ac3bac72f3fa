"""The loss under the loss mask, its weights and the noise schedule, the last against diffusers'."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from rdtf_ds.diffusion.loss import add_noise, alphas_cumprod, masked_mse, min_snr_weight
from rdtf_ds.diffusion.masks import loss_mask


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_mean_over_unmasked_frames_of_each_sample() -> None:
    prediction, target = torch.zeros(2, 2, 3, 1, 1), torch.zeros(2, 2, 3, 1, 1)
    prediction[0, 0] = torch.tensor([1.0, 2.0, 5.0]).view(3, 1, 1)
    prediction[1, :, 2] = 3.0
    frame_mask = torch.tensor([[True, True, False], [True, True, True]])
    # Sample 0: (1 + 4) / (2 channels · 2 frames); sample 1: 2 · 9 / (2 · 3).
    assert masked_mse(prediction, target, frame_mask).tolist() == [1.25, 3.0]


def test_equals_torchs_mse_without_a_mask() -> None:
    prediction, target = random(2, 4, 8, 4, 4, seed=0), random(2, 4, 8, 4, 4, seed=1)
    ours = masked_mse(prediction, target, torch.ones(2, 8, dtype=torch.bool))
    reference = torch.nn.functional.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("k", range(3, 8))
def test_padded_equals_trimmed_in_value_and_gradient(k: int) -> None:
    padded, target = random(2, 4, 8, 4, 4, seed=2), random(2, 4, 8, 4, 4, seed=3)
    padded[:, :, k:] = float("nan")  # whatever a padded frame holds
    padded.requires_grad_()
    trimmed = padded.detach()[:, :, :k].clone().requires_grad_()
    frame_mask = torch.tensor([loss_mask(k)] * 2)
    padded_loss = masked_mse(padded, target, frame_mask)
    trimmed_loss = masked_mse(trimmed, target[:, :, :k], frame_mask[:, :k])
    torch.testing.assert_close(padded_loss, trimmed_loss)
    padded_loss.sum().backward()
    trimmed_loss.sum().backward()
    assert padded.grad is not None and trimmed.grad is not None
    torch.testing.assert_close(padded.grad[:, :, :k], trimmed.grad)
    assert (padded.grad[:, :, k:] == 0).all()


def test_half_precision_is_summed_in_float32() -> None:
    prediction = torch.full((1, 4, 8, 32, 32), 200.0, dtype=torch.float16)  # 200² overflows fp16
    loss = masked_mse(prediction, torch.zeros_like(prediction), torch.ones(1, 8, dtype=torch.bool))
    assert loss.dtype == torch.float32 and loss.item() == 40000.0


def test_weights_multiply_samples() -> None:
    prediction, target = random(2, 4, 3, 2, 2, seed=4), random(2, 4, 3, 2, 2, seed=5)
    frame_mask = torch.ones(2, 3, dtype=torch.bool)
    plain = masked_mse(prediction, target, frame_mask)
    weighted = masked_mse(prediction, target, frame_mask, torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(weighted, plain * torch.tensor([0.5, 2.0]))


def test_a_sample_without_frames_is_loud() -> None:
    prediction = torch.ones(1, 4, 3, 2, 2)
    assert masked_mse(prediction, torch.zeros_like(prediction), torch.zeros(1, 3, dtype=torch.bool)).isnan().all()


def test_shapes_that_would_broadcast_are_refused() -> None:
    prediction, mask = torch.ones(2, 4, 3, 2, 2), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="prediction must have the shape of target"):
        masked_mse(prediction, prediction[:1], mask)
    with pytest.raises(ValueError, match="frame_mask"):
        masked_mse(prediction, prediction, mask[:1])
    with pytest.raises(ValueError, match="weight"):
        masked_mse(prediction, prediction, mask, torch.ones(1))
    with pytest.raises(ValueError, match="noise must have the shape of latents"):
        add_noise(prediction, prediction[:1], torch.tensor([1, 2]), alphas_cumprod("linear", 0.1, 0.2, 4))


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_noise_schedule_is_diffusers(schedule: str) -> None:
    reference = DDIMScheduler(1000, beta_start=0.00085, beta_end=0.012, beta_schedule=schedule)
    ours = alphas_cumprod(schedule, 0.00085, 0.012, 1000)  # type: ignore[arg-type]
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours.float(), reference.alphas_cumprod, rtol=1e-4, atol=0)
    latents, noise = random(3, 4, 5, 2, 2, seed=6), random(3, 4, 5, 2, 2, seed=7)
    timestep = torch.tensor([0, 500, 999])
    noised = add_noise(latents, noise, timestep, ours)
    torch.testing.assert_close(noised, reference.add_noise(latents, noise, timestep), rtol=1e-4, atol=1e-5)
    assert add_noise(latents.half(), noise.half(), timestep, ours).dtype == torch.float16


@pytest.mark.parametrize(("start", "end", "steps"), [(0.2, 0.1, 10), (0.0, 0.1, 10), (0.1, 1.0, 10), (0.1, 0.2, 0)])
def test_impossible_schedules_are_refused(start: float, end: float, steps: int) -> None:
    with pytest.raises(ValueError, match="noise schedule needs"):
        alphas_cumprod("linear", start, end, steps)


def test_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="'cosine'"):
        alphas_cumprod("cosine", 0.1, 0.2, 10)  # type: ignore[arg-type]


def test_min_snr_weight_by_hand() -> None:
    alphas = torch.tensor([0.9, 0.8, 0.5, 0.1], dtype=torch.float64)  # SNR 9, 4, 1, 1/9
    weight = min_snr_weight(alphas, torch.tensor([0, 1, 2, 3, 0]), gamma=5.0)
    torch.testing.assert_close(weight, torch.tensor([5 / 9, 1.0, 1.0, 1.0, 5 / 9]))
    assert weight.dtype == torch.float32
