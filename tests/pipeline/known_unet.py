"""A network whose answers are known, the pipeline around it, and what clips of it are compared by."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rdtf_ds.models.text_conditioning import TextFeatures
from rdtf_ds.pipeline import NO_CAPTION, RDTFPipeline
from tests.small_models import CHANNELS, FACTOR, SIDE, make_pipeline

LATENT = SIDE // FACTOR
RED, BLUE = (np.full((SIDE, SIDE, 3), colour, np.uint8) for colour in ((200, 30, 30), (20, 40, 220)))


class KnownUnet:
    """Answers 1 without guidance, 10 with visible frames, 100 with a caption too (1000: a caption alone); keeps what it was given."""

    dtype = torch.float32

    def __init__(self, hidden: Tensor, guidance: str = "latent", answers: tuple[float, ...] = (1, 10, 100, 1000)) -> None:
        self.hidden, self.answers = hidden, answers
        self.config = SimpleNamespace(guidance=guidance, out_channels=CHANNELS)
        self.samples: list[Tensor] = []
        self.timesteps: list[Tensor] = []

    def __call__(self, sample: Tensor, timestep: Tensor, context: TextFeatures) -> Tensor:
        self.samples.append(sample.clone())
        self.timesteps.append(timestep.clone())
        none, image, both, text = self.answers
        shown = sample[:, CHANNELS:].flatten(1).any(dim=1)
        captioned = torch.tensor([not torch.equal(clip, self.hidden) for clip in context.clip])
        answer = torch.where(captioned, torch.where(shown, both, text), torch.where(shown, image, none))
        return answer.to(sample).reshape(-1, 1, 1, 1, 1).expand_as(sample[:, :CHANNELS])


def known(encoders: dict[str, Any], caption: str = NO_CAPTION, **options: Any) -> RDTFPipeline:
    """A pipeline around KnownUnet, which knows the features of ``caption``, the one with every word hidden."""
    pipeline = make_pipeline(encoders, KnownUnet(torch.zeros(0), **options))
    pipeline.unet.hidden = pipeline.encode_text([caption]).clip[0]
    return pipeline


def assert_same_but_for_rounding(found: Tensor, expected: Tensor) -> None:
    """Within 1e-5 of the range of the values: other sizes of a batch take other kernels, which sum in another order."""
    assert expected.abs().max() > 0.1
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
