"""What a visitor sent, as a clip to make. A page sends what its fields allow, but a request can be made by hand: all is checked here."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Collection
from typing import Any

from rdtf_ds.errors import UserError
from rdtf_ds.generation.jobs import Job
from rdtf_ds.pipeline import MIN_FRAMES
from rdtf_ds.samplers import SAMPLERS
from rdtf_ds.web.slots import Preset, require
from rdtf_ds.web.studio import Studio, open_upload

LONGEST_CAPTION = 2000
FRAMES, FRAME_MS, SEED, STEPS = "Frames", "Milliseconds a frame", "Seed", "Steps"
TEXT_SCALE, IMAGE_SCALE = "Guidance by the caption", "Guidance by the pictures"


def limits(studio: Studio) -> dict[str, tuple[float, float]]:
    """The least and the most of each number by its name on the page; the model's own settings always lie within."""
    config = studio.pipeline.config
    trained = studio.pipeline.scheduler.config.num_train_timesteps
    return {
        FRAMES: (MIN_FRAMES, config.max_frames),
        FRAME_MS: (min(20, config.frame_ms), max(1000, config.frame_ms)),
        SEED: (0, 2**53 - 1),  # beyond, a browser's numbers skip some
        STEPS: (1, min(trained, max(200, config.steps))),
        TEXT_SCALE: (min(0, config.text_scale), max(20, config.text_scale)),
        IMAGE_SCALE: (min(0, config.image_scale), max(20, config.image_scale)),
    }


def job_of(
    studio: Studio,
    prompt: Any,
    task: Any,
    num_frames: Any,
    frame_ms: Any,
    seed: Any,
    steps: Any,
    sampler: Any,
    text_scale: Any,
    image_scale: Any,
    *uploads: Any,
) -> Job:
    """The values of the page, in its order and unprocessed: a broken picture is our message and not gradio's.

    Raises:
        UserError: a value is not what its field allows, an upload is no picture or none, or the task wants other slots filled.
    """
    within = limits(studio)
    caption = text("Caption", prompt, LONGEST_CAPTION)
    preset = Preset(one_of("Task", task, [preset.value for preset in Preset]))
    numbers = {FRAMES: num_frames, FRAME_MS: frame_ms, SEED: seed, STEPS: steps}
    wholes = {name: whole(name, value, *within[name]) for name, value in numbers.items()}
    job = Job(
        name="sticker",
        prompt=caption if caption.strip() else None,
        seed=wholes[SEED],
        frames=wholes[FRAMES],
        steps=wholes[STEPS],
        sampler=one_of("Sampler", sampler, SAMPLERS),
        text_scale=number(TEXT_SCALE, text_scale, *within[TEXT_SCALE]),
        image_scale=number(IMAGE_SCALE, image_scale, *within[IMAGE_SCALE]),
        durations_ms=wholes[FRAME_MS],
        pictures={slot: open_upload(upload, slot, studio.uploads) for slot, upload in enumerate(uploads) if upload is not None},
    )
    require(preset, job.pictures, wholes[FRAMES], caption)
    return job


def text(name: str, value: Any, longest: int) -> str:
    """
    Raises:
        UserError: no text, or a longer one.
    """
    if not isinstance(value, str):
        raise UserError(f"{name} is {reprlib.repr(value)}. Write a text.")
    if len(value) > longest:
        raise UserError(f"{name} has {len(value)} characters. Write {longest} at most.")
    return value


def one_of(name: str, value: Any, choices: Collection[str]) -> str:
    """
    Raises:
        UserError: none of the choices.
    """
    if not isinstance(value, str) or value not in choices:
        raise UserError(f"{name} is {reprlib.repr(value)}. Choose one of {', '.join(choices)}.")
    return value


def number(name: str, value: Any, least: float, most: float) -> float:
    """
    Raises:
        UserError: the field is empty, or holds no number, or one outside of ``least`` … ``most``.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise UserError(f"{name} is {'empty' if value is None else reprlib.repr(value)}. Write a number from {least} to {most}.")
    return value


def whole(name: str, value: Any, least: float, most: float) -> int:
    """
    Raises:
        UserError: as ``number``, or it is a fraction.
    """
    found = number(name, value, least, most)
    if found != math.floor(found):
        raise UserError(f"{name} is {found}. Write a whole number from {least} to {most}.")
    return int(found)
