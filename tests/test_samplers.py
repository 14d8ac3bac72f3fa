"""Every sampler starts at the last trained timestep, ends on the clean clip, and is told of noise only where it takes any."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from rdtf_ds.errors import UserError
from rdtf_ds.samplers import SAMPLERS, ClipNoise, begin, make_sampler, sampler_name, step, swap_sampler

BETAS = (0.00085, 0.012)
ALPHAS = torch.cumprod(1 - torch.linspace(*BETAS, 1000, dtype=torch.float64), dim=0)


def made(name: str, schedule: str = "linear"):
    return make_sampler(name, schedule, 1000, *BETAS)


def no_noise() -> Tensor:
    raise AssertionError("this sampler adds no noise")


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 25, 30, 60, 61, 103, 600, 1000])
def test_steps_start_at_the_end_of_training_and_land_on_the_clean_clip(name, steps):
    """A network that always knows the clean clip leads any sampler exactly there, if its last step leaves no noise."""
    scheduler = begin(made(name), steps)
    timesteps = scheduler.timesteps.tolist()
    assert len(timesteps) == steps and timesteps[0] == 999 and timesteps[-1] >= 0
    assert all(before > after for before, after in zip(timesteps, timesteps[1:], strict=False))
    generator = torch.Generator().manual_seed(0)
    clean, latents = (torch.randn(1, 2, 2, 3, 3, generator=generator) for _ in range(2))
    for timestep in scheduler.timesteps:
        alpha = ALPHAS[timestep].float()
        epsilon = (latents - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        latents = step(scheduler, epsilon, timestep, latents, 0.0, no_noise)
    assert (latents - clean).abs().max() < 2e-5


@pytest.mark.parametrize("steps", [30, 60, 600])
def test_ddim_steps_end_where_the_next_begins_though_they_do_not_divide_the_trained_ones(steps):
    """Equation 12 of DDIM with η = 0: a constant ε leads from each timestep to the next one of the list."""
    scheduler = begin(made("ddim"), steps)
    timesteps = [*scheduler.timesteps.tolist(), None]
    latents, epsilon = torch.full((1, 1, 1, 1, 1), 0.7, dtype=torch.float64), torch.full((1, 1, 1, 1, 1), -0.3, dtype=torch.float64)
    for number, timestep in enumerate(scheduler.timesteps):
        alpha = float(ALPHAS[timestep])
        following = timesteps[number + 1]
        before = 1.0 if following is None else float(ALPHAS[following])
        clean = (latents.item() - math.sqrt(1 - alpha) * -0.3) / math.sqrt(alpha)
        latents = step(scheduler, epsilon, timestep, latents, 0.0, no_noise)
        assert latents.item() == pytest.approx(math.sqrt(before) * clean + math.sqrt(1 - before) * -0.3, rel=1e-4)


def test_noise_is_drawn_only_where_it_is_added():
    draws: list[int] = []

    def draw() -> Tensor:
        draws.append(1)
        return torch.ones(1, 1, 1, 1, 1)

    latents, epsilon = torch.zeros(1, 1, 1, 1, 1), torch.zeros(1, 1, 1, 1, 1)
    stochastic = DPMSolverMultistepScheduler.from_config(made("dpm++").config, algorithm_type="sde-dpmsolver++")
    for scheduler, eta, expected in ((made("ddim"), 0.0, 0), (made("ddim"), 0.5, 1), (made("dpm++"), 1.0, 0), (made("unipc"), 1.0, 0),
                                     (stochastic, 0.0, 1)):  # fmt: skip
        draws.clear()
        torch.manual_seed(0)
        state = torch.get_rng_state()
        mine = begin(scheduler, 4)
        after = step(mine, epsilon, mine.timesteps[0], latents, eta, draw)
        assert len(draws) == expected and bool(after.any()) == bool(expected)
        assert torch.equal(torch.get_rng_state(), state)
    mine = begin(made("ddim"), 4)  # σ of equation 16, η of it
    alpha, before = float(ALPHAS[999]), float(ALPHAS[749])
    sigma = 0.5 * math.sqrt((1 - before) / (1 - alpha) * (1 - alpha / before))
    assert step(mine, epsilon, mine.timesteps[0], latents, 0.5, draw).item() == pytest.approx(sigma, rel=1e-4)


def test_a_call_leaves_the_scheduler_as_it_was():
    scheduler = made("dpm++")
    before = {name: value for name, value in vars(scheduler).items() if not isinstance(value, torch.Tensor)}
    mine = begin(scheduler, 3)
    step(mine, torch.ones(1, 1, 1, 1, 1), mine.timesteps[0], torch.ones(1, 1, 1, 1, 1), 0.0, no_noise)
    assert {name: value for name, value in vars(scheduler).items() if not isinstance(value, torch.Tensor)} == before
    assert len(scheduler.timesteps) == 1000 and scheduler.model_outputs == [None, None]


@pytest.mark.parametrize("old", SAMPLERS)
@pytest.mark.parametrize("new", SAMPLERS)
def test_a_swapped_sampler_keeps_the_betas_and_is_the_one_made_anew(old, new):
    swapped = swap_sampler(made(old, "scaled_linear"), new)
    expected = dict(made(new, "scaled_linear").config)
    assert {key: value for key, value in swapped.config.items() if key != "_use_default_values"} == {
        key: value for key, value in expected.items() if key != "_use_default_values"
    }
    assert torch.equal(swapped.alphas_cumprod, made("ddim", "scaled_linear").alphas_cumprod)
    assert sampler_name(swapped) == new


def test_names():
    assert [sampler_name(made(name)) for name in SAMPLERS] == ["ddim", "dpm++", "unipc"]
    classes = (DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler)
    assert all(type(made(name)) is kind for name, kind in zip(SAMPLERS, classes, strict=True))

    class Mine(DPMSolverMultistepScheduler):
        pass

    assert sampler_name(Mine()) == "dpm++"
    with pytest.raises(UserError, match=r"EulerDiscreteScheduler cannot be used.*ddim, dpm\+\+, unipc"):
        sampler_name(EulerDiscreteScheduler())
    with pytest.raises(UserError, match="prediction_type 'v_prediction'"):
        sampler_name(DDIMScheduler(prediction_type="v_prediction"))
    for call in (lambda: made("euler"), lambda: swap_sampler(made("ddim"), "euler")):
        with pytest.raises(UserError, match=r"sampler is 'euler'; choose ddim, dpm\+\+, unipc"):
            call()


def test_noise_of_a_clip_is_its_seeds_whatever_its_neighbours_and_length():
    noise = ClipNoise([3, 4], (2, 8, 5, 5), 8)
    first, second = noise.draw(), noise.draw()
    alone = ClipNoise([4], (2, 8, 5, 5), 3)
    assert torch.equal(alone.draw()[0], first[1, :, :3]) and torch.equal(alone.draw()[0], second[1, :, :3])
    assert first.shape == (2, 2, 8, 5, 5) and not torch.equal(first[0], first[1]) and not torch.equal(first, second)
    assert first.std() == pytest.approx(1, abs=0.1)
