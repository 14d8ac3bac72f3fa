"""What a call of the pipeline asks for, sorted into one request for each clip: caption, visible pictures, seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from PIL import Image

from rdtf_ds.errors import UserError
from rdtf_ds.seeding import derive_seed

Picture = Image.Image | np.ndarray
Frames = Mapping[int, Picture]
Seeds = int | Sequence[int]
Generators = torch.Generator | Sequence[torch.Generator]


class ClipRequest(NamedTuple):
    """One clip to make: ``prompt`` None for no caption, ``pictures`` by frame number, empty for none, and its own ``seed``."""

    prompt: str | None
    pictures: dict[int, Image.Image]
    seed: int


def clip_requests(
    prompt: str | Sequence[str | None] | None,
    frames: Frames | Sequence[Frames | None] | None,
    seeds: Seeds | None,
    generator: Generators | None,
    num_frames: int,
) -> list[ClipRequest]:
    """One request for each clip; a single prompt, frame mapping or seed serves all clips (a single seed s as s, s + 1, …).

    Blank prompts are no prompts. Without seeds they are drawn from ``generator``, without that from torch's global one.

    Raises:
        UserError: lists of different lengths, frame numbers outside 0 … num_frames − 1, every frame given, or no picture where one is due.
    """
    prompts = None if prompt is None or isinstance(prompt, str) else list(prompt)
    mappings = None if frames is None or isinstance(frames, Mapping) else list(frames)
    numbered = _seeds_by_clip(seeds, generator)
    lists = {"prompt": prompts, "frames": mappings, "seeds": numbered if isinstance(numbered, list) else None}
    counts = {name: len(many) for name, many in lists.items() if many is not None}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        told = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise UserError(f"prompt, frames and seeds must name the same number of clips, at least one; they name {told}.")
    requests = []
    for clip in range(next(iter(counts.values()), 1)):
        text = cast("str | None", prompt if prompts is None else prompts[clip])
        chosen = cast("Frames | None", frames if mappings is None else mappings[clip]) or {}
        seed = numbered[clip] if isinstance(numbered, list) else numbered(clip)
        requests.append(ClipRequest(text if text and text.strip() else None, _pictures(chosen, num_frames), seed))
    return requests


def _seeds_by_clip(seeds: Seeds | None, generator: Generators | None) -> Callable[[int], int] | list[int]:
    """A list when there is one for each clip, else a function of the clip's number."""
    if seeds is not None and generator is not None:
        raise UserError("both seeds and generator are given; give one of them.")
    if isinstance(seeds, int):
        return lambda clip: seeds + clip
    if seeds is not None:
        return [int(seed) for seed in seeds]
    if generator is None or isinstance(generator, torch.Generator):
        base = _draw(generator)
        return lambda clip: derive_seed(base, clip)
    return [_draw(one) for one in generator]


def _draw(generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (1,), generator=generator, device=device))


def _pictures(frames: Frames, num_frames: int) -> dict[int, Image.Image]:
    outside = [number for number in frames if not 0 <= number < num_frames]
    if outside:
        raise UserError(f"frame {outside[0]} is not one of the clip's {num_frames} frames; they are numbered 0 to {num_frames - 1}.")
    if len(frames) == num_frames:
        raise UserError(f"all {num_frames} frames are given, so none is left to make; leave at least one out.")
    return {number: _as_image(picture, number) for number, picture in sorted(frames.items())}


def _as_image(picture: Picture, number: int) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture if picture.mode in ("RGB", "RGBA") else picture.convert("RGBA")
    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[-1] in (3, 4):
        return Image.fromarray(picture)
    kind = f"{picture.dtype} {picture.shape}" if isinstance(picture, np.ndarray) else type(picture).__name__
    raise UserError(f"frame {number} is {kind}; give a PIL image or a uint8 array (H, W, 3 or 4).")
