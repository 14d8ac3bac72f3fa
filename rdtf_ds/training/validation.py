"""Clips made while training, the same requests every time, so that a person sees whether it works.

All ranks share the work, clip by clip, and meet afterwards: none waits in a collective while another samples. A clip that cannot be
made or written is a warning, since training does not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rdtf_ds.data.clips.writing import write_clip
from rdtf_ds.diffusion.masks import evenly_spaced
from rdtf_ds.errors import UserError
from rdtf_ds.pipeline import RDTFPipeline
from rdtf_ds.seeding import derive_seed, numpy_generator
from rdtf_ds.training.collectives import gather_objects
from rdtf_ds.training.ema import ShardedEMA
from rdtf_ds.training.engine import TrainingEngine
from rdtf_ds.training.supervisor import heartbeat
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
    pipeline: Any, requests: Sequence[Request], rank: int, world_size: int, steps: int, hurry: Callable[[], bool] = lambda: False
) -> tuple[list[tuple[Request, np.ndarray]], list[str]]:
    """Every request made, with its clip, uint8 (F, H, W, 3), and why the others were not; on all ranks, and called by all.

    Each rank makes each ``world_size``-th, and no more of them once ``hurry`` says that the run was asked to stop.
    """
    made: list[tuple[int, np.ndarray | str]] = []
    pipeline.set_progress_bar_config(disable=True)
    for number in range(rank, len(requests), world_size):
        request = requests[number]
        if hurry():
            made.append((number, f"{request.name}: the run was asked to stop"))
            continue
        heartbeat().beat("validation")
        try:
            output = pipeline(
                request.prompt, frames=request.visible, num_frames=request.num_frames, num_inference_steps=steps, seeds=[request.seed]
            )
            made.append((number, output.frames[0]))
        except UserError as error:  # the other ranks may have no error, and wait below
            made.append((number, f"{request.name}: {error}"))
    everything = sorted((item for part in gather_objects(made) for item in part), key=lambda item: item[0])
    clips = [(requests[number], frames) for number, frames in everything if not isinstance(frames, str)]
    return clips, [failure for _, failure in everything if isinstance(failure, str)]


def write_gifs(clips: Sequence[tuple[Request, np.ndarray]], folder: Path) -> list[Path]:
    """A GIF of each clip, and ``prompts.txt`` saying what each was asked for."""
    paths = []
    for request, frames in clips:
        paths.append(folder / f"{request.name}.gif")
        write_clip(frames, paths[-1], MILLISECONDS)
    (folder / "prompts.txt").write_text("".join(f"{request.name}: {request.prompt}\n" for request, _ in clips), encoding="utf-8")
    return paths


def show_clips(clips: Sequence[tuple[Request, np.ndarray]], folder: Path, log: RunLog, step: int) -> None:
    """GIFs of the clips in ``folder`` and in TensorBoard; a disk that refuses them is a warning."""
    try:
        paths = write_gifs(clips, folder)
        for path, (request, frames) in zip(paths, clips, strict=True):
            log.gif(f"samples/{request.name}", path, step, frames.shape[1:3])
    except OSError as error:
        log.say(f"Warning: the validation clips of step {step} could not all be written to '{folder}': {error}. Training goes on.")


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

    def __call__(
        self, engine: TrainingEngine, ema: ShardedEMA | None, folder: Path, log: RunLog, step: int, hurry: Callable[[], bool]
    ) -> None:
        """Clips after ``step`` attempted steps, into ``folder/samples`` and TensorBoard; called by all ranks."""
        with ema.applied_to(engine) if ema is not None else nullcontext():
            clips, failures = sample_clips(self.pipeline, self.requests, engine.rank, engine.world_size, self.steps, hurry)
        if engine.rank != 0:
            return
        for failure in failures:
            log.say(f"Warning: after step {step} no validation clip {failure}")
        if clips:
            show_clips(clips, folder / "samples" / f"step{step:08d}", log, step)
