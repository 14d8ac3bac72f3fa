"""What a call of the pipeline asks for, sorted into one request for each clip: caption, visible pictures, seed."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image

from rdtf_ds.data.clips.clip import letterbox
from rdtf_ds.data.clips.containers import LONGEST_MS
from rdtf_ds.errors import UserError
from rdtf_ds.seeding import derive_seed

Picture = Image.Image | np.ndarray
Frames = Mapping[int, Picture]
Seeds = int | Sequence[int]
Generators = torch.Generator | Sequence[torch.Generator]

SHORTEST_MS = 10
"""Viewers show shorter frames longer than they should."""


class ClipRequest(NamedTuple):
    """One clip to make: ``prompt`` None for no caption, ``pictures`` (RGB or RGBA) by frame number, empty for none, its own ``seed``."""

    prompt: str | None
    pictures: dict[int, Image.Image]
    seed: int


def clip_requests(
    prompt: str | Sequence[str | None] | None,
    frames: Frames | Sequence[Frames | None] | None,
    seeds: Seeds | None,
    generator: Generators | None,
    num_frames: int,
    *,
    clips: int | None = None,
    unconditional: bool = False,
) -> list[ClipRequest]:
    """One request for each clip; a single prompt, frame mapping or seed serves all clips (a single seed s as s, s + 1, …).

    Blank prompts are no prompts. Without seeds they are drawn from ``generator``, without that from torch's global one.

    Args:
        clips: how many, where latents say so.
        unconditional: a clip may have neither a prompt nor a picture.

    Raises:
        UserError: lists of different lengths, frame numbers outside 0 … num_frames − 1, every frame given, no picture where one is due, or
            a clip with nothing to go by, frame numbers or seeds that are no whole numbers, or a prompt that is no text, see `check_text`.
    """
    prompts = list(prompt) if isinstance(prompt, Iterable) and not isinstance(prompt, (str, bytes)) else None
    mappings = None if frames is None or isinstance(frames, Mapping) else _mappings(frames)
    numbered = _seeds_by_clip(seeds, generator)
    lists = {"prompt": prompts, "frames": mappings, "seeds": numbered if isinstance(numbered, list) else None}
    counts = {name: len(many) for name, many in lists.items() if many is not None} | ({} if clips is None else {"latents": clips})
    if len(set(counts.values())) > 1 or 0 in counts.values():
        told = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise UserError(f"prompt, frames, seeds and latents must name the same number of clips, at least one; they name {told}.")
    requests = []
    for clip in range(next(iter(counts.values()), 1)):
        text = cast("str | None", prompt if prompts is None else prompts[clip])
        chosen = cast("Frames | None", frames if mappings is None else mappings[clip])
        if text is not None:
            check_text("the prompt", text)
        seed = numbered[clip] if isinstance(numbered, list) else numbered(clip)
        requests.append(ClipRequest(text if text and text.strip() else None, _pictures(chosen or {}, num_frames), seed))
    if not unconditional:
        _check_something_to_go_by(requests)
    return requests


def picture_pixels(picture: Image.Image, number: int, size: int, background: tuple[int, int, int], fit: bool) -> np.ndarray:
    """A given picture as a frame of the clip: uint8 (size, size, 3).

    Args:
        number: its frame, for the message.
        fit: a picture of another size or with transparent pixels is laid on the background and fitted into the square.

    Raises:
        UserError: such a picture without ``fit``.
    """
    if not fit:
        remedy = "fit=True (generate.py: --fit) lays it on the background and fits it into the square."
        if picture.size != (size, size):
            width, height = picture.size
            raise UserError(f"frame {number} is {width} x {height} pixels, but this model makes {size} x {size}. {remedy}")
        if picture.mode == "RGBA" and cast("tuple[int, int]", picture.getchannel("A").getextrema())[0] < 255:
            raise UserError(f"frame {number} has transparent pixels, but this model makes clips without transparency. {remedy}")
    return letterbox(picture, size, background)


def frame_durations(durations_ms: int | Sequence[int], num_frames: int) -> list[int]:
    """Milliseconds of each frame, from one number for all or one for each.

    Raises:
        UserError: too few, too many, no whole numbers, shorter than :data:`SHORTEST_MS`, or longer than :data:`LONGEST_MS`.
    """
    many = _whole(durations_ms) is None and isinstance(durations_ms, Iterable)
    durations: list[Any] = list(cast("Iterable[Any]", durations_ms)) if many else [durations_ms] * num_frames
    if len(durations) != num_frames:
        raise UserError(f"durations_ms has {len(durations)} numbers, but the clip has {num_frames} frames; give one, or one for each.")
    found = []
    for duration in durations:
        number = _whole(duration)
        if number is None or not SHORTEST_MS <= number <= LONGEST_MS:
            raise UserError(f"durations_ms holds {duration!r}; a frame is shown for {SHORTEST_MS} to {LONGEST_MS} whole milliseconds.")
        found.append(number)
    return found


def check_text(what: str, text: str) -> None:
    """
    Raises:
        UserError: it is no text, or holds one half of a surrogate pair, which is no character, and which neither tokenizers nor files take.
    """
    if not isinstance(text, str):
        raise UserError(f"{what} is {type(text).__name__}; give a text, or None for no caption.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        place = f"{text[error.start]!a} at character {error.start}"
        raise UserError(f"{what} {text[:40]!a} has {place}, which is half of a surrogate pair and no character; leave it out.") from error


def _check_something_to_go_by(requests: list[ClipRequest]) -> None:
    for number, request in enumerate(requests):
        if request.prompt is None and not request.pictures:
            which = f"clip {number} of {len(requests)} has" if len(requests) > 1 else "there is"
            raise UserError(
                f"{which} neither a prompt nor a frame, so there is nothing to go by. Give a caption or a picture; "
                "unconditional=True makes a clip of whatever the model likes."
            )


def _seeds_by_clip(seeds: Seeds | None, generator: Generators | None) -> Callable[[int], int] | list[int]:
    """A list when there is one for each clip, else a function of the clip's number."""
    if seeds is not None and generator is not None:
        raise UserError("both seeds and generator are given; give one of them.")
    if seeds is not None:
        first = _whole(seeds)
        if first is not None:
            return lambda clip: first + clip
        return [_seed(seed) for seed in (seeds if isinstance(seeds, Iterable) else [seeds])]
    if generator is None or isinstance(generator, torch.Generator):
        base = _draw(generator)
        return lambda clip: derive_seed(base, clip)
    return [_draw(one) for one in generator]


def _seed(seed: Any) -> int:
    number = _whole(seed)
    if number is None:
        raise UserError(f"seeds holds {seed!r}; give a whole number, or one for each clip.")
    return number


def _whole(value: Any) -> int | None:
    """An integer of any library as an int; None for anything else, truth values among them."""
    if isinstance(value, (bool, np.bool_)):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _draw(generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (1,), generator=generator, device=device))


def _mappings(frames: Any) -> list[Frames | None]:
    """One mapping for each clip."""
    many: list[Any] = list(frames) if isinstance(frames, Iterable) else [frames]
    for clip, one in enumerate(many):
        if one is not None and not isinstance(one, Mapping):
            remedy = "give a mapping from frame numbers to pictures, such as {0: picture}"
            raise UserError(f"frames: clip {clip} has {type(one).__name__}; {remedy}.")
    return many


def _pictures(frames: Frames, num_frames: int) -> dict[int, Image.Image]:
    odd = [number for number in frames if _whole(number) is None]
    if odd:
        raise UserError(f"frames: {odd[0]!r} is no frame number; give whole numbers, 0 to {num_frames - 1}.")
    frames = {operator.index(number): picture for number, picture in frames.items()}
    outside = [number for number in frames if not 0 <= number < num_frames]
    if outside:
        raise UserError(f"frame {outside[0]} is not one of the clip's {num_frames} frames; they are numbered 0 to {num_frames - 1}.")
    if len(frames) == num_frames:
        raise UserError(f"all {num_frames} frames are given, so none is left to make; leave at least one out.")
    return {number: _as_image(picture, number) for number, picture in sorted(frames.items())}


def _as_image(picture: Picture, number: int) -> Image.Image:
    """The picture in RGB, or in RGBA if something of it may be transparent."""
    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[-1] in (3, 4):
        picture = Image.fromarray(picture)
    if not isinstance(picture, Image.Image):
        kind = f"{picture.dtype} {picture.shape}" if isinstance(picture, np.ndarray) else type(picture).__name__
        raise UserError(f"frame {number} is {kind}; give a PIL image or a uint8 array (H, W, 3 or 4).")
    if 0 in picture.size:
        raise UserError(f"frame {number} is {picture.width} x {picture.height} pixels, which is no picture.")
    if picture.mode == "F":
        raise UserError(f"frame {number} is a picture of floating-point numbers, whose white nobody knows; give one of 8 or 16 bits.")
    if picture.mode.startswith("I"):  # 16 bits of grey, which Pillow's own conversion would cut off at 255
        if "transparency" in picture.info:
            raise UserError(f"frame {number} is a 16-bit picture with a transparent grey; save it with 8 bits, as RGBA.")
        grey = np.asarray(picture).astype(np.float64)
        return Image.fromarray((grey.clip(0, 65535) / 257).round().astype(np.uint8)).convert("RGB")
    return picture.convert("RGBA" if picture.has_transparency_data else "RGB")
