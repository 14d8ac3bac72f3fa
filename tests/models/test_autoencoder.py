"""The Haar transform against a definition by hand, latents' statistics, AutoencoderKL, and what a missing one says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from rdtf_ds.data.synthetic import all_stickers, on_white, render
from rdtf_ds.errors import UserError
from rdtf_ds.models.autoencoder import FrameAutoencoder, HaarAutoencoder, load_autoencoder
from rdtf_ds.models.missing import EncoderNotFound
from rdtf_ds.models.tiny_encoders import tiny_autoencoder
from rdtf_ds.seeding import numpy_generator, torch_generator


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch_generator("test pixels")) * 2 - 1


def test_factor_two_is_the_haar_transform_by_hand():
    pixels = noise(1, 3, 4, 6)
    a, b = pixels[:, :, 0::2, 0::2], pixels[:, :, 0::2, 1::2]
    c, d = pixels[:, :, 1::2, 0::2], pixels[:, :, 1::2, 1::2]
    expected = torch.cat([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d], dim=1) / 2
    torch.testing.assert_close(HaarAutoencoder(2).encode(pixels), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("factor", [2, 4])
def test_transform_is_orthonormal_and_inverts_exactly(factor: int):
    haar, pixels = HaarAutoencoder(factor), noise(2, 3, 16, 24)
    latents = haar.encode(pixels)
    assert latents.shape == (2, 3 * factor**2, 16 // factor, 24 // factor)
    torch.testing.assert_close(latents.square().sum(), pixels.square().sum())
    torch.testing.assert_close(haar.decode(latents), pixels, rtol=0, atol=2e-6)
    torch.testing.assert_close(haar.packet @ haar.packet.T, torch.eye(factor**2), rtol=0, atol=0)


@pytest.mark.parametrize("factor", [2, 4])
def test_channels_rise_in_frequency_and_hold_the_colours_apart(factor: int):
    haar = HaarAutoencoder(factor)
    blocks = haar.packet.unflatten(1, (factor, factor))
    changes = [int((block.diff(dim=0) != 0).sum() + (block.diff(dim=1) != 0).sum()) for block in blocks]
    assert changes == sorted(changes)
    red = torch.zeros(1, 3, 8, 8)
    red[:, 0] = 0.5
    latents = haar.encode(red)
    torch.testing.assert_close(latents[:, 0], torch.full_like(latents[:, 0], 0.5 * factor))
    assert not latents[:, 1:].any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2), (torch.float64, 1e-14)])
def test_transform_works_in_every_dtype(dtype: torch.dtype, tolerance: float):
    haar, pixels = HaarAutoencoder(4), noise(1, 3, 8, 8).to(dtype)
    restored = haar.decode(haar.encode(pixels))
    assert restored.dtype == dtype
    torch.testing.assert_close(restored, pixels, rtol=0, atol=tolerance)


@pytest.mark.parametrize("factor", [2, 4])
def test_measured_statistics_are_those_of_the_synthetic_stickers(factor: int):
    clips = []
    for number, sticker in enumerate(all_stickers(held_out=False)):
        clips.append(on_white(render(sticker, 8, 64, numpy_generator(0, "latent statistics", number))))
    pixels = torch.from_numpy(np.concatenate(clips)).permute(0, 3, 1, 2).float() / 127.5 - 1
    haar = HaarAutoencoder(factor)
    bands = haar.encode(pixels).unflatten(1, (factor**2, 3))
    mean = torch.tensor(haar.config.latents_mean).unflatten(0, (factor**2, 3))[:, 0]
    torch.testing.assert_close(bands.mean((0, 2, 3, 4)), mean, rtol=0, atol=1e-3)
    frames = pixels.unflatten(0, (-1, 8)).transpose(1, 2)
    deviations = FrameAutoencoder(haar).encode(frames).unflatten(1, (factor**2, 3)).std((0, 2, 3, 4, 5))
    assert deviations[0] == pytest.approx(0.7, abs=0.03) and deviations[1:].max() < deviations[0] / 4


@pytest.mark.parametrize("source", ["haar:2", "haar:4"])
def test_haar_round_trip_keeps_layout_and_normalises(source: str):
    autoencoder = load_autoencoder(source, slice_frames=3)
    frames = noise(2, 3, 4, 16, 8)
    latents = autoencoder.encode(frames)
    assert latents.shape == (2, autoencoder.channels, 4, 16 // autoencoder.factor, 8 // autoencoder.factor)
    torch.testing.assert_close(autoencoder.decode(latents), frames, rtol=0, atol=1e-5)
    one = autoencoder.encode(frames[1:, :, 2:3])
    torch.testing.assert_close(one[0, :, 0], latents[1, :, 2], rtol=0, atol=1e-5)
    config = autoencoder.vae.config
    raw = autoencoder.vae.encode(frames[1, :, 2][None])[0]
    by_hand = (raw[0] - config.latents_mean[0]) / config.latents_std[0]
    torch.testing.assert_close(latents[1, 0, 2], by_hand)


def test_autoencoder_kl_gives_the_scaled_posterior_mean_and_divides_again():
    vae = tiny_autoencoder()
    autoencoder = FrameAutoencoder(vae, slice_frames=2)
    assert (autoencoder.factor, autoencoder.channels) == (8, 4)
    frames = noise(2, 3, 3, 16, 16).requires_grad_()
    latents = autoencoder.encode(frames)
    with torch.no_grad():
        mean = vae.encode(frames[1, :, 2][None]).latent_dist.mean[0]
        torch.testing.assert_close(latents[1, :, 2], mean * vae.config.scaling_factor, rtol=1e-4, atol=1e-5)
        picture = vae.decode(latents[1, :, 2][None] / vae.config.scaling_factor).sample[0]
    torch.testing.assert_close(autoencoder.decode(latents)[1, :, 2], picture, rtol=1e-4, atol=1e-5)
    assert not latents.requires_grad and not any(parameter.requires_grad for parameter in vae.parameters()) and not vae.training


def test_half_precision_autoencoder_answers_in_the_callers_dtype():
    autoencoder = load_autoencoder("tiny", dtype=torch.bfloat16)
    latents = autoencoder.encode(noise(1, 3, 2, 16, 16))
    assert autoencoder.vae.dtype == torch.bfloat16 and latents.dtype == torch.float32
    assert autoencoder.decode(latents.to(torch.float16)).dtype == torch.float16


def test_loads_from_its_own_folder_and_from_a_pipelines(tmp_path):
    tiny_autoencoder().save_pretrained(tmp_path / "pipeline" / "vae")
    HaarAutoencoder(4, latents_std=[2.0] * 48).save_pretrained(tmp_path / "haar")
    frames = noise(1, 3, 1, 16, 16)
    loaded = load_autoencoder(str(tmp_path / "pipeline"))
    assert isinstance(loaded.vae, AutoencoderKL)
    torch.testing.assert_close(loaded.encode(frames), load_autoencoder("tiny").encode(frames), rtol=0, atol=0)
    torch.testing.assert_close(load_autoencoder(str(tmp_path / "pipeline" / "vae")).encode(frames), loaded.encode(frames), rtol=0, atol=0)
    haar = load_autoencoder(str(tmp_path / "haar"))
    assert haar.factor == 4 and list(haar.vae.config.latents_std) == [2.0] * 48
    torch.testing.assert_close(haar.decode(haar.encode(frames)), frames, rtol=0, atol=1e-5)


def test_missing_autoencoder_is_one_line_with_the_remedy(tmp_path):
    for source in (str(tmp_path), str(tmp_path / "absent"), "a/b/c"):
        with pytest.raises(EncoderNotFound) as caught:
            load_autoencoder(source)
        message = str(caught.value)
        assert source in message and "\n" not in message
        assert "rdtf.encoders.autoencoder" in message and "hf download stabilityai/sd-vae-ft-mse" in message


def test_unreadable_or_foreign_weights_are_named(tmp_path):
    vae = tiny_autoencoder()
    vae.save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(EncoderNotFound, match="loading it fails"):
        load_autoencoder(str(tmp_path / "cut"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(EncoderNotFound, match="UNet2DModel"):
        load_autoencoder(str(tmp_path / "other"))


def test_wrong_arguments_are_refused():
    with pytest.raises(UserError, match="haar:3"):
        load_autoencoder("haar:3")
    with pytest.raises(ValueError, match="2 or 4"):
        HaarAutoencoder(8)
    with pytest.raises(ValueError, match="12 values"):
        HaarAutoencoder(2, latents_std=[1.0] * 11)
    with pytest.raises(ValueError, match="10x16"):
        load_autoencoder("haar:4").encode(torch.zeros(1, 3, 1, 16, 10))
