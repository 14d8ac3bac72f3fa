"""Sampling against hand-written loops: steps, samplers, the noise a seed stands for, callbacks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rdtf_ds.errors import UserError
from rdtf_ds.pipeline import RDTFPipeline
from rdtf_ds.seeding import torch_generator
from tests.pipeline.known_unet import BLUE, LATENT, RED, assert_same_but_for_rounding, known
from tests.small_models import CHANNELS, make_pipeline, small_dfgn


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
