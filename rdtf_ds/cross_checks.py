"""Checks of one key against another, over both DeepSpeed's keys and the ``"rdtf"`` object.

Every check is a generator of ``Problem``; none stops at the first one, so that a user mends a file once. Warnings are problems that a run
survives.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from rdtf_ds.config import MemorySection, ModelSection, RDTFSection, TaskName
from rdtf_ds.deepspeed_keys import DeepSpeedSection

RISES: dict[TaskName, bool] = {"IPT": False, "PDT": True, "GRT": True}
"""Eq. 2: which tasks may only become more probable; the others may only become less so."""
LATENT_FACTOR = 8
"""Side of a frame over side of its latents for Stable Diffusion's autoencoders and the tiny one (Table 6: f = 8)."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with an experiment.

    Args:
        path: dotted key, as in the file and as ``--set`` takes it.
        value: what was given, or None when the key itself is the problem.
        message: what is allowed, or the remedy.
        involved: every key the check read; a check is silent when one of them is already reported.
    """

    path: str
    value: object
    message: str
    involved: tuple[str, ...] = ()

    def __str__(self) -> str:
        given = "" if self.value is None else f" = {json.dumps(self.value, default=str)}"
        return f"{self.path}{given}: {self.message}"


def autoencoder_factor(source: str) -> int | None:
    """Frame side over latent side of an autoencoder source; None for a folder or hub id, whose own config says it."""
    if source.startswith("haar:"):
        return int(source.removeprefix("haar:"))
    return LATENT_FACTOR if source in ("tiny", "stabilityai/sd-vae-ft-mse") else None


def cross_problems(deepspeed: DeepSpeedSection, rdtf: RDTFSection, *, require_data: bool) -> list[Problem]:
    """Everything that keeps this experiment from running on any machine. Empty when there is nothing to mend."""
    return [
        *_precision(deepspeed),
        *_batch(deepspeed),
        *_offload(deepspeed, rdtf),
        *_widths(rdtf.model),
        *_sizes(rdtf),
        *_data(rdtf, require_data),
        *_memory(rdtf.memory),
        *_curriculum(rdtf),
        *_ranges(rdtf),
        *_validation(rdtf),
    ]


def cross_warnings(deepspeed: DeepSpeedSection, rdtf: RDTFSection) -> list[Problem]:
    """What a run survives but its owner should know."""
    found = []
    if deepspeed.fp16.enabled:
        for key in ("sti_head_dim", "head_channels"):
            width = getattr(rdtf.model, key)
            if width % 8:
                found.append(Problem(f"rdtf.model.{key}", width, "in fp16 the fast attention kernels need a multiple of 8"))
    if rdtf.max_steps <= rdtf.optimizer.warmup_steps:
        found.append(
            Problem("rdtf.optimizer.warmup_steps", rdtf.optimizer.warmup_steps, f"the warm-up never ends: max_steps is {rdtf.max_steps}")
        )
    look_ahead = (rdtf.curriculum.delay + 1) * deepspeed.train_batch_size // deepspeed.train_micro_batch_size_per_gpu
    if rdtf.data.workers > look_ahead:
        found.append(
            Problem(
                "rdtf.data.workers", rdtf.data.workers, f"only {look_ahead} micro-batches are ever in flight; raise rdtf.curriculum.delay"
            )
        )
    if rdtf.memory.cache_dir and rdtf.memory.encoders != "cached":
        found.append(Problem("rdtf.memory.cache_dir", rdtf.memory.cache_dir, "it is read only with rdtf.memory.encoders = cached"))
    if rdtf.validation.fvd_weights is not None and not rdtf.validation.fvd_interval:
        path = "rdtf.validation.fvd_weights"
        found.append(Problem(path, rdtf.validation.fvd_weights, "FVD is measured only with rdtf.validation.fvd_interval above 0"))
    if rdtf.curriculum.delay >= rdtf.curriculum.fast_horizon:
        found.append(
            Problem("rdtf.curriculum.delay", rdtf.curriculum.delay, "the controller acts on news older than rdtf.curriculum.fast_horizon")
        )
    return found


def _precision(deepspeed: DeepSpeedSection) -> Iterator[Problem]:
    if deepspeed.fp16.enabled and deepspeed.bf16.enabled:
        keys = ("fp16.enabled", "bf16.enabled")
        yield Problem("fp16.enabled", True, "bf16.enabled is true as well; enable one of them, or neither for fp32", keys)


def _batch(deepspeed: DeepSpeedSection) -> Iterator[Problem]:
    total, micro = deepspeed.train_batch_size, deepspeed.train_micro_batch_size_per_gpu
    if total % micro:
        allowed = ", ".join(str(size) for size in divisors(total))
        keys = ("train_batch_size", "train_micro_batch_size_per_gpu")
        yield Problem("train_micro_batch_size_per_gpu", micro, f"must divide train_batch_size = {total}; allowed: {allowed}", keys)


def _offload(deepspeed: DeepSpeedSection, rdtf: RDTFSection) -> Iterator[Problem]:
    """What the optimizer on the CPU takes for granted."""
    key = "zero_optimization.offload_optimizer"
    if deepspeed.zero_optimization.offload_optimizer is None:
        return
    if rdtf.optimizer.bits != 32:
        message = f"must be 32 with {key}: the optimizer on the CPU is torch's AdamW, which has no 8-bit moments"
        yield Problem("rdtf.optimizer.bits", rdtf.optimizer.bits, message, ("rdtf.optimizer.bits", key))
    if rdtf.ema.enabled and rdtf.ema.device == "gpu":
        message = f"must be cpu with {key}, where the masters are that it averages; or set rdtf.ema.enabled to false"
        yield Problem("rdtf.ema.device", rdtf.ema.device, message, ("rdtf.ema.device", "rdtf.ema.enabled", key))
    if deepspeed.data_types.grad_accum_dtype is not None:
        path = "data_types.grad_accum_dtype"
        message = f"keeps all gradients in fp32 on the GPU, where {key} wants none of them; remove one of the two"
        yield Problem(path, deepspeed.data_types.grad_accum_dtype, message, (path, key))


def _widths(model: ModelSection) -> Iterator[Problem]:
    widths, levels = model.block_out_channels, len(model.block_out_channels)
    for key in ("attention_levels", "sti_gamma"):
        given = getattr(model, key)
        if given is not None and len(given) != levels:
            message = f"has {len(given)} entries; block_out_channels has {levels} levels, and each needs one"
            yield Problem(f"rdtf.model.{key}", list(given), message, (f"rdtf.model.{key}", "rdtf.model.block_out_channels"))
    for level, width in enumerate(widths):
        # The middle block has a transformer of the last width, whatever attention_levels says.
        attends = level == levels - 1 or (level < len(model.attention_levels) and model.attention_levels[level])
        for key, divisor in (("norm_groups", model.norm_groups), ("head_channels", model.head_channels)):
            if width % divisor and (key == "norm_groups" or attends):
                keys = (f"rdtf.model.{key}", "rdtf.model.block_out_channels", "rdtf.model.attention_levels")
                yield Problem(f"rdtf.model.block_out_channels[{level}]", width, f"must be a multiple of {key} = {divisor}", keys)
    if model.sti_kernel_size % 2 == 0:
        yield Problem("rdtf.model.sti_kernel_size", model.sti_kernel_size, "must be odd, so that a frame sees as far back as ahead")


def _sizes(rdtf: RDTFSection) -> Iterator[Problem]:
    source, side = rdtf.encoders.autoencoder, rdtf.data.image_size
    if source.startswith("haar:") and source not in ("haar:2", "haar:4"):
        yield Problem("rdtf.encoders.autoencoder", source, "allowed: haar:2, haar:4, tiny, a folder or a hub id")
        return
    factor = autoencoder_factor(source)
    if factor is None:
        return
    gamma, levels = rdtf.model.sti_gamma, len(rdtf.model.block_out_channels)
    needed = factor * 2 ** (levels - 1)
    keys = ("rdtf.data.image_size", "rdtf.encoders.autoencoder", "rdtf.model.block_out_channels", "rdtf.model.sti_gamma")
    if side % needed:
        message = f"must be a multiple of {needed}: the autoencoder divides by {factor}, the {levels} levels by {needed // factor}"
        yield Problem("rdtf.data.image_size", side, message, keys)
    elif gamma is not None and len(gamma) == levels:
        for level, divisor in enumerate(gamma):
            level_side = side // factor // 2**level
            if level_side % divisor:
                allowed = ", ".join(str(size) for size in divisors(level_side))
                yield Problem(
                    f"rdtf.model.sti_gamma[{level}]", divisor, f"must divide that level's side, {level_side}; allowed: {allowed}", keys
                )


def _data(rdtf: RDTFSection, require_data: bool) -> Iterator[Problem]:
    data = rdtf.data
    if require_data and data.data_dir is None and data.synthetic_clips == 0:
        keys = ("rdtf.data.data_dir", "rdtf.data.synthetic_clips")
        yield Problem("rdtf.data.data_dir", None, "no data: give --data_dir FOLDER, or set rdtf.data.synthetic_clips above 0", keys)
    if data.k_min > data.frames:
        keys = ("rdtf.data.k_min", "rdtf.data.frames")
        yield Problem("rdtf.data.k_min", data.k_min, f"must not exceed rdtf.data.frames = {data.frames}; allowed: 3 to {data.frames}", keys)
    dropped = ("no_text_probability", "no_image_probability", "neither_probability")
    if (total := sum(getattr(data, key) for key in dropped)) > 1:
        paths = tuple(f"rdtf.data.{key}" for key in dropped)
        yield Problem(paths[0], data.no_text_probability, f"{', '.join(dropped)} together make {total:g}; allowed: at most 1", paths)
    if data.max_frames < data.frames:
        keys = ("rdtf.data.max_frames", "rdtf.data.frames")
        yield Problem("rdtf.data.max_frames", data.max_frames, f"must be at least rdtf.data.frames = {data.frames}", keys)
    if data.max_source_frames < data.max_frames:
        keys = ("rdtf.data.max_source_frames", "rdtf.data.max_frames")
        yield Problem("rdtf.data.max_source_frames", data.max_source_frames, f"must be at least max_frames = {data.max_frames}", keys)
    if data.group_pattern is not None:
        try:
            re.compile(data.group_pattern)
        except re.error as error:
            remedy = "Write ^[^/]+ for the first folder of a path, or \\( for a bracket itself"
            yield Problem("rdtf.data.group_pattern", data.group_pattern, f"is no regular expression: {error}. {remedy}")


def _memory(memory: MemorySection) -> Iterator[Problem]:
    if memory.encoders == "cached" and not memory.cache_dir:
        keys = ("rdtf.memory.cache_dir", "rdtf.memory.encoders")
        message = "rdtf.memory.encoders = cached reads features from a folder: name it, and fill it with tools/cache_dataset.py"
        yield Problem(keys[0], memory.cache_dir, message, keys)


def _curriculum(rdtf: RDTFSection) -> Iterator[Problem]:
    """Eq. 2: both ends are distributions; interpolation may not rise, prediction and generation may not fall."""
    start, end = rdtf.curriculum.static_start, rdtf.curriculum.static_end
    paths = ("rdtf.curriculum.static_start", "rdtf.curriculum.static_end")
    whole = True
    for path, share in zip(paths, (start, end), strict=True):
        if set(share) != set(RISES):
            whole = False
            yield Problem(path, dict(share), "must name all of IPT, PDT and GRT", (path,))
        elif abs(sum(share.values()) - 1) > 1e-6:
            whole = False
            yield Problem(path, dict(share), f"the probabilities make {sum(share.values()):g}; they must sum to 1", (path,))
    if whole:
        for task, rises in RISES.items():
            if (end[task] < start[task]) if rises else (end[task] > start[task]):
                message = f"is {start[task]:g} at the start; by Eq. 2 {task} may never {'fall' if rises else 'rise'}"
                yield Problem(f"{paths[1]}.{task}", end[task], message, paths)
    if rdtf.curriculum.fast_horizon >= rdtf.curriculum.slow_horizon:
        fast, slow = rdtf.curriculum.fast_horizon, rdtf.curriculum.slow_horizon
        keys = ("rdtf.curriculum.fast_horizon", "rdtf.curriculum.slow_horizon")
        yield Problem(keys[0], fast, f"must be below slow_horizon = {slow}, or the error compares nothing", keys)


def _ranges(rdtf: RDTFSection) -> Iterator[Problem]:
    noise = rdtf.diffusion
    if noise.beta_end <= noise.beta_start:
        keys = ("rdtf.diffusion.beta_end", "rdtf.diffusion.beta_start")
        yield Problem(keys[0], noise.beta_end, f"must be above beta_start = {noise.beta_start:g}", keys)
    for section, steps in (("sampling", rdtf.sampling.steps), ("validation", rdtf.validation.steps)):
        if steps > noise.steps:
            keys = (f"rdtf.{section}.steps", "rdtf.diffusion.steps")
            yield Problem(keys[0], steps, f"must not exceed rdtf.diffusion.steps = {noise.steps}", keys)
    if rdtf.curriculum.timestep_buckets > noise.steps:
        keys = ("rdtf.curriculum.timestep_buckets", "rdtf.diffusion.steps")
        yield Problem(keys[0], rdtf.curriculum.timestep_buckets, f"must not exceed rdtf.diffusion.steps = {noise.steps}", keys)


def _validation(rdtf: RDTFSection) -> Iterator[Problem]:
    keys, steps = rdtf.validation, rdtf.diffusion.steps
    path, interval = "rdtf.validation.timesteps", "rdtf.validation.interval"
    if keys.interval and keys.held_out_clips:
        if late := [timestep for timestep in keys.timesteps if timestep >= steps]:
            message = f"{late[0]} is none of the rdtf.diffusion.steps = {steps}, which are numbered 0 to {steps - 1}"
            yield Problem(path, list(keys.timesteps), message, (path, "rdtf.diffusion.steps"))
        elif len(set(keys.timesteps)) < len(keys.timesteps):
            yield Problem(path, list(keys.timesteps), "names a timestep twice")
        elif not keys.timesteps:
            yield Problem(path, [], "no timestep to measure the loss at; name some, or set rdtf.validation.held_out_clips to 0")
    path = "rdtf.validation.fvd_interval"
    if keys.fvd_interval and not keys.interval:
        yield Problem(path, keys.fvd_interval, f"FVD is part of a validation, and {interval} is 0; set that too", (path, interval))
    elif keys.fvd_interval and keys.fvd_interval % keys.interval:
        message = f"FVD is part of a validation, so this must be a multiple of {interval} = {keys.interval}"
        yield Problem(path, keys.fvd_interval, message, (path, interval))


def divisors(number: int) -> list[int]:
    """Every positive divisor, rising."""
    return [size for size in range(1, number + 1) if number % size == 0]
