"""The frozen encoders of a run, and where its features come from: from them, or from a cache that they filled."""

from __future__ import annotations

from typing import NamedTuple

import torch

from rdtf_ds.config import RDTFSection
from rdtf_ds.data.dataset import LatentShape
from rdtf_ds.data.feature_cache import CachedClips
from rdtf_ds.experiment import Experiment
from rdtf_ds.models.autoencoder import FrameAutoencoder, load_autoencoder
from rdtf_ds.models.text_conditioning import TextEncoders
from rdtf_ds.training.objective import Encoding, FrozenEncoders, read_features

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_COMPUTE = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class FeatureSource(NamedTuple):
    """Where the features of a run come from, and their shapes."""

    encoding: Encoding
    latent: LatentShape
    clip_dim: int
    t5_dim: int


def build_source(experiment: Experiment, cached: CachedClips | None, device: torch.device) -> FeatureSource:
    """The frozen encoders, or what a cache kept of them."""
    if cached is not None:
        header = cached.cache.header
        return FeatureSource(read_features, LatentShape(header.latent_channels, header.latent_side), header.clip_dim, header.t5_dim)
    rdtf = experiment.rdtf
    autoencoder, text = load_encoders(rdtf, encoder_dtype(experiment, device), device)
    latent = LatentShape(autoencoder.channels, rdtf.data.image_size // autoencoder.factor)
    return FeatureSource(FrozenEncoders(autoencoder, text), latent, text.clip_dim, text.t5_dim)


def encoder_dtype(experiment: Experiment, device: torch.device) -> torch.dtype:
    """What the autoencoder and CLIP compute in: as the network on a GPU, fp32 on a CPU."""
    return _COMPUTE[experiment.precision] if device.type == "cuda" else torch.float32


def load_encoders(rdtf: RDTFSection, dtype: torch.dtype, device: torch.device) -> tuple[FrameAutoencoder, TextEncoders]:
    """The frozen encoders on their device, or waiting on the CPU to visit it."""
    sources, visit = rdtf.encoders, rdtf.memory.encoders == "cpu"
    home = torch.device("cpu") if visit else device
    autoencoder = load_autoencoder(sources.autoencoder, dtype, rdtf.memory.autoencoder_slice).to(home)
    text = TextEncoders.from_pretrained(sources.clip, sources.t5, sources.text_length, dtype, DTYPES[sources.t5_dtype], home)
    return (autoencoder.visit(device), text.visit(device)) if visit else (autoencoder, text)
