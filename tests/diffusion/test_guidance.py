"""Visual guidance shows the visible frames and nothing of the hidden ones; guidance terms are combined as written in the paper."""

from __future__ import annotations

import pytest
import torch

from rdtf_ds.diffusion.guidance import combine_guidance, latent_guidance, pixel_guidance

MASK = torch.tensor([[True, False, True], [False, False, True]])


def test_latent_guidance_copies_visible_frames() -> None:
    latents = torch.randn(2, 4, 3, 2, 2)
    guidance = latent_guidance(latents, MASK)
    assert guidance.shape == latents.shape
    for sample in range(2):
        for frame in range(3):
            expected = latents[sample, :, frame] if MASK[sample, frame] else torch.zeros(4, 2, 2)
            assert torch.equal(guidance[sample, :, frame], expected)


def test_hidden_frames_leave_no_trace_whatever_they_hold() -> None:
    latents = torch.full((2, 4, 3, 2, 2), float("nan"), dtype=torch.float16)
    assert (latent_guidance(latents, torch.zeros(2, 3, dtype=torch.bool)) == 0).all()
    assert latent_guidance(latents, MASK).dtype == torch.float16


def test_pixel_guidance_averages_areas_and_appends_the_mask() -> None:
    frames = torch.rand(2, 3, 3, 8, 4) * 2 - 1
    guidance = pixel_guidance(frames, MASK, (4, 2))
    assert guidance.shape == (2, 4, 3, 4, 2)
    for sample in range(2):
        for frame in range(3):
            visible = bool(MASK[sample, frame])
            assert (guidance[sample, 3, frame] == float(visible)).all()
            for row in range(4):
                for column in range(2):
                    area = frames[sample, :, frame, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean(dim=(1, 2))
                    torch.testing.assert_close(guidance[sample, :3, frame, row, column], area * visible)


@pytest.mark.parametrize("shape", [(1, 3), (2, 2), (3, 2)])
def test_mask_of_another_shape_is_refused(shape: tuple[int, int]) -> None:
    mask = torch.ones(shape, dtype=torch.bool)
    with pytest.raises(ValueError, match="condition_mask must be"):
        latent_guidance(torch.zeros(2, 4, 3, 2, 2), mask)
    with pytest.raises(ValueError, match="condition_mask must be"):
        pixel_guidance(torch.zeros(2, 3, 3, 4, 4), mask, (2, 2))


def test_combined_guidance_by_hand() -> None:
    none, image, both = torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([4.0])
    assert combine_guidance(none, image, both, image_scale=7.5, text_scale=2.0).item() == 1.0 + 7.5 * 2.0 + 2.0 * 1.0


def test_scales_select_predictions() -> None:
    none, image, both = torch.randn(3, 2, 4, 8, 2, 2).unbind()
    torch.testing.assert_close(combine_guidance(none, image, both, 1.0, 1.0), both)
    torch.testing.assert_close(combine_guidance(none, image, both, 1.0, 0.0), image)
    torch.testing.assert_close(combine_guidance(none, image, both, 0.0, 0.0), none)
