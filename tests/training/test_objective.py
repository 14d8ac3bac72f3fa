from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rdtf_ds.data.batch import StoredFeatures
from rdtf_ds.diffusion.loss import alphas_cumprod
from rdtf_ds.models.autoencoder import FrameAutoencoder, HaarAutoencoder
from rdtf_ds.models.text_conditioning import TextFeatures
from rdtf_ds.training.objective import FrozenEncoders, Objective, read_features

B, C, F, SIDE = 2, 12, 4, 4
ALPHAS = alphas_cumprod("linear", 0.00085, 0.012, 1000)


class Captions:
    """Stands for the encoders: the length of a caption as its feature."""

    def encode(self, captions):
        lengths = torch.tensor([float(len(caption)) for caption in captions])
        return TextFeatures(lengths[:, None, None], -lengths[:, None, None])


def objective(guidance: str = "latent", gamma: float | None = None, dtype: torch.dtype = torch.float32) -> Objective:
    encoders = FrozenEncoders(FrameAutoencoder(HaarAutoencoder(2)), Captions())
    return Objective(encoders, ALPHAS, guidance, gamma, torch.device("cpu"), dtype)


def batch(**changes):
    generator = torch.Generator().manual_seed(4)
    condition_mask = torch.tensor([[True, False, False, True], [False, True, False, False]])
    frame_mask = torch.tensor([[True] * 4, [True, True, True, False]])
    values = {
        "frames": torch.randint(0, 256, (B, 3, F, 2 * SIDE, 2 * SIDE), generator=generator, dtype=torch.uint8),
        "condition_mask": condition_mask,
        "frame_mask": frame_mask,
        "captions": ["a", "abc"],
        "timestep": torch.tensor([10, 900]),
        "noise": torch.randn(B, C, F, SIDE, SIDE, generator=generator),
    }
    return SimpleNamespace(**(values | changes))


def test_the_network_sees_noisy_latents_then_visible_frames():
    shown, clips = objective(), batch()
    encoded = shown.encode(clips)
    latents = shown.encoding.autoencoder.encode(clips.frames.float() / 127.5 - 1)
    noisy, visible = encoded.sample.split(C, dim=1)
    for sample, t in enumerate((10, 900)):
        expected = ALPHAS[t].sqrt().float() * latents[sample] + (1 - ALPHAS[t]).sqrt().float() * clips.noise[sample]
        torch.testing.assert_close(noisy[sample], expected)
        for frame in range(F):
            guided = latents[sample, :, frame] if clips.condition_mask[sample, frame] else torch.zeros(C, SIDE, SIDE)
            assert torch.equal(visible[sample, :, frame], guided)
    assert encoded.text.clip.flatten().tolist() == [1.0, 3.0]


def test_pixels_span_minus_one_to_one():
    shown = objective("pixel")
    white = batch(frames=torch.full((B, 3, F, 8, 8), 255, dtype=torch.uint8), condition_mask=torch.ones(B, F, dtype=torch.bool))
    assert torch.equal(shown.encode(white).sample[:, C : C + 3], torch.ones(B, 3, F, SIDE, SIDE))
    black = batch(frames=torch.zeros((B, 3, F, 8, 8), dtype=torch.uint8), condition_mask=torch.ones(B, F, dtype=torch.bool))
    assert torch.equal(shown.encode(black).sample[:, C : C + 3], -torch.ones(B, 3, F, SIDE, SIDE))
    assert torch.equal(shown.encode(black).sample[:, C + 3], torch.ones(B, F, SIDE, SIDE))


def test_the_answer_is_the_noise_and_padding_does_not_count():
    shown, clips = objective(), batch()
    encoded = shown.encode(clips)

    def knows_the_noise(sample, timestep, text, frame_mask):
        assert frame_mask is not None
        answer = clips.noise.clone()
        answer[1, :, 3] = 100.0  # a padded frame
        return answer

    assert torch.equal(shown.losses(knows_the_noise, encoded), torch.zeros(B))
    off_by_one = shown.losses(lambda *inputs: clips.noise + torch.tensor([1.0, 2.0])[:, None, None, None, None], encoded)
    assert off_by_one.tolist() == pytest.approx([1.0, 4.0])


def test_visible_frames_count_in_the_loss():
    shown, clips = objective(), batch()
    answer = clips.noise.clone()
    answer[0, :, 0] += 2.0  # frame 0 of sample 0 is visible: 2² on one of 4 frames
    assert shown.losses(lambda *inputs: answer, shown.encode(clips)).tolist() == pytest.approx([1.0, 0.0])


def test_no_mask_is_passed_when_nothing_is_padded():
    shown, clips = objective(), batch(frame_mask=torch.ones(B, F, dtype=torch.bool))
    seen = []
    shown.losses(lambda sample, timestep, text, frame_mask: seen.append(frame_mask) or clips.noise, shown.encode(clips))
    assert seen == [None]


def test_min_snr_weights_nearly_clean_steps_down():
    plain, weighted, clips = objective(), objective(gamma=5.0), batch()
    ones = [s.losses(lambda *inputs: clips.noise + 1, s.encode(clips)) for s in (plain, weighted)]
    snr = ALPHAS[10] / (1 - ALPHAS[10])
    assert ones[1].tolist() == pytest.approx([float(5.0 / snr), 1.0], rel=1e-5)


def test_half_precision_reaches_the_network_alone():
    shown, clips = objective(dtype=torch.bfloat16), batch()
    encoded = shown.encode(clips)
    assert encoded.sample.dtype == encoded.text.clip.dtype == torch.bfloat16
    losses = shown.losses(lambda sample, timestep, text, frame_mask: sample[:, :C], encoded)
    assert encoded.noise.dtype == losses.dtype == torch.float32


def stored_features(pixels: bool = True) -> StoredFeatures:
    generator = torch.Generator().manual_seed(6)
    small = torch.randn(B, 3, F, SIDE, SIDE, generator=generator).half() if pixels else None
    text = torch.randn(2, B, 5, 7, generator=generator).half()
    return StoredFeatures(torch.randn(B, C, F, SIDE, SIDE, generator=generator).half(), small, text[0], text[1])


@pytest.mark.parametrize("guidance", ["latent", "pixel"])
def test_stored_features_take_the_encoders_place(guidance):
    features = stored_features()
    clips = batch(frames=None, features=features)
    encoded = replace(objective(guidance), encoding=read_features).encode(clips)
    noisy, visible = encoded.sample.split([C, encoded.sample.shape[1] - C], dim=1)
    alphas = ALPHAS[clips.timestep].float()[:, None, None, None, None]
    torch.testing.assert_close(noisy, alphas.sqrt() * features.latents.float() + (1 - alphas).sqrt() * clips.noise)
    shown = clips.condition_mask[:, None, :, None, None]
    expected = features.latents if guidance == "latent" else features.pixels
    assert torch.equal(visible[:, : expected.shape[1]], torch.where(shown, expected.float(), 0.0))
    if guidance == "pixel":
        assert torch.equal(visible[:, 3:], shown.float().expand(-1, 1, -1, SIDE, SIDE))
    assert torch.equal(encoded.text.clip, features.clip.float()) and torch.equal(encoded.text.t5, features.t5.float())
    assert encoded.sample.dtype == torch.float32


def test_features_of_the_wrong_kind_are_refused():
    with pytest.raises(ValueError, match="has no frames"):
        objective().encode(batch(frames=None, features=stored_features()))
    with pytest.raises(ValueError, match="has no stored features"):
        replace(objective(), encoding=read_features).encode(batch(features=None))
    with pytest.raises(ValueError, match="needs them"):
        replace(objective("pixel"), encoding=read_features).encode(batch(frames=None, features=stored_features(pixels=False)))
