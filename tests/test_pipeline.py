"""RDTFPipeline against hand-written loops and a network whose answers are known."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rdtf_ds import samplers
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


@pytest.fixture
def guided(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The joined ε of every step made while the test runs."""
    seen: list[Tensor] = []
    make = samplers.step
    monkeypatch.setattr(samplers, "step", lambda scheduler, epsilon, *rest: (seen.append(epsilon), make(scheduler, epsilon, *rest))[1])
    return seen


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


# --- sampling


def hand_written_ddim(pipeline: RDTFPipeline, frames: int, timesteps: list[int], eta: float, seed: int) -> Tensor:
    """Equations 12 and 16 of DDIM (Song et al., 2021), in float32, without guidance, with the noise the seed stands for."""
    alphas = torch.cumprod(1 - torch.linspace(0.00085, 0.012, 1000), dim=0)
    generator = torch_generator(seed, "sampling noise")
    draw = lambda: torch.randn(CHANNELS, 8, LATENT, LATENT, generator=generator)[None, :, :frames]  # noqa: E731
    latents, text = draw(), pipeline.encode_text(["a red star"])
    for timestep, following in zip(timesteps, [*timesteps[1:], None], strict=True):
        alpha, before = alphas[timestep], torch.tensor(1.0) if following is None else alphas[following]
        sample = torch.cat([latents, torch.zeros_like(latents)], dim=1)
        with torch.no_grad():
            epsilon = pipeline.unet(sample, torch.tensor([timestep]), text)
        clean = (latents - (1 - alpha) ** 0.5 * epsilon) / alpha**0.5
        sigma = eta * ((1 - before) / (1 - alpha) * (1 - alpha / before)) ** 0.5
        latents = before**0.5 * clean + (1 - before - sigma**2) ** 0.5 * epsilon
        if eta:
            latents = latents + sigma * draw()
    return latents


def test_without_guidance_and_noise_sampling_is_the_hand_written_loop_bit_for_bit(encoders):
    pipeline = make_pipeline(encoders, small_dfgn())
    options = {"num_frames": 3, "eta": 0.0, "seeds": 7, "output_type": "latent", "text_scale": 1.0, "image_scale": 1.0}
    for steps, timesteps in ((5, [999, 799, 599, 399, 199]), (50, list(range(999, 0, -20))), (3, [999, 666, 332])):
        made = pipeline("a red star", num_inference_steps=steps, **options).frames
        assert torch.equal(made, hand_written_ddim(pipeline, 3, timesteps, 0.0, 7))


def test_added_noise_is_that_of_the_seed(encoders):
    pipeline = make_pipeline(encoders, small_dfgn())
    options = {"num_frames": 4, "num_inference_steps": 4, "seeds": 5, "output_type": "latent", "text_scale": 1.0}
    for eta in (0.3, 1.0):
        made = pipeline("a red star", eta=eta, **options).frames
        torch.testing.assert_close(made, hand_written_ddim(pipeline, 4, [999, 749, 499, 249], eta, 5), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler", ["dpm++", "unipc"])
def test_other_samplers_are_diffusers_own_by_hand(encoders, sampler):
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    pipeline = make_pipeline(encoders, small_dfgn())
    before = dict(pipeline.scheduler.config)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    options = {"num_frames": 3, "num_inference_steps": 6, "seeds": 7, "text_scale": 1.0, "output_type": "latent"}
    made = pipeline("a red star", sampler=sampler, **options).frames
    assert torch.equal(torch.get_rng_state(), state), "noise was drawn from torch's global generator"
    kind = {"dpm++": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}[sampler]
    scheduler = kind(1000, 0.00085, 0.012, "linear", timestep_spacing="trailing")
    scheduler.set_timesteps(6)
    latents = torch.randn(CHANNELS, 8, LATENT, LATENT, generator=torch_generator(7, "sampling noise"))[None, :, :3]
    text = pipeline.encode_text(["a red star"])
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            epsilon = pipeline.unet(torch.cat([latents, torch.zeros_like(latents)], dim=1), timestep[None], text)
            latents = scheduler.step(epsilon, timestep, latents).prev_sample
    assert torch.equal(made, latents)
    assert type(pipeline.scheduler).__name__ == "DDIMScheduler" and dict(pipeline.scheduler.config) == before
    assert pipeline.scheduler.num_inference_steps is None, "the call changed the pipeline's own scheduler"
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config)  # as diffusers' users do it
    swapped = pipeline("a red star", **options).frames
    assert torch.equal(swapped, latents) and pipeline.settings().eta is None and pipeline.settings(sampler="ddim").eta == 1.0


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 0.0), ("ddim", 1.0), ("dpm++", None), ("unipc", None)])
def test_a_clip_depends_on_its_own_seed_alone(encoders, sampler, eta):
    """Captions of different lengths, clips with and without frames and captions: each is the one made alone."""
    pipeline = make_pipeline(encoders, small_dfgn())
    options = {"num_inference_steps": 5, "num_frames": 4, "output_type": "latent", "sampler": sampler, "eta": eta}
    prompts = ["a red star", "a blue heart that slides to the left", None, "a red star"]
    frames, seeds = [None, {0: RED}, {1: BLUE, 2: RED}, None], [5, 6, 8, 5]
    together = pipeline(prompts, frames, seeds=seeds, **options).frames
    for clip in range(4):
        alone = pipeline(prompts[clip], frames[clip], seeds=[seeds[clip]], **options).frames
        assert_same_but_for_rounding(together[clip], alone[0])
    assert_same_but_for_rounding(together[0], together[3])
    assert (together[0] - pipeline("a red star", seeds=[8], **options).frames[0]).abs().max() > 0.1
    counted = pipeline(prompts[:2], frames[:2], seeds=5, **options).frames  # one number counts up
    assert_same_but_for_rounding(counted, together[:2])


def test_given_latents_stand_for_the_first_noise(encoders):
    pipeline = make_pipeline(encoders, small_dfgn())
    options = {"num_frames": 3, "num_inference_steps": 3, "eta": 1.0, "output_type": "latent"}
    noise = torch.stack([torch.randn(CHANNELS, 8, LATENT, LATENT, generator=torch_generator(seed, "sampling noise")) for seed in (4, 5)])
    made = pipeline("a red star", seeds=4, latents=noise[:, :, :3], **options).frames  # they say how many clips
    assert torch.equal(made, pipeline(["a red star"] * 2, seeds=4, **options).frames)
    other = pipeline("a red star", seeds=4, latents=-noise[:, :, :3], **options).frames
    assert not torch.allclose(other, made, atol=0.1)
    with pytest.raises(UserError, match=r"latents are \(2, 12, 4, 8, 8\); these clips start from \(2, 12, 3, 8, 8\)"):
        pipeline("a red star", latents=noise[:, :, :4], **options)
    with pytest.raises(UserError, match="prompt: 3, latents: 2"):
        pipeline(["a"] * 3, latents=noise[:, :, :3], **options)


def test_a_callback_can_interrupt(encoders):
    pipeline = known(encoders)
    seen = []

    def callback(owner: RDTFPipeline, number: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((number, owner.interrupt))
        owner._interrupt = number == 1
        return {}

    pipeline("a star", seeds=0, callback_on_step_end=callback)
    assert seen == [(0, False), (1, False)] and len(pipeline.unet.samples) == 2 and pipeline.interrupt
    pipeline("a star", seeds=0)  # the next call is not interrupted
    assert len(pipeline.unet.samples) == 2 + 4


def test_a_shorter_clip_starts_from_the_same_noise(encoders):
    pipeline = known(encoders)
    pipeline(None, None, unconditional=True, num_frames=8, num_inference_steps=1, seeds=2)
    pipeline(None, None, unconditional=True, num_frames=3, num_inference_steps=1, seeds=2)
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
    pipeline(None, None, unconditional=True, seeds=0)
    assert [int(timestep[0]) for timestep in pipeline.unet.timesteps] == [999, 749, 499, 249]  # steps = 4, from the last trained one
    assert pipeline.unet.samples[0].shape == (1, 2 * CHANNELS, 8, LATENT, LATENT)


def test_callback_sees_and_replaces_the_latents(encoders):
    pipeline = known(encoders)
    seen = []

    def callback(owner: RDTFPipeline, number: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((owner is pipeline, number, int(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    clips = pipeline(None, None, unconditional=True, seeds=0, callback_on_step_end=callback, output_type="latent")[0]
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
        ({"num_frames": 1}, "num_frames is 1; this model makes 2 to 8"),
        ({"num_frames": 9}, "2 to 8"),
        ({"num_inference_steps": 0}, "1 to 1000"),
        ({"num_inference_steps": 1001}, "1 to 1000"),
        ({"frames": {5: RED}, "num_frames": 5}, "numbered 0 to 4"),
        ({"frames": {-1: RED}}, "numbered 0 to 7"),
        ({"frames": dict.fromkeys(range(3), RED), "num_frames": 3}, "leave at least one out"),
        ({"frames": {0: "a.png"}}, "PIL image"),
        ({"frames": {0: RED.astype(np.float32)}}, "float32"),
        ({"frames": {0: RED[:8]}}, "frame 0 is 16 x 8 pixels, but this model makes 16 x 16"),
        ({"prompt": ["a", "b"], "seeds": [1]}, "prompt: 2, seeds: 1"),
        ({"prompt": []}, "at least one"),
        ({"prompt": " "}, "neither a prompt nor a frame"),
        ({"prompt": None}, "unconditional=True"),
        ({"prompt": ["a", ""], "frames": None}, "clip 1 of 2 has neither"),
        ({"seeds": 1, "generator": torch.Generator()}, "one of them"),
        ({"output_type": "gif"}, "np, pil or latent"),
        ({"max_batch": 0}, "max_batch is 0"),
        ({"sampler": "euler"}, "'euler'; choose ddim, dpm.., unipc"),
        ({"sampler": "unipc", "eta": 0.5}, "eta is 0.5, but the sampler unipc has none"),
        ({"eta": 1.5}, "eta is 1.5"),
        ({"eta": -0.1}, "eta is -0.1"),
        ({"text_scale": float("nan")}, "text_scale is nan"),
        ({"image_scale": float("inf")}, "image_scale is inf"),
        ({"durations_ms": [100, 100]}, "2 numbers, but the clip has 8 frames"),
        ({"durations_ms": 5}, "holds 5"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "'noise'; there is only 'latents'"),
    ],
)
def test_requests_that_do_not_fit_are_refused(encoders, options, message):
    pipeline = known(encoders)
    with pytest.raises(UserError, match=message):
        pipeline(**{"prompt": "a star", **options})
    assert not pipeline.unet.samples


def test_two_frames_are_a_clip(encoders):
    output = make_pipeline(encoders, small_dfgn())("a star", {1: RED}, num_frames=2, num_inference_steps=2, seeds=0)
    assert output.frames.shape == (1, 2, SIDE, SIDE, 3) and np.array_equal(output.frames[0, 1], RED)


def test_durations_are_told_with_the_frames(encoders):
    pipeline = make_pipeline(encoders, small_dfgn(), frame_ms=90)
    call = lambda durations: pipeline(["a star"] * 2, num_frames=3, num_inference_steps=1, durations_ms=durations).durations_ms  # noqa: E731
    assert call(None) == [[90] * 3] * 2 and call(40) == [[40] * 3] * 2 and call([10, 200, 30]) == [[10, 200, 30]] * 2


def test_a_model_that_makes_nan_is_not_shown_as_black_pictures(encoders):
    with pytest.raises(UserError, match="NaN"):
        known(encoders, answers=(float("nan"), 0, 0, 0))(None, None, unconditional=True, num_inference_steps=1, seeds=0)


def test_saved_pipeline_loads_and_makes_the_same_clip(encoders, tmp_path):
    pipeline = make_pipeline(encoders, small_dfgn(), background=(1, 2, 3), eta=0.5, slice_frames=5, frame_ms=70)
    options = {"prompt": "a red star", "frames": {0: RED}, "num_inference_steps": 2, "seeds": [4]}
    clip = pipeline(**options).frames
    pipeline.save_pretrained(tmp_path)
    loaded = RDTFPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert (loaded.config.steps, loaded.config.eta, tuple(loaded.config.background)) == (4, 0.5, (1, 2, 3))
    assert (loaded.config.slice_frames, loaded.config.frame_ms) == (5, 70)
    assert np.array_equal(loaded(**options).frames, clip)
    half = RDTFPipeline.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert half.unet.dtype == torch.float16 and half.text_encoder.dtype == torch.float16
    assert half.text_encoder_2.dtype == torch.float32  # T5 overflows in fp16
    half.set_progress_bar_config(disable=True)
    assert np.abs(half(**options).frames.astype(int) - clip).mean() < 2


def test_an_export_from_before_there_were_these_settings_loads(encoders, tmp_path):
    make_pipeline(encoders, small_dfgn()).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    del index["slice_frames"], index["frame_ms"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    loaded = RDTFPipeline.from_pretrained(tmp_path)
    assert (loaded.config.slice_frames, loaded.config.frame_ms) == (8, 120)


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_the_sampler_is_saved_with_the_model(encoders, tmp_path, sampler):
    pipeline = make_pipeline(encoders, small_dfgn())
    pipeline.scheduler = samplers.make_sampler(sampler, "linear", 1000, 0.00085, 0.012)
    pipeline.save_pretrained(tmp_path)
    loaded = RDTFPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.settings().sampler == sampler
    options = {"prompt": "a star", "num_frames": 3, "seeds": 1, "output_type": "latent"}
    assert torch.equal(loaded(**options).frames, pipeline(**options).frames)


def test_bfloat16_makes_about_the_same_clip(encoders):
    pipeline = make_pipeline(encoders, small_dfgn())
    options = {"prompt": "a red star", "frames": {0: RED}, "num_inference_steps": 2, "seeds": [4]}
    clip = pipeline(**options).frames.astype(int)
    halved = pipeline.to(torch.bfloat16)(**options, output_type="latent").frames
    assert halved.dtype == torch.float32 and pipeline.unet.dtype == torch.bfloat16
    assert np.abs(pipeline(**options).frames - clip).mean() < 12


@pytest.mark.parametrize(("settings", "slices"), [({}, [8]), ({"slice_frames": 3}, [3, 3, 2])])
def test_frames_pass_through_the_autoencoder_in_slices(encoders, monkeypatch, settings, slices):
    pipeline = make_pipeline(encoders, small_dfgn(), **settings)
    seen = []
    decode = pipeline.vae.decode
    monkeypatch.setattr(pipeline.vae, "decode", lambda latents: (seen.append(len(latents)), decode(latents))[1])
    call = lambda: pipeline("a star", num_inference_steps=1, seeds=0).frames  # noqa: E731
    clip = call()
    assert seen == slices
    pipeline.enable_vae_slicing()
    assert np.array_equal(call(), clip) and seen[len(slices) :] == [1] * 8
    pipeline.disable_vae_slicing()
    call()
    assert seen[len(slices) + 8 :] == slices


def test_a_folder_that_is_no_export_is_named(tmp_path):
    with pytest.raises(UserError, match="model_index.json"):
        RDTFPipeline.from_pretrained(tmp_path)
