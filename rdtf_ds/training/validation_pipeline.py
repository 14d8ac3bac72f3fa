"""Generation in a run, around its live network: with the encoders it trains with, or with ones loaded late, when it trains from a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rdtf_ds.config import RDTFSection
from rdtf_ds.models.autoencoder import FrameAutoencoder
from rdtf_ds.models.dfgn import DFGN
from rdtf_ds.models.text_conditioning import TextEncoders
from rdtf_ds.pipeline import RDTFOutput, RDTFPipeline
from rdtf_ds.samplers import make_sampler


def around(
    network: DFGN, autoencoder: FrameAutoencoder, text: TextEncoders, rdtf: RDTFSection, kind: type[RDTFPipeline] = RDTFPipeline
) -> RDTFPipeline:
    """The pipeline of these parts, with an experiment's keys of validation."""
    diffusion, sampling = rdtf.diffusion, rdtf.sampling
    return kind(
        unet=network,
        vae=autoencoder.vae,
        text_encoder=text.clip,
        tokenizer=text.clip_tokenizer,
        text_encoder_2=text.t5,
        tokenizer_2=text.t5_tokenizer,
        scheduler=make_sampler(sampling.sampler, diffusion.schedule, diffusion.steps, diffusion.beta_start, diffusion.beta_end),
        image_size=rdtf.data.image_size,
        max_frames=rdtf.data.frames,
        text_length=rdtf.encoders.text_length,
        background=rdtf.data.background,
        steps=rdtf.validation.steps,
        eta=sampling.eta,
        text_scale=sampling.text_scale,
        image_scale=sampling.image_scale,
        slice_frames=rdtf.memory.autoencoder_slice,
        frame_ms=sampling.frame_ms,
    )


class LatePipeline:
    """Makes its pipeline at the first call.

    Args:
        make: the pipeline; loads the encoders.
    """

    def __init__(self, make: Callable[[], RDTFPipeline]) -> None:
        self._make = make
        self._pipeline: RDTFPipeline | None = None
        self._bar: dict[str, Any] = {}

    def set_progress_bar_config(self, **options: Any) -> None:
        """As diffusers' pipelines have it."""
        self._bar = options

    def __call__(self, *arguments: Any, **options: Any) -> RDTFOutput:
        """As `RDTFPipeline`.

        Raises:
            UserError: encoders that cannot be loaded, or whatever the pipeline refuses.
        """
        if self._pipeline is None:
            self._pipeline = self._make()
        self._pipeline.set_progress_bar_config(**self._bar)
        output: RDTFOutput = self._pipeline(*arguments, **options)
        return output
