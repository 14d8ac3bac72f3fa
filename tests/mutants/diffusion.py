"""Wrongs of masks, losses and guidance."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

DIFFUSION = (
    Mutant(
        name="condition mask off by one",
        file="rdtf_ds/diffusion/masks.py",
        old="frame >= k - visible",
        new="frame > k - visible",
        tests=("tests/diffusion/test_masks.py",),
    ),
    Mutant(
        name="level counts the visible frames",
        file="rdtf_ds/diffusion/masks.py",
        old="sum(not visible for visible in mask)",
        new="sum(visible for visible in mask)",
        tests=("tests/diffusion/test_masks.py",),
    ),
    Mutant(
        name="loss mask ignored",
        file="rdtf_ds/diffusion/loss.py",
        old="torch.where(frame_mask[:, None, :, None, None], difference, 0.0)",
        new="torch.where(torch.ones_like(frame_mask)[:, None, :, None, None], difference, 0.0)",
        tests=("tests/diffusion/test_loss.py",),
    ),
    Mutant(
        name="loss divided by padded frames too",
        file="rdtf_ds/diffusion/loss.py",
        old="elements = frame_mask.sum(dim=1)",
        new="elements = torch.ones_like(frame_mask).sum(dim=1)",
        tests=("tests/diffusion/test_loss.py",),
    ),
    Mutant(
        name="noise scaled by 1 - sqrt(alpha)",
        file="rdtf_ds/diffusion/loss.py",
        old="(1 - alpha).sqrt()",
        new="(1 - alpha.sqrt())",
        tests=("tests/diffusion/test_loss.py",),
    ),
    Mutant(
        name="guidance terms swapped",
        file="rdtf_ds/diffusion/guidance.py",
        old="image_scale * (eps_image - eps_none) + text_scale * (eps_both - eps_image)",
        new="text_scale * (eps_image - eps_none) + image_scale * (eps_both - eps_image)",
        tests=("tests/diffusion/test_guidance.py",),
    ),
    Mutant(
        name="hidden frames guide and visible ones do not",
        file="rdtf_ds/diffusion/guidance.py",
        old="torch.where(_per_frame(condition_mask, latents)",
        new="torch.where(_per_frame(~condition_mask, latents)",
        tests=("tests/diffusion/test_guidance.py",),
    ),
)
