from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rdtf_ds.data.sources.captions import NO_CAPTION
from rdtf_ds.diffusion.loss import add_noise, alphas_cumprod
from rdtf_ds.diffusion.masks import Task, level, mask_family
from rdtf_ds.models.text_conditioning import TextFeatures
from rdtf_ds.training.held_out import TASKS, HeldOutClip, HeldOutLoss, SampleLoss, means
from rdtf_ds.training.objective import Features, Objective
from rdtf_ds.training.validation_units import Interrupted

ALPHAS = alphas_cumprod("linear", 0.00085, 0.012, 1000)
TIMESTEPS = (100, 900)
CPU = torch.device("cpu")


def clips(count=5):
    """Clip n has 3 + n frames of noise and a caption; the last has none."""
    rng = np.random.default_rng(0)
    captions = [*(f"clip {n}" for n in range(count - 1)), ""]
    return [HeldOutClip(f"{n}.gif", text, rng.integers(0, 256, (3 + n, 8, 8, 3), np.uint8)) for n, text in enumerate(captions)]


class Encoders:
    """Latents are frames at half the size; text says how long the caption is. Counts what it encodes."""

    def __init__(self):
        self.asked = []

    def __call__(self, batch, device):
        self.asked.append(list(batch.captions))
        pixels = batch.frames.float() / 127.5 - 1
        text = torch.full((1, 2, 3), float(len(batch.captions[0])))
        return Features(pixels[..., ::2, ::2], pixels, TextFeatures(text, 2 * text))


class Network:
    """Answers with the noisy latents less what it sees of clean ones; keeps what it was shown."""

    def __init__(self):
        self.shown = []

    def __call__(self, sample, timestep, text, frame_mask):
        assert not torch.is_grad_enabled()
        self.shown.append((sample.clone(), timestep.clone(), text, frame_mask))
        return sample[:, :3] - sample[:, 3:6]


def held_out(rank=0, world=1, seed=7, gamma=0.2, guidance="latent", made=None, timesteps=TIMESTEPS):
    encoders = Encoders()
    objective = Objective(encoders, ALPHAS, guidance, gamma, CPU, torch.float32)
    return HeldOutLoss(clips() if made is None else made, timesteps, seed, objective, lambda: encoders, rank, world), encoders


def test_every_clip_is_measured_for_each_task_at_each_timestep():
    measure, encoders = held_out()
    network = Network()
    samples = measure.measure(network)
    assert {(s.clip, s.task, s.timestep) for s in samples} == {(c, task, t) for c in range(5) for task in Task for t in TIMESTEPS}
    assert len(samples) == 30 and len(network.shown) == 10 and all(math.isfinite(s.loss) for s in samples)
    assert encoders.asked == [["clip 0"], ["clip 1"], ["clip 2"], ["clip 3"], [NO_CAPTION]], "one clip at a time"


@pytest.mark.parametrize(("call", "t"), [(2, 100), (3, 900)])
def test_a_sample_is_what_the_method_says(call, t):
    measure, _ = held_out()
    network = Network()
    by_key = {(s.clip, s.task, s.timestep): s.loss for s in measure.measure(network)}
    sample, timestep, text, frame_mask = network.shown[call]  # clip 1
    assert timestep.tolist() == [t] * 3 and frame_mask is None and sample.shape == (3, 6, 4, 4, 4)
    assert text.clip.shape == (3, 2, 3) and float(text.t5[0, 0, 0]) == 2 * len("clip 1")
    clean = torch.from_numpy(clips()[1].frames).permute(3, 0, 1, 2).float()[..., ::2, ::2] / 127.5 - 1
    for row, task in enumerate(TASKS):
        seen = (sample[row, 3:] != 0).flatten(2).any(dim=2).any(dim=0)
        mask = tuple(seen.tolist())
        assert mask in mask_family(task, 4)
        assert torch.equal(sample[row, 3:, seen], clean[:, seen]), "visible frames are clean"
        alpha = ALPHAS[t]
        noise = (sample[row, :3] - alpha.sqrt().float() * clean) / (1 - alpha).sqrt().float()
        assert 0.6 < noise.std() < 1.4
        again = add_noise(clean[None], noise[None], torch.tensor([t]), ALPHAS)
        expected = (again[0] - sample[row, 3:] - noise).square().mean()
        assert by_key[1, task, t] == pytest.approx(float(expected), rel=1e-3), "all frames count, without a weight"
    assert level(mask_family(Task.GENERATION, 4)[-1]) == 4


def test_the_samples_are_the_same_every_time_and_change_with_the_seed():
    first, again, other = Network(), Network(), Network()
    measure, encoders = held_out()
    losses = measure.measure(first)
    assert measure.measure(again) == losses and len(encoders.asked) == 5, "encoded once"
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first.shown, again.shown, strict=True))
    assert held_out(seed=8)[0].measure(other) != losses
    noises = [shown[0][row, :3] for shown in first.shown[:2] for row in range(3)]
    assert all(not torch.equal(noises[i], noises[j]) for i in range(6) for j in range(i)), "each sample has its own noise"


@pytest.mark.parametrize("world", [2, 3, 8])
def test_any_number_of_ranks_measures_the_same(world):
    alone = held_out()[0].measure(Network())
    shared = [sample for rank in reversed(range(world)) for sample in held_out(rank, world)[0].measure(Network())]
    assert sorted(shared) == sorted(alone)
    assert means(shared) == means(alone)


def test_no_generator_of_others_is_touched():
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    held_out()[0].measure(Network())
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()


def test_guidance_by_pixels_sees_pixels():
    made = clips(2)
    measure, _ = held_out(guidance="pixel", made=made, timesteps=(500,))
    network = Network()
    network.__class__ = type("Wide", (Network,), {"__call__": lambda self, s, t, x, m: self.shown.append(s) or s[:, :3]})
    measure.measure(network)
    sample = network.shown[0]
    assert sample.shape == (3, 7, 3, 4, 4)
    small = torch.from_numpy(made[0].frames).permute(3, 0, 1, 2).float().reshape(3, 3, 4, 2, 4, 2).mean(dim=(3, 5)) / 127.5 - 1
    for row in range(3):
        visible = sample[row, 6].flatten(1).amax(dim=1).bool()
        torch.testing.assert_close(sample[row, 3:6, visible], small[:, visible], atol=1e-6, rtol=0)


def test_a_stop_ends_it_between_two_samples():
    calls = []

    def hurry():
        calls.append(1)
        return len(calls) > 7

    network = Network()
    with pytest.raises(Interrupted):
        held_out()[0].measure(network, hurry)
    assert len(network.shown) == 2, "five clips were encoded before"


def test_means_by_task_and_timestep():
    samples = [
        SampleLoss(0, Task.INTERPOLATION, 5, 1.0), SampleLoss(1, Task.INTERPOLATION, 500, 2.0), SampleLoss(0, Task.GENERATION, 500, 6.0),
    ]  # fmt: skip
    assert means(samples) == {"loss": 3.0, "loss_IPT": 1.5, "loss_GRT": 6.0, "loss_t0005": 1.0, "loss_t0500": 4.0}
    assert means([]) == {}
