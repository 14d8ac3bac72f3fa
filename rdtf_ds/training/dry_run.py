"""The resolved plan of a run, in text: what would be trained, on what, in which steps. Nothing is written, no weights are loaded but those
of I3D where FVD is asked for.

Of clips that no index knows yet at most `EXAMINED_AT_MOST` are examined for it, and none if that takes a model; then clips are counted.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, T5Config

from rdtf_ds.config import RDTFSection
from rdtf_ds.data.cache_header import HEADER, CacheError
from rdtf_ds.data.feature_cache import FeatureCache
from rdtf_ds.data.indexing.index import ClipIndex
from rdtf_ds.data.indexing.index_rows import take_over, to_examine
from rdtf_ds.data.indexing.index_segments import IndexSettings, read_segments
from rdtf_ds.data.indexing.split_check import split_doubts
from rdtf_ds.data.quarantine import TooManyBadFiles
from rdtf_ds.data.sources.sources import list_clips
from rdtf_ds.data.step_plan import PlanQueue, StepPlan
from rdtf_ds.diffusion.masks import MAX_FRAMES
from rdtf_ds.errors import UserError
from rdtf_ds.evaluation.fvd import VideoFeatures
from rdtf_ds.experiment import Experiment
from rdtf_ds.models.autoencoder import AUTOENCODER, load_autoencoder
from rdtf_ds.models.frame_encoder import IMAGE_ENCODER, CLIPFrames
from rdtf_ds.models.local_weights import KnownHashes, is_here
from rdtf_ds.models.missing import EncoderNotFound, load_part
from rdtf_ds.models.text_conditioning import CLIP, T5
from rdtf_ds.models.tiny_encoders import tiny_width
from rdtf_ds.training.assembly import build_curriculum, build_model, build_planner, split_model
from rdtf_ds.training.caching import fitting_cache
from rdtf_ds.training.data_assembly import THUMBNAIL, build_quarantine, decode_limits, index_clips, index_folder
from rdtf_ds.training.memory_check import foretell
from rdtf_ds.training.optimizer import warmed_up
from rdtf_ds.training.validation_fvd import fvd_weights

TABLE_6_WIDTHS = (4, 1024, 1024)
"""Latent channels, CLIP and T5 widths of the default encoders, when they are not at hand."""
NOT_READY = "NOT READY: "
EXAMINED_AT_MOST = 2000
"""More would take longer than one waits for a plan: about 20 a second and core."""


def describe(experiment: Experiment, world_size: int, device: torch.device) -> str:
    """The plan as lines of text, empty on ranks other than 0.

    Lines "NOT READY: ..." tell what would stop the run before its first step: a device that cannot train in this precision, encoders
    that are not there, less memory than predicted, too many broken clips, an output folder that cannot be written. Of encoders only the
    configs are read; whether weights load, the ranks meet and a checkpoint in the output folder can be resumed shows at the start.

    Raises:
        UserError: Without this there is nothing to plan: a batch that cannot be split, no clips, an impossible source or model.
    """
    return "\n".join(_lines(experiment, world_size, device)) if int(os.environ.get("RANK", "0")) == 0 else ""


def _lines(experiment: Experiment, world_size: int, device: torch.device) -> Iterator[str]:
    rdtf = experiment.rdtf
    accumulation = experiment.accumulation(world_size)
    yield f"device          {device.type}, {world_size} rank(s), {experiment.precision}, ZeRO-2"
    faults = list(_device_faults(experiment, world_size, device))
    yield from faults
    yield f"batch           {experiment.global_batch} = {world_size} rank(s) x {experiment.micro_batch} at once x {accumulation} in turn"
    yield from _model_lines(experiment)
    yield from _cache_faults(experiment)
    yield from _memory_lines(experiment, world_size, device, suits=not faults)
    settings = rdtf.optimizer
    rates = ", ".join(
        f"{warmed_up(settings.learning_rate, settings.warmup_steps, step):.3g} at {step}" for step in sorted({0, settings.warmup_steps})
    )
    yield f"learning rate   {rates}, then constant; EMA {rdtf.ema.decay if rdtf.ema.enabled else 'off'}; {rdtf.max_steps} steps"
    curriculum = build_curriculum(rdtf)
    for step in (0, rdtf.max_steps // 2, rdtf.max_steps):
        probability = curriculum.schedule.probability(step)
        yield f"schedule        step {step}: " + ", ".join(f"{task.value} {p:.3f}" for task, p in probability.items())
    clip_ids, frame_counts, told, broken = _clips(experiment, device)
    yield f"data            {told}"
    yield from broken
    steps_per_epoch = len(clip_ids) / experiment.global_batch
    yield f"epochs          {rdtf.max_steps / steps_per_epoch:.1f} of {steps_per_epoch:.1f} steps"
    queue = PlanQueue(build_planner(experiment, curriculum, clip_ids, frame_counts), rdtf.curriculum.delay)
    for step in range(min(3, queue.delay + 1)):
        yield _plan_line(queue.plan(step))
    yield from _validation_lines(rdtf)
    yield f"output          {rdtf.output_dir}, a checkpoint every {rdtf.checkpoint.interval} steps, the last {rdtf.checkpoint.keep} kept"
    yield from _folder_faults(Path(rdtf.output_dir))
    yield from (f"warning         {warning}" for warning in experiment.warnings)


def _validation_lines(rdtf: RDTFSection) -> Iterator[str]:
    keys = rdtf.validation
    if not keys.interval:
        yield "validation      none"
        return
    parts = [f"{keys.clips} clips of {keys.steps} steps"]
    if keys.held_out_clips:
        whose = "held out" if rdtf.data.validation_fraction else "trained on, since rdtf.data.validation_fraction is 0"
        parts.insert(0, f"loss of {keys.held_out_clips} clips ({whose}) at {len(keys.timesteps)} timesteps")
    if keys.fvd_interval:
        parts.append(f"every {keys.fvd_interval} steps FVD of {keys.fvd_clips} clips")
    bound = "without a bound" if keys.max_share == 1 else f"at most {keys.max_share:.1%}"
    yield f"validation      every {keys.interval} steps: {', '.join(parts)}; {bound} of the time"
    if keys.fvd_interval:
        try:  # another network's file shows when it is called
            VideoFeatures(fvd_weights(rdtf))([np.zeros((rdtf.data.frames, rdtf.data.image_size, rdtf.data.image_size, 3), np.uint8)])
        except UserError as error:
            yield f"{NOT_READY}{error}"


def _model_lines(experiment: Experiment) -> Iterator[str]:
    try:
        widths = _widths(experiment.rdtf)
    except (EncoderNotFound, CacheError) as error:
        widths = TABLE_6_WIDTHS
        yield f"{NOT_READY}{error} The lines below assume latent channels and text widths {widths}."
    with torch.device("meta"):
        model = build_model(experiment.rdtf, *widths)
    groups = split_model(model, experiment.rdtf)
    count, padding = sum(group.numel for group in groups), sum(group.padding for group in groups)
    bits = Counter[int]()
    for group in groups:
        bits[group.bits] += group.numel
    moments = ", ".join(f"{number:,} with {width}-bit moments" for width, number in sorted(bits.items()))
    yield f"parameters      {count:,} ({moments}) in {len(groups)} groups, {padding:,} elements of padding"


def _memory_lines(experiment: Experiment, world_size: int, device: torch.device, suits: bool) -> Iterator[str]:
    if not suits:
        yield "memory          not planned for a device that cannot train this; tools/plan_memory.py plans for cards that are not here"
        return
    lines, refused = foretell(experiment, world_size, device)
    yield from (f"memory          {line}" for line in lines if line)
    if refused is not None:
        yield f"{NOT_READY}{refused}"


def _widths(rdtf: RDTFSection) -> tuple[int, int, int]:
    """Latent channels, CLIP and T5 widths, as the encoders' configs tell them, or the cache that takes their place."""
    if rdtf.memory.encoders == "cached":
        header = FeatureCache(rdtf.memory.cache_dir or "").header
        return header.latent_channels, header.clip_dim, header.t5_dim
    sources = rdtf.encoders
    if sources.autoencoder == "tiny" or sources.autoencoder.startswith("haar:"):
        channels = load_autoencoder(sources.autoencoder).channels
    else:
        channels = load_part(_latent_channels, sources.autoencoder, AUTOENCODER)
    clip = tiny_width(sources.clip) or load_part(CLIPTextConfig.from_pretrained, sources.clip, CLIP).hidden_size
    t5 = tiny_width(sources.t5) or load_part(T5Config.from_pretrained, sources.t5, T5).d_model
    return channels, clip, t5


def _latent_channels(source: str, subfolder: str | None = None) -> int:
    config = AutoencoderKL.load_config(source, subfolder=subfolder)
    return int(config["latent_channels"] if config["_class_name"] == "AutoencoderKL" else 3 * config["factor"] ** 2)


def _cache_faults(experiment: Experiment) -> Iterator[str]:
    """What keeps the run from its cache, but for clips that may lack; no line where there is no cache, which is told already."""
    memory = experiment.rdtf.memory
    if memory.encoders == "cached" and (Path(memory.cache_dir or "") / HEADER).is_file():
        try:
            fitting_cache(experiment, write=False)
        except UserError as error:
            yield f"{NOT_READY}{error}"


def _device_faults(experiment: Experiment, world_size: int, device: torch.device) -> Iterator[str]:
    cuda = device.type == "cuda"
    try:
        experiment.check_device(cuda, world_size, torch.cuda.get_device_capability(device) if cuda else None)
    except UserError as error:
        yield f"{NOT_READY}{error}"


def _data_faults(rdtf: RDTFSection, index: ClipIndex) -> list[str]:
    try:
        build_quarantine(rdtf, Path(rdtf.output_dir), index, write=False)
    except TooManyBadFiles as error:
        return [f"{NOT_READY}{error}"]
    return [f"warning         {doubt}" for doubt in split_doubts(index)]


def _folder_faults(folder: Path) -> Iterator[str]:
    """What the run would meet when it makes or writes its folder, told from the nearest folder that exists."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        fault = "may not be written" if there.is_dir() else "is a file"
        yield f"{NOT_READY}The output folder '{folder}' cannot be written: '{there}' {fault}. Give another with --output_dir."


def _clips(experiment: Experiment, device: torch.device) -> tuple[np.ndarray, np.ndarray, str, list[str]]:
    """Clip ids, their frame counts, a line about them, and what would stop the run."""
    rdtf = experiment.rdtf
    if rdtf.data.data_dir is None:
        count = rdtf.data.synthetic_clips
        told = f"{count} stickers, made at the start; the plans below assume {MAX_FRAMES} frames each"
        return np.arange(count), np.full(count, MAX_FRAMES), told, []
    kept = index_folder(rdtf, Path(rdtf.output_dir))
    listed, unknown = _not_indexed(rdtf, kept)
    if unknown > (EXAMINED_AT_MOST if rdtf.data.frame_features == THUMBNAIL else 0):
        told = (
            f"{unknown} of {listed} clips are not indexed yet: the run's start does it, or ahead of it python tools/index_data.py "
            f"{rdtf.data.data_dir} --out {kept}; the plans below assume that all can be trained on, with {MAX_FRAMES} frames each"
        )
        return np.arange(listed), np.full(listed, MAX_FRAMES), told, []
    with TemporaryDirectory(prefix="rdtf-dry-run-") as copy:
        _link_examined(kept, Path(copy))
        index = index_clips(rdtf, rdtf.data.data_dir, Path(copy), device)
        return index.trainable, index.frame_counts, index.summary(), _data_faults(rdtf, index)


def _not_indexed(rdtf: RDTFSection, kept: Path) -> tuple[int, int]:
    """How many clips there are, and how many of them would be examined."""
    listing = list_clips(Path(rdtf.data.data_dir or ""))
    model = rdtf.data.frame_features
    features: dict[str, Any] = {}
    if model != THUMBNAIL:
        if not is_here(model, IMAGE_ENCODER) and not Path(model).is_dir():  # on the hub: fetching it is not for a plan
            return listing.table.num_rows, listing.table.num_rows
        clip = CLIPFrames(model, torch.device("cpu"), KnownHashes(kept, write=False))
        features = {"features": clip.identity, "dim": clip.dim, "dtype": "float16"}
    settings = IndexSettings(
        listing.root.resolve(), decode_limits(rdtf), rdtf.data.background, video_clip_s=rdtf.data.video_clip_s, **features
    )
    clips, _ = take_over(listing.table, read_segments(kept, settings))
    return listing.table.num_rows, len(to_examine(listing.table, clips))


def _link_examined(folder: Path, copy: Path) -> None:
    """What is examined already need not be again; what is examined now goes into the copy alone."""
    for source in folder.glob("rows-*/*"):
        (copy / source.parent.name).mkdir(exist_ok=True)
        (copy / source.parent.name / source.name).symlink_to(source.resolve())


def _plan_line(plan: StepPlan) -> str:
    samples = ", ".join(
        f"{sample.clip_id}:{sample.task.value}:{''.join('#' if visible else '.' for visible in sample.mask)}" for sample in plan.samples[:8]
    )
    more = f", ... ({len(plan.samples)} in all)" if len(plan.samples) > 8 else ""
    return f"plan            step {plan.step}: k = {plan.k}; clip:task:visible frames {samples}{more}"
