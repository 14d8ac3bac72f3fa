"""The resolved plan of a run, in text: what would be trained, on what, in which steps. Nothing is written or allocated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch

from rdtf_ds.data.index import build_index
from rdtf_ds.data.step_plan import PlanQueue, StepPlan
from rdtf_ds.diffusion.masks import MAX_FRAMES
from rdtf_ds.experiment import Experiment
from rdtf_ds.models.missing import EncoderNotFound
from rdtf_ds.training.assembly import build_curriculum, build_model, build_planner, decode_limits, load_encoders, split_model
from rdtf_ds.training.optimizer import warmed_up

TABLE_6_WIDTHS = (4, 1024, 1024)
"""Latent channels, CLIP and T5 widths of the default encoders, when they are not at hand."""


def describe(experiment: Experiment, world_size: int, device: torch.device) -> str:
    """The plan as lines of text.

    Raises:
        UserError: What would stop the run before its first step, missing encoders apart: those are only noted.
    """
    return "\n".join(_lines(experiment, world_size, device))


def _lines(experiment: Experiment, world_size: int, device: torch.device) -> Iterator[str]:
    rdtf = experiment.rdtf
    accumulation = experiment.accumulation(world_size)
    yield f"device          {device.type}, {world_size} rank(s), {experiment.precision}, ZeRO-2"
    yield f"batch           {experiment.global_batch} = {world_size} rank(s) x {experiment.micro_batch} at once x {accumulation} in turn"
    yield from _model_lines(experiment)
    settings = rdtf.optimizer
    rates = ", ".join(
        f"{warmed_up(settings.learning_rate, settings.warmup_steps, step):.3g} at {step}" for step in sorted({0, settings.warmup_steps})
    )
    yield f"learning rate   {rates}, then constant; EMA {rdtf.ema.decay if rdtf.ema.enabled else 'off'}; {rdtf.max_steps} steps"
    curriculum = build_curriculum(rdtf)
    for step in (0, rdtf.max_steps // 2, rdtf.max_steps):
        probability = curriculum.schedule.probability(step)
        yield f"schedule        step {step}: " + ", ".join(f"{task.value} {p:.3f}" for task, p in probability.items())
    clip_ids, frame_counts, told = _clips(experiment)
    yield f"data            {told}"
    steps_per_epoch = len(clip_ids) / experiment.global_batch
    yield f"epochs          {rdtf.max_steps / steps_per_epoch:.1f} of {steps_per_epoch:.1f} steps"
    queue = PlanQueue(build_planner(experiment, curriculum, clip_ids, frame_counts), rdtf.curriculum.delay)
    for step in range(min(3, queue.delay + 1)):
        yield _plan_line(queue.plan(step))
    yield f"output          {rdtf.output_dir}, a checkpoint every {rdtf.checkpoint.interval} steps, the last {rdtf.checkpoint.keep} kept"
    yield from (f"warning         {warning}" for warning in experiment.warnings)


def _model_lines(experiment: Experiment) -> Iterator[str]:
    try:
        autoencoder, text = load_encoders(experiment.rdtf, torch.float32, torch.device("cpu"))
        widths = (autoencoder.channels, text.clip_dim, text.t5_dim)
    except EncoderNotFound as error:
        widths = TABLE_6_WIDTHS
        yield f"encoders        NOT READY, assuming latent channels and text widths {widths}: {error}"
    with torch.device("meta"):
        model = build_model(experiment.rdtf, *widths)
    groups = split_model(model, experiment.rdtf)
    count, padding = sum(group.numel for group in groups), sum(group.padding for group in groups)
    bits = Counter[int]()
    for group in groups:
        bits[group.bits] += group.numel
    moments = ", ".join(f"{number:,} with {width}-bit moments" for width, number in sorted(bits.items()))
    yield f"parameters      {count:,} ({moments}) in {len(groups)} groups, {padding:,} elements of padding"


def _clips(experiment: Experiment) -> tuple[np.ndarray, np.ndarray, str]:
    data = experiment.rdtf.data
    if data.data_dir is None:
        count = data.synthetic_clips
        told = f"{count} stickers, made at the start; the plans below assume {MAX_FRAMES} frames each"
        return np.arange(count), np.full(count, MAX_FRAMES), told
    index = build_index(data.data_dir, decode_limits(experiment.rdtf))
    return index.trainable, index.frame_counts, index.summary()


def _plan_line(plan: StepPlan) -> str:
    samples = ", ".join(
        f"{sample.clip_id}:{sample.task.value}:{''.join('#' if visible else '.' for visible in sample.mask)}" for sample in plan.samples[:8]
    )
    more = f", ... ({len(plan.samples)} in all)" if len(plan.samples) > 8 else ""
    return f"plan            step {plan.step}: k = {plan.k}; clip:task:visible frames {samples}{more}"
