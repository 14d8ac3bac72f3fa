"""Clips made while training, the same requests every time, so that a person sees whether it works: what is asked, made and shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rdtf_ds.data.clips.writing import write_clip
from rdtf_ds.diffusion.masks import evenly_spaced
from rdtf_ds.seeding import derive_seed, numpy_generator
from rdtf_ds.training.telemetry import RunLog

KINDS = ("text", "image", "prediction", "interpolation")


@dataclass(frozen=True)
class Request:
    """One clip to make: ``visible`` holds the given frames, uint8 (H, W, 3), by frame number."""

    name: str
    prompt: str
    visible: dict[int, np.ndarray]
    num_frames: int
    seed: int


class MadeClip(NamedTuple):
    """A clip that was made: frames uint8 (F, H, W, 3), each shown so many milliseconds."""

    frames: np.ndarray
    durations_ms: Sequence[int]


def visible_frames(kind: str, k: int) -> list[int]:
    """Which of k frames a kind of request shows (Table 7's tasks, one mask each)."""
    return {"text": [], "image": [0], "prediction": list(range(max(2, k // 2)))[: k - 1], "interpolation": list(range(0, k, 2))}[kind]


def make_requests(
    seed: int,
    count: int,
    clip_ids: Sequence[int] | np.ndarray,
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
        visible = {frame: chosen[frame] for frame in visible_frames(kind, len(chosen))}
        clip_seed = derive_seed(seed, "validation", number)
        requests.append(Request(f"{number:02d}_{kind}", captions(int(clip_id)), visible, len(chosen), clip_seed))
    return requests


def make_clip(pipeline: Any, request: Request, steps: int) -> MadeClip:
    """What the pipeline makes of a request in ``steps`` steps of its sampler.

    Raises:
        UserError: The pipeline refuses it, or makes numbers that are not finite.
    """
    blank = not request.prompt.strip() and not request.visible  # a clip without a caption, asked for by text
    output = pipeline(
        request.prompt,
        frames=request.visible,
        num_frames=request.num_frames,
        num_inference_steps=steps,
        seeds=[request.seed],
        **({"unconditional": True} if blank else {}),
    )
    return MadeClip(output.frames[0], output.durations_ms[0])


def write_gifs(clips: Sequence[tuple[Request, MadeClip]], folder: Path) -> list[Path]:
    """A GIF of each clip, and ``prompts.txt`` saying what each was asked for."""
    paths = []
    for request, clip in clips:
        paths.append(folder / f"{request.name}.gif")
        write_clip(clip.frames, paths[-1], clip.durations_ms)
    (folder / "prompts.txt").write_text("".join(f"{request.name}: {request.prompt}\n" for request, _ in clips), encoding="utf-8")
    return paths


def show_clips(clips: Sequence[tuple[Request, MadeClip]], folder: Path, log: RunLog, step: int) -> None:
    """GIFs of the clips in ``folder`` and in TensorBoard; a disk that refuses them is a warning."""
    try:
        paths = write_gifs(clips, folder)
        for path, (request, clip) in zip(paths, clips, strict=True):
            log.gif(f"samples/{request.name}", path, step, clip.frames.shape[1:3])
    except OSError as error:
        log.say(f"Warning: the validation clips of step {step} could not all be written to '{folder}': {error}. Training goes on.")
