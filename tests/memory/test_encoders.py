from __future__ import annotations

import pytest
import torch

from rdtf_ds.config import EncodersSection
from rdtf_ds.errors import UserError
from rdtf_ds.memory.encoders import AutoencoderTracer, read_encoders
from rdtf_ds.models.autoencoder import FrameAutoencoder
from rdtf_ds.models.tiny_encoders import tiny_autoencoder, tiny_clip, write_tiny_encoders
from tests.memory.networks import allocator_peak

# Of the published weights: model cards and safetensors headers.
CLIP_PARAMETERS, T5_PARAMETERS, AUTOENCODER_PARAMETERS = 340_387_840, 341_231_104, 83_653_863


def test_defaults_that_are_not_here_are_table_6s(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    sources = EncodersSection(clip="nobody/clip", t5="nobody/t5", autoencoder="nobody/vae")
    encoders = read_encoders(sources)
    assert encoders.assumed == ("nobody/clip", "nobody/t5", "nobody/vae")
    assert (encoders.clip_dim, encoders.t5_dim) == (1024, 1024)
    assert (encoders.clip_parameters, encoders.t5_parameters) == (CLIP_PARAMETERS, T5_PARAMETERS)
    autoencoder = AutoencoderTracer(encoders.autoencoder, 256, torch.float16)
    assert (autoencoder.parameters, autoencoder.channels, autoencoder.factor) == (AUTOENCODER_PARAMETERS, 4, 8)


def test_folders_are_read_and_broken_ones_refused(tmp_path):
    write_tiny_encoders(tmp_path, 24)
    folder = str(tmp_path)
    encoders = read_encoders(EncodersSection(clip=folder, t5=folder, autoencoder=folder))
    assert (encoders.clip_dim, encoders.t5_dim, encoders.assumed) == (24, 24, ())
    assert encoders.clip_parameters == sum(p.numel() for p in tiny_clip(24)[0].parameters())
    made = read_encoders(EncodersSection(clip="tiny:24", t5="tiny:24", autoencoder="tiny"))
    assert (made.clip_parameters, made.t5_parameters) == (encoders.clip_parameters, encoders.t5_parameters)
    (tmp_path / "text_encoder" / "config.json").write_text("{")
    with pytest.raises(UserError, match="text encoder not found"):
        read_encoders(EncodersSection(clip=folder, t5="tiny", autoencoder="tiny"))


def test_haar_has_no_weights():
    encoders = read_encoders(EncodersSection(clip="tiny", t5="tiny", autoencoder="haar:4"))
    autoencoder = AutoencoderTracer(encoders.autoencoder, 32, torch.float32)
    assert (autoencoder.parameters, autoencoder.channels, autoencoder.factor) == (0, 48, 4)
    assert autoencoder.encode(8) >= 8 * 3 * 32 * 32 * 4


def test_autoencoder_peaks_grow_with_the_frames_and_are_the_allocators(tmp_path):
    """The CPU's convolutions copy what they read into another layout, which is no tensor: up to a third more for so narrow a network."""
    encoders = read_encoders(EncodersSection(clip="tiny", t5="tiny", autoencoder="tiny"))
    tracer = AutoencoderTracer(encoders.autoencoder, 64, torch.float32)
    real = FrameAutoencoder(tiny_autoencoder(), 4)
    pixels, latents = torch.zeros(1, 3, 4, 64, 64), torch.zeros(1, 4, 4, 8, 8)
    for predicted, run in ((tracer.encode, lambda: real.encode(pixels)), (tracer.decode, lambda: real.decode(latents))):
        run()
        measured = allocator_peak(tmp_path, run)
        assert measured / 1.35 < predicted(4) < 1.05 * measured
        assert predicted(4) == pytest.approx(2 * predicted(2), rel=0.05)
