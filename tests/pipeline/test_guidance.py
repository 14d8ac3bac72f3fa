"""What the pipeline shows its network, and how it joins the answers, against a network whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rdtf_ds import samplers
from rdtf_ds.errors import UserError
from rdtf_ds.models.autoencoder import FrameAutoencoder, HaarAutoencoder
from rdtf_ds.pipeline import NO_CAPTION
from rdtf_ds.seeding import torch_generator
from tests.pipeline.known_unet import BLUE, LATENT, RED, KnownUnet, assert_same_but_for_rounding, known
from tests.small_models import CHANNELS, FACTOR, make_pipeline, small_dfgn


@pytest.fixture
def guided(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The joined ε of every step made while the test runs."""
    seen: list[Tensor] = []
    make = samplers.step
    monkeypatch.setattr(samplers, "step", lambda scheduler, epsilon, *rest: (seen.append(epsilon), make(scheduler, epsilon, *rest))[1])
    return seen


# --- passes


@pytest.mark.parametrize(
    ("prompt", "frames", "expected", "passes"),
    [
        ("a red star", {0: RED}, 1 + 2 * (10 - 1) + 3 * (100 - 10), 3),  # the formula with s_I = 2, s_T = 3
        ("a red star", None, 1 + 3 * (1000 - 1), 2),  # no visible frame: the image term vanishes
        (None, {0: RED}, 1 + 2 * (10 - 1), 2),  # no caption: the text term vanishes
        ("  ", {}, 1, 1),
    ],
)
def test_two_way_guidance_gives_each_term_its_own_scale(encoders, guided, prompt, frames, expected, passes):
    pipeline = known(encoders, "# # #" if prompt and prompt.strip() else NO_CAPTION)
    pipeline(prompt, frames, num_inference_steps=1, seeds=0, unconditional=True)
    assert torch.equal(guided[0], torch.full_like(guided[0], expected))
    assert len(pipeline.unet.samples[0]) == passes


@pytest.mark.parametrize(
    ("prompt", "frames", "image_scale", "text_scale", "answers", "expected"),
    [
        ("a red star", {0: RED}, 1, 1, {100}, 100),  # ε(T,I) alone
        ("a red star", {0: RED}, 0, 0, {1}, 1),  # ε(∅,∅) alone
        ("a red star", {0: RED}, 1, 0, {10}, 10),  # ε(∅,I) alone: no caption passes through
        ("a red star", {0: RED}, 5, 5, {1, 100}, 1 + 5 * 99),  # ε(∅,I) cancels
        ("a red star", {0: RED}, 5, 0, {1, 10}, 1 + 5 * 9),
        ("a red star", {0: RED}, 1, 5, {10, 100}, 10 + 5 * 90),
        ("a red star", {0: RED}, 0, 5, {1, 10, 100}, 1 + 5 * 90),
        ("a red star", None, 9, 1, {1000}, 1000),
        ("a red star", None, 9, 0, {1}, 1),
        (None, {0: RED}, 1, 9, {10}, 10),
        (None, {0: RED}, 0, 9, {1}, 1),
    ],
)
def test_scales_that_need_no_pass_skip_it(encoders, guided, prompt, frames, image_scale, text_scale, answers, expected):
    pipeline = known(encoders, "# # #" if prompt else NO_CAPTION)
    asked = []
    answer = pipeline.unet.__class__.__call__
    pipeline.unet.__class__ = type("Spy", (KnownUnet,), {"__call__": lambda *given: (asked.append(answer(*given)), asked[-1])[1]})
    pipeline(prompt, frames, num_inference_steps=1, seeds=0, image_scale=image_scale, text_scale=text_scale)
    assert {int(clip.flatten()[0]) for clip in asked[0]} == answers and len(asked[0]) == len(answers)
    assert torch.equal(guided[0], torch.full_like(guided[0], expected))


def test_batched_passes_equal_three_separate_ones(encoders, guided):
    pipeline = make_pipeline(encoders, small_dfgn())
    prompts, pictures = ["a red star slides left", "a blue heart rises"], [{0: RED}, {1: BLUE, 3: RED}]
    rows = []
    pipeline.unet.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    starts = []
    noise = torch.stack([torch.randn(CHANNELS, 8, LATENT, LATENT, generator=torch_generator(seed, "sampling noise")) for seed in (3, 9)])
    pipeline(prompts, pictures, num_frames=5, num_inference_steps=1, seeds=[3, 9])
    assert rows == [3 * 2]

    latents, guidance = noise[:, :, :5], torch.zeros(2, CHANNELS, 5, LATENT, LATENT)
    encode = FrameAutoencoder(HaarAutoencoder(FACTOR)).encode
    for clip, number, picture in ((0, 0, RED), (1, 1, BLUE), (1, 3, RED)):
        pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1).float()[None, :, None] / 127.5 - 1
        guidance[clip, :, number] = encode(pixels)[0, :, 0]
    for prompt, hidden, visual, start in zip(prompts, ["# # # # #", "# # # #"], guidance, latents, strict=True):
        ask = lambda picture, text, start=start: pipeline.unet(  # noqa: E731
            torch.cat([start, picture])[None], torch.tensor([999]), pipeline.encode_text([text])
        )
        with torch.no_grad():
            none, image, both = ask(torch.zeros_like(visual), hidden), ask(visual, hidden), ask(visual, prompt)
        assert not torch.allclose(none, image, atol=1e-3) and not torch.allclose(image, both, atol=1e-3)
        starts.append(none + 2.0 * (image - none) + 3.0 * (both - image))
    assert_same_but_for_rounding(guided[0], torch.cat(starts))


@pytest.mark.parametrize("max_batch", [1, 2, 4, 5])
def test_a_bounded_batch_gives_the_same_clips(encoders, max_batch):
    pipeline = make_pipeline(encoders, small_dfgn())
    options = {"prompt": ["a red star", "a heart"], "frames": [{0: RED}, None], "seeds": 3, "num_frames": 3, "output_type": "latent"}
    whole = pipeline(**options).frames
    rows = []
    pipeline.unet.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    bounded = pipeline(**options, max_batch=max_batch).frames
    assert max(rows) == max_batch and sum(rows) == 4 * 3 * 2
    assert_same_but_for_rounding(bounded, whole)


def test_text_is_hidden_word_by_word(encoders, monkeypatch):
    pipeline = make_pipeline(encoders, small_dfgn())
    asked: list[list[str]] = []
    encode = pipeline.encode_text
    monkeypatch.setattr(pipeline, "encode_text", lambda captions: (asked.append(captions), encode(captions))[1])
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


def test_pictures_are_fitted_like_training_clips_where_asked(encoders):
    pipeline = make_pipeline(encoders, small_dfgn(), background=(10, 250, 10))
    wide = Image.new("RGBA", (40, 20), (0, 0, 255, 255))
    wide.paste((255, 0, 0, 0), (0, 0, 20, 20))  # the left half transparent: red must not show through
    frame = pipeline(None, {2: wide}, num_inference_steps=1, seeds=0, fit=True).frames[0, 2]
    assert (frame[:4] == (10, 250, 10)).all() and (frame[-4:] == (10, 250, 10)).all()  # 16×8 in a square of 16
    assert (frame[5:11, :6] == (10, 250, 10)).all() and (frame[5:11, 10:] == (0, 0, 255)).all()
    with pytest.raises(UserError, match=r"frame 2 is 40 x 20 pixels, but this model makes 16 x 16.*--fit"):
        pipeline(None, {2: wide}, num_inference_steps=1, seeds=0)
