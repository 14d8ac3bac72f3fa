"""Clips made while training, the same requests every time, so that a person sees whether it works.

All ranks share the work, clip by clip, and meet afterwards: none waits in a collective while another samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rdtf_ds.data.writing import write_clip
from rdtf_ds.diffusion.masks import evenly_spaced
from rdtf_ds.pipeline import RDTFPipeline
from rdtf_ds.seeding import derive_seed, numpy_generator
from rdtf_ds.training.ema import ShardedEMA
from rdtf_ds.training.engine import TrainingEngine, gather_objects
from rdtf_ds.training.telemetry import RunLog

MILLISECONDS = 120
"""Each frame of a validation GIF is shown this long."""


@dataclass(frozen=True)
class Request:
    """One clip to make: ``visible`` holds the given frames, uint8 (H, W, 3), by frame number."""

    name: str
    prompt: str
    visible: dict[int, np.ndarray]
    num_frames: int
    seed: int


def _visible_frames(kind: str, k: int) -> list[int]:
    """Which of k frames a kind of request shows (Table 7's tasks, one mask each)."""
    return {"text": [], "image": [0], "prediction": list(range(max(2, k // 2)))[: k - 1], "interpolation": list(range(0, k, 2))}[kind]


KINDS = ("text", "image", "prediction", "interpolation")


def make_requests(
    seed: int,
    count: int,
    clip_ids: Sequence[int],
    captions: Callable[[int], str],
    decode: Callable[[int], np.ndarray | None],
    frames: int,
) -> list[Request]:
    """``count`` requests about clips drawn with ``seed``, going through the four kinds in turn.

    Args:
        clip_ids: Clips to draw from.
        captions: Of a clip.
        decode: Frames of a clip, uint8 (F, H, W, 3), or None if it cannot be read; the next one drawn takes its place.
        frames: The most frames of a clip.
    """
    requests: list[Request] = []
    for clip_id in numpy_generator(seed, "validation clips").permutation(np.asarray(clip_ids)):
        if len(requests) == count:
            break
        pixels = decode(int(clip_id))
        if pixels is None:
            continue
        number = len(requests)
        kind = KINDS[number % len(KINDS)]
        chosen = pixels[evenly_spaced(len(pixels), min(frames, len(pixels)))]
        visible = {frame: chosen[frame] for frame in _visible_frames(kind, len(chosen))}
        clip_seed = derive_seed(seed, "validation", number)
        requests.append(Request(f"{number:02d}_{kind}", captions(int(clip_id)), visible, len(chosen), clip_seed))
    return requests


def sample_clips(
    pipeline: Any, requests: Sequence[Request], rank: int, world_size: int, steps: int
) -> list[tuple[Request, np.ndarray]]:
    """Every request and its clip, uint8 (F, H, W, 3), on all ranks; each rank makes each ``world_size``-th. Called by all ranks."""
    made = []
    pipeline.set_progress_bar_config(disable=True)
    for number in range(rank, len(requests), world_size):
        request = requests[number]
        output = pipeline(
            request.prompt, frames=request.visible, num_frames=request.num_frames, num_inference_steps=steps, seeds=[request.seed]
        )
        made.append((number, output.frames[0]))
    everything = sorted((item for part in gather_objects(made) for item in part), key=lambda item: item[0])
    return [(requests[number], frames) for number, frames in everything]


def write_gifs(clips: Sequence[tuple[Request, np.ndarray]], folder: Path) -> list[Path]:
    """A GIF of each clip, and ``prompts.txt`` saying what each was asked for."""
    paths = []
    for request, frames in clips:
        paths.append(folder / f"{request.name}.gif")
        write_clip(frames, paths[-1], MILLISECONDS)
    (folder / "prompts.txt").write_text("".join(f"{request.name}: {request.prompt}\n" for request, _ in clips), encoding="utf-8")
    return paths


@dataclass(frozen=True)
class Validation:
    """Makes ``requests`` with the mean weights, every rank its share, and shows the result.

    Attributes:
        pipeline: Around the live network.
        steps: Of the sampler.
    """

    pipeline: RDTFPipeline
    requests: Sequence[Request]
    steps: int

    def __call__(self, engine: TrainingEngine, ema: ShardedEMA | None, folder: Path, log: RunLog, step: int) -> None:
        """Clips after ``step`` attempted steps, into ``folder/samples`` and TensorBoard; called by all ranks."""
        with ema.applied_to(engine) if ema is not None else nullcontext():
            clips = sample_clips(self.pipeline, self.requests, engine.rank, engine.world_size, self.steps)
        if engine.rank == 0:
            paths = write_gifs(clips, folder / "samples" / f"step{step:08d}")
            for path, (request, frames) in zip(paths, clips, strict=True):
                log.gif(f"samples/{request.name}", path, step, frames.shape[1:3])
