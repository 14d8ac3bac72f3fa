"""Generation in a run whose frozen encoders wait on the CPU: they visit for validation as they do for training."""

from __future__ import annotations

import torch

from rdtf_ds.config import RDTFSection
from rdtf_ds.models.autoencoder import FrameAutoencoder
from rdtf_ds.models.dfgn import DFGN
from rdtf_ds.models.text_conditioning import TextEncoders, TextFeatures
from rdtf_ds.pipeline import RDTFPipeline
from rdtf_ds.training.validation_pipeline import around


class VisitingPipeline(RDTFPipeline):
    """Asks encoders that know where they compute, where `RDTFPipeline` would look for their weights.

    Made by `visiting_pipeline`, which sets ``own_autoencoder`` and ``own_text``.
    """

    own_autoencoder: FrameAutoencoder
    own_text: TextEncoders

    @property
    def _execution_device(self) -> torch.device:
        return torch.device(self.unet.device)

    def encode_text(self, captions: list[str]) -> TextFeatures:
        """Features of captions, by the encoders that visit."""
        return self.own_text.encode(captions).to(self._execution_device, self.unet.dtype)

    def frame_autoencoder(self) -> FrameAutoencoder:
        """The one that visits."""
        return self.own_autoencoder


def visiting_pipeline(network: DFGN, autoencoder: FrameAutoencoder, text: TextEncoders, rdtf: RDTFSection) -> VisitingPipeline:
    """The pipeline of these parts, with an experiment's keys of validation; both encoders visit their device."""
    pipeline = around(network, autoencoder, text, rdtf, VisitingPipeline)
    assert isinstance(pipeline, VisitingPipeline)
    pipeline.own_autoencoder, pipeline.own_text = autoencoder, text
    return pipeline
