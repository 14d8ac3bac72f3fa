"""Samplers by name: diffusers' schedulers with the trained β, one way to make a step with each, and the noise they start from and add.

Legend: B clips, C latent channels, F frames, h w latent size, T trained timesteps, ε the predicted noise, η DDIM's share of fresh noise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

from rdtf_ds.errors import UserError
from rdtf_ds.seeding import torch_generator

SAMPLERS = ("ddim", "dpm++", "unipc")

_CLASSES: dict[str, Any] = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}
# The last step lands on the clean clip (α = 1), so that the picture keeps no noise.
_CLEAN_END: dict[str, dict[str, Any]] = {
    "ddim": {"set_alpha_to_one": True, "clip_sample": False},
    "dpm++": {"algorithm_type": "dpmsolver++", "solver_order": 2, "final_sigmas_type": "zero"},
    "unipc": {"solver_order": 2, "final_sigmas_type": "zero"},
}


def make_sampler(name: str, schedule: str, steps: int, beta_start: float, beta_end: float) -> Any:
    """The sampler of a model trained on ε under these β (Table 6): DDIM, DPM-Solver++ (2M) or UniPC, as a diffusers scheduler.

    Steps are ``trailing``: they start at the last trained timestep, whose latents are as good as the pure noise sampling starts from.

    Args:
        name: one of :data:`SAMPLERS`.
        schedule: ``linear`` or ``scaled_linear``.
        steps: T.

    Raises:
        UserError: another name.
    """
    shared = {"num_train_timesteps": steps, "beta_start": beta_start, "beta_end": beta_end, "beta_schedule": schedule}
    return _class_of(name)(**shared, prediction_type="epsilon", timestep_spacing="trailing", **_CLEAN_END[name])


def swap_sampler(scheduler: Any, name: str) -> Any:
    """Another sampler for the same model: the β of ``scheduler``, everything else as :func:`make_sampler` has it.

    Raises:
        UserError: another name.
    """
    betas = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    kept = {key: scheduler.config[key] for key in betas if key in scheduler.config}
    return _class_of(name)(**kept, prediction_type="epsilon", timestep_spacing="trailing", **_CLEAN_END[name])


def sampler_name(scheduler: Any) -> str:
    """Which of :data:`SAMPLERS` a scheduler is; a subclass counts as its parent.

    Raises:
        UserError: a scheduler of another kind, or one for models that predict something else than ε.
    """
    kind = type(scheduler).__name__
    name = next((name for name, known in _CLASSES.items() if isinstance(scheduler, known)), None)
    if name is None:
        known = ", ".join(known.__name__ for known in _CLASSES.values())
        raise UserError(f"the scheduler {kind} cannot be used here; use {known}, or sampler= with one of {', '.join(SAMPLERS)}.")
    predicted = scheduler.config.prediction_type
    if predicted != "epsilon":
        raise UserError(
            f"the scheduler {kind} has prediction_type {predicted!r}, but the model predicts noise. "
            f"Make it with {kind}.from_config(pipeline.scheduler.config, prediction_type='epsilon')."
        )
    return name


def begin(scheduler: Any, steps: int) -> Any:
    """A copy of ``scheduler`` set to so many steps, its timesteps on the CPU; the state of one call stays in the copy.

    On the CPU because the samplers look their α up there: on a GPU every step would wait for its own number.
    """
    mine = copy.deepcopy(scheduler)
    mine.set_timesteps(steps)
    if mine.timesteps[-1] < 0:  # at 61, 103 and 60 other numbers of steps diffusers' rounding adds one at timestep -1
        mine.timesteps = mine.timesteps[:-1]
        if hasattr(mine, "sigmas"):
            mine.sigmas = torch.cat([mine.sigmas[:-2], mine.sigmas[-1:]])
    return mine


def step(
    scheduler: Any, epsilon: Tensor, timestep: Tensor, latents: Tensor, eta: float, draw_noise: Callable[[], Tensor]
) -> Tensor:
    """Latents (B, C, F, h, w) after one step.

    Args:
        scheduler: made by :func:`begin`; multistep samplers remember earlier steps in it.
        epsilon: predicted at ``timestep``, of the latents' shape.
        eta: η of DDIM, 0 to 1; the other samplers have none.
        draw_noise: fresh noise of the latents' shape; called only where the sampler adds noise.
    """
    noise = {}
    if isinstance(scheduler, DDIMScheduler):
        # diffusers takes T // steps as the length of every step, though steps that do not divide T differ by one: some would start where
        # none ended, and the last might not reach the clean clip. This is the distance to the timestep that really comes next.
        later = scheduler.timesteps[scheduler.timesteps < timestep]
        following = int(later.max()) if len(later) else -1
        scheduler.num_inference_steps = Fraction(scheduler.config.num_train_timesteps, int(timestep) - following)
        noise = {"eta": eta, "variance_noise": draw_noise() if eta > 0 else None}
    elif str(scheduler.config.get("algorithm_type", "")).startswith("sde-"):
        noise = {"variance_noise": draw_noise()}
    stepped: Tensor = scheduler.step(epsilon, timestep, latents, **noise, return_dict=False)[0]
    return stepped


class StepOptions(NamedTuple):
    """How steps are made, beside what they compute; see `RDTFPipeline`'s call for each."""

    max_batch: int | None
    callback: Callable[..., dict[str, Tensor]] | None
    callback_inputs: Sequence[str]

    def call_back(self, pipeline: Any, number: int, timestep: Tensor, latents: Tensor) -> Tensor:
        """The latents, or what the callback puts in their place."""
        if self.callback is None:
            return latents
        offered = {name: {"latents": latents}[name] for name in self.callback_inputs}
        return self.callback(pipeline, number, timestep, offered).pop("latents", latents)


class ClipNoise:
    """Noise of every clip from its own seed, drawn for the most frames a clip can have and cut: neither neighbours nor length change it.

    Args:
        seeds: one for each of B clips.
        shape: (C, most frames, h, w).
        num_frames: F.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...], num_frames: int) -> None:
        self._generators = [torch_generator(seed, "sampling noise") for seed in seeds]
        self._shape, self._num_frames = shape, num_frames

    def draw(self) -> Tensor:
        """The next noise, float32 (B, C, F, h, w) on the CPU."""
        return torch.stack([torch.randn(self._shape, generator=generator)[:, : self._num_frames] for generator in self._generators])


def _class_of(name: str) -> Any:
    if name not in _CLASSES:
        raise UserError(f"sampler is {name!r}; choose {', '.join(SAMPLERS)}.")
    return _CLASSES[name]
