"""RDTFPipeline against hand-written loops and a network whose answers are known."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rdtf_ds.errors import UserError
from rdtf_ds.models.autoencoder import FrameAutoencoder, HaarAutoencoder
from rdtf_ds.models.text_conditioning import TextFeatures
from rdtf_ds.pipeline import NO_CAPTION, RDTFPipeline
from rdtf_ds.seeding import torch_generator
from tests.small_models import CHANNELS, FACTOR, SIDE, make_pipeline, small_dfgn, text_parts

LATENT = SIDE // FACTOR
RED, BLUE = (np.full((SIDE, SIDE, 3), colour, np.uint8) for colour in ((200, 30, 30), (20, 40, 220)))


@pytest.fixture(scope="module")
def encoders() -> dict[str, Any]:
    return text_parts()


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
    pipeline.unet.hidden = pipeline._encode_text([caption]).clip[0]
    return pipeline


# --- guidance


@pytest.mark.parametrize(
    ("prompt", "frames", "expected", "passes"),
    [
        ("a red star", {0: RED}, 1 + 2 * (10 - 1) + 3 * (100 - 10), 3),  # the formula with s_I = 2, s_T = 3
        ("a red star", None, 1 + 3 * (1000 - 1), 2),  # no visible frame: the image term vanishes
        (None, {0: RED}, 1 + 2 * (10 - 1), 2),  # no caption: the text term vanishes
        ("  ", {}, 1, 1),
    ],
)
def test_two_way_guidance_gives_each_term_its_own_scale(encoders, prompt, frames, expected, passes):
    pipeline = known(encoders, "# # #" if prompt and prompt.strip() else NO_CAPTION)
    seen = []
    step = pipeline.scheduler.step
    pipeline.scheduler.step = lambda epsilon, *rest, **options: (seen.append(epsilon), step(epsilon, *rest, **options))[1]
    pipeline(prompt, frames, num_inference_steps=1, seeds=0)
    assert torch.equal(seen[0], torch.full_like(seen[0], expected))
    assert len(pipeline.unet.samples[0]) == passes


def test_batched_passes_equal_three_separate_ones(encoders):
    pipeline = make_pipeline(encoders, small_dfgn())
    prompts, pictures = ["a red star slides left", "a blue heart rises"], [{0: RED}, {1: BLUE, 3: RED}]
    epsilon = []
    step = pipeline.scheduler.step
    pipeline.scheduler.step = lambda eps, *rest, **options: (epsilon.append(eps), step(eps, *rest, **options))[1]
    starts = []
    noise = torch.stack([torch.randn(CHANNELS, 8, LATENT, LATENT, generator=torch_generator(seed, "sampling noise")) for seed in (3, 9)])
    pipeline(prompts, pictures, num_frames=5, num_inference_steps=1, seeds=[3, 9])

    latents, guidance = noise[:, :, :5], torch.zeros(2, CHANNELS, 5, LATENT, LATENT)
    encode = FrameAutoencoder(HaarAutoencoder(FACTOR)).encode
    for clip, number, picture in ((0, 0, RED), (1, 1, BLUE), (1, 3, RED)):
        pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1).float()[None, :, None] / 127.5 - 1
        guidance[clip, :, number] = encode(pixels)[0, :, 0]
    for prompt, hidden, visual, start in zip(prompts, ["# # # # #", "# # # #"], guidance, latents, strict=True):
        ask = lambda picture, text, start=start: pipeline.unet(  # noqa: E731
            torch.cat([start, picture])[None], torch.tensor([999]), pipeline._encode_text([text])
        )
        with torch.no_grad():
            none, image, both = ask(torch.zeros_like(visual), hidden), ask(visual, hidden), ask(visual, prompt)
        assert not torch.allclose(none, image, atol=1e-3) and not torch.allclose(image, both, atol=1e-3)
        starts.append(none + 2.0 * (image - none) + 3.0 * (both - image))
    torch.testing.assert_close(epsilon[0], torch.cat(starts), rtol=1e-4, atol=1e-4)


def test_text_is_hidden_word_by_word(encoders, monkeypatch):
    pipeline = make_pipeline(encoders, small_dfgn())
    asked: list[list[str]] = []
    encode = pipeline._encode_text
    monkeypatch.setattr(pipeline, "_encode_text", lambda captions: (asked.append(captions), encode(captions))[1])
    pipeline(["a red star", None], {0: RED}, num_inference_steps=1, seeds=0)
    assert asked == [["# # #", NO_CAPTION] * 2 + ["a red star", NO_CAPTION]]


# --- visible frames


@pytest.mark.parametrize("guidance", ["latent", "pixel"])
def test_visible_frames_stand_on_their_own_channels(encoders, guidance):
    pipeline = known(encoders, guidance=guidance)
    pipeline(None, [{1: RED, 3: BLUE}, {0: BLUE}], num_frames=4, num_inference_steps=2, seeds=0)
    encode = FrameAutoencoder(HaarAutoencoder(FACTOR)).encode
    for sample in pipeline.unet.samples:
        none, image = sample[:, CHANNELS:].chunk(2)  # two passes: without and with visible frames
        assert not none.any()
        for clip, pictures in enumerate(({1: RED, 3: BLUE}, {0: BLUE})):
            for number in range(4):
                if number not in pictures:
                    assert not image[clip, :, number].any()
                    continue
                pixels = torch.from_numpy(pictures[number].copy()).permute(2, 0, 1).float() / 127.5 - 1
                if guidance == "latent":
                    expected = encode(pixels[None, :, None])[0, :, 0]
                else:  # one colour stays itself at any size; the fourth channel is the mask
                    expected = torch.cat([pixels[:, :LATENT, :LATENT], torch.ones(1, LATENT, LATENT)])
                torch.testing.assert_close(image[clip, :, number], expected)


@pytest.mark.parametrize("keep", [True, False])
def test_given_frames_stay_as_given_unless_asked_otherwise(encoders, keep):
    pipeline = known(encoders)
    clips = pipeline(None, {0: RED, 4: BLUE}, num_frames=5, num_inference_steps=2, seeds=1, keep_given_frames=keep).frames
    assert np.array_equal(clips[0, 0], RED) == keep and np.array_equal(clips[0, 4], BLUE) == keep
    assert all(not np.array_equal(clips[0, number], picture) for number in (1, 2, 3) for picture in (RED, BLUE))


def test_pictures_are_fitted_like_training_clips(encoders):
    pipeline = make_pipeline(encoders, small_dfgn(), background=(10, 250, 10))
    wide = Image.new("RGBA", (40, 20), (0, 0, 255, 255))
    wide.paste((255, 0, 0, 0), (0, 0, 20, 20))  # the left half transparent: red must not show through
    frame = pipeline(None, {2: wide}, num_inference_steps=1, seeds=0).frames[0, 2]
    assert (frame[:4] == (10, 250, 10)).all() and (frame[-4:] == (10, 250, 10)).all()  # 16×8 in a square of 16
    assert (frame[5:11, :6] == (10, 250, 10)).all() and (frame[5:11, 10:] == (0, 0, 255)).all()
    grey = Image.new("L", (SIDE, SIDE), 77)
    assert (pipeline(None, {0: grey}, num_inference_steps=1, seeds=0).frames[0, 0] == 77).all()


# --- sampling


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sampling_equals_a_hand_written_ddim_loop(encoders, eta):
    """Equations 12 and 16 of DDIM (Song et al., 2021), in float64, with the noise the seed stands for."""
    pipeline = make_pipeline(encoders, small_dfgn())
    result = pipeline(None, None, num_frames=3, num_inference_steps=5, eta=eta, seeds=7, output_type="latent").frames

    alphas = np.cumprod(1 - np.linspace(0.00085, 0.012, 1000))
    generator = torch_generator(7, "sampling noise")
    draw = lambda: torch.randn(CHANNELS, 8, LATENT, LATENT, generator=generator)[None, :, :3].double()  # noqa: E731
    latents, text = draw(), pipeline._encode_text([NO_CAPTION])
    for timestep in (999, 799, 599, 399, 199):
        alpha, before = alphas[timestep], alphas[timestep - 200] if timestep >= 200 else 1.0
        sample = torch.cat([latents, torch.zeros_like(latents)], dim=1).float()
        with torch.no_grad():
            epsilon = pipeline.unet(sample, torch.tensor([timestep]), text).double()
        clean = (latents - math.sqrt(1 - alpha) * epsilon) / math.sqrt(alpha)
        sigma = eta * math.sqrt((1 - before) / (1 - alpha) * (1 - alpha / before))
        latents = math.sqrt(before) * clean + math.sqrt(1 - before - sigma**2) * epsilon
        if eta:
            latents = latents + sigma * draw()
    torch.testing.assert_close(result.double(), latents, rtol=1e-3, atol=1e-3)


def test_a_clip_depends_on_its_own_seed_alone(encoders):
    pipeline = make_pipeline(encoders, small_dfgn())
    options = {"num_inference_steps": 3, "num_frames": 4, "output_type": "latent"}
    together = pipeline(["a red star", "a blue heart", "a red star"], seeds=[5, 6, 5], **options).frames
    alone = pipeline("a blue heart", seeds=[6], **options).frames
    torch.testing.assert_close(together[1], alone[0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(together[0], together[2], rtol=1e-2, atol=1e-2)
    assert (together[0] - pipeline("a red star", seeds=[8], **options).frames[0]).abs().max() > 0.1
    counted = pipeline(["a red star", "a blue heart"], seeds=5, **options).frames  # one number counts up
    torch.testing.assert_close(counted, together[:2], rtol=1e-2, atol=1e-2)


def test_a_shorter_clip_starts_from_the_same_noise(encoders):
    pipeline = known(encoders)
    pipeline(None, None, num_frames=8, num_inference_steps=1, seeds=2)
    pipeline(None, None, num_frames=3, num_inference_steps=1, seeds=2)
    long, short = pipeline.unet.samples
    assert short.shape[2] == 3 and torch.equal(long[:, :CHANNELS, :3], short[:, :CHANNELS])


def test_generators_stand_for_seeds(encoders):
    pipeline = make_pipeline(encoders, small_dfgn())
    make = lambda generator, prompt=("a star", "a star"): pipeline(  # noqa: E731
        list(prompt), generator=generator, num_frames=3, num_inference_steps=1, output_type="latent"
    ).frames
    one = make(torch.Generator().manual_seed(1))
    torch.testing.assert_close(one, make(torch.Generator().manual_seed(1)))
    assert not torch.allclose(one[0], one[1])
    both = [torch.Generator().manual_seed(seed) for seed in (1, 1)]
    twins = make(both)
    torch.testing.assert_close(twins[0], twins[1], rtol=1e-2, atol=1e-2)
    torch.manual_seed(3)
    first = make(None)
    assert not torch.allclose(first, make(None))
    torch.manual_seed(3)
    torch.testing.assert_close(first, make(None))


def test_defaults_of_the_model_are_used(encoders):
    pipeline = known(encoders)
    pipeline(None, None, seeds=0)
    assert [int(timestep[0]) for timestep in pipeline.unet.timesteps] == [999, 749, 499, 249]  # steps = 4, from the last trained one
    assert pipeline.unet.samples[0].shape == (1, 2 * CHANNELS, 8, LATENT, LATENT)


def test_callback_sees_and_replaces_the_latents(encoders):
    pipeline = known(encoders)
    seen = []

    def callback(owner: RDTFPipeline, number: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((owner is pipeline, number, int(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    clips = pipeline(None, None, seeds=0, callback_on_step_end=callback, output_type="latent")[0]
    assert seen == [(True, 0, 999), (True, 1, 749), (True, 2, 499), (True, 3, 249)] and not clips.any()


# --- results


def test_output_types(encoders):
    pipeline = make_pipeline(encoders, small_dfgn())
    call = lambda **options: pipeline("a star", num_frames=3, num_inference_steps=2, seeds=[1], **options)  # noqa: E731
    array = call().frames
    assert array.shape == (1, 3, SIDE, SIDE, 3) and array.dtype == np.uint8
    images = call(output_type="pil").frames
    assert len(images) == 1 and all(np.array_equal(image, frame) for image, frame in zip(images[0], array[0], strict=True))
    latents = call(output_type="latent").frames
    pixels = FrameAutoencoder(HaarAutoencoder(FACTOR)).decode(latents)
    expected = ((pixels + 1) * 127.5).clamp(0, 255).round().permute(0, 2, 3, 4, 1)
    assert np.array_equal(array, expected.numpy().astype(np.uint8))
    assert np.array_equal(call(return_dict=False)[0], array)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 2}, "3 to 8"),
        ({"num_frames": 9}, "3 to 8"),
        ({"num_inference_steps": 0}, "1 to 1000"),
        ({"frames": {5: RED}, "num_frames": 5}, "numbered 0 to 4"),
        ({"frames": {-1: RED}}, "numbered 0 to 7"),
        ({"frames": dict.fromkeys(range(3), RED), "num_frames": 3}, "leave at least one out"),
        ({"frames": {0: "a.png"}}, "PIL image"),
        ({"frames": {0: RED.astype(np.float32)}}, "float32"),
        ({"prompt": ["a", "b"], "seeds": [1]}, "prompt: 2, seeds: 1"),
        ({"prompt": []}, "at least one"),
        ({"seeds": 1, "generator": torch.Generator()}, "one of them"),
        ({"output_type": "gif"}, "np, pil or latent"),
    ],
)
def test_requests_that_do_not_fit_are_refused(encoders, options, message):
    with pytest.raises(UserError, match=message):
        known(encoders)(**options)


def test_a_model_that_makes_nan_is_not_shown_as_black_pictures(encoders):
    with pytest.raises(UserError, match="NaN"):
        known(encoders, answers=(float("nan"), 0, 0, 0))(None, None, num_inference_steps=1, seeds=0)


def test_saved_pipeline_loads_and_makes_the_same_clip(encoders, tmp_path):
    pipeline = make_pipeline(encoders, small_dfgn(), background=(1, 2, 3), eta=0.5, slice_frames=5)
    options = {"prompt": "a red star", "frames": {0: RED}, "num_inference_steps": 2, "seeds": [4]}
    clip = pipeline(**options).frames
    pipeline.save_pretrained(tmp_path)
    loaded = RDTFPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert (loaded.config.steps, loaded.config.eta, tuple(loaded.config.background)) == (4, 0.5, (1, 2, 3))
    assert loaded.config.slice_frames == 5
    assert np.array_equal(loaded(**options).frames, clip)
    half = RDTFPipeline.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert half.unet.dtype == torch.float16 and half.text_encoder.dtype == torch.float16
    assert half.text_encoder_2.dtype == torch.float32  # T5 overflows in fp16
    half.set_progress_bar_config(disable=True)
    assert np.abs(half(**options).frames.astype(int) - clip).mean() < 2


def test_an_export_from_before_slices_could_be_chosen_loads(encoders, tmp_path):
    make_pipeline(encoders, small_dfgn()).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    del index["slice_frames"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert RDTFPipeline.from_pretrained(tmp_path).config.slice_frames == 8


@pytest.mark.parametrize(("settings", "slices"), [({}, [8]), ({"slice_frames": 3}, [3, 3, 2])])
def test_frames_pass_through_the_autoencoder_in_slices(encoders, monkeypatch, settings, slices):
    pipeline = make_pipeline(encoders, small_dfgn(), **settings)
    seen = []
    decode = pipeline.vae.decode
    monkeypatch.setattr(pipeline.vae, "decode", lambda latents: (seen.append(len(latents)), decode(latents))[1])
    pipeline(None, None, num_inference_steps=1, seeds=0)
    assert seen == slices


def test_a_folder_that_is_no_export_is_named(tmp_path):
    with pytest.raises(UserError, match="model_index.json"):
        RDTFPipeline.from_pretrained(tmp_path)
