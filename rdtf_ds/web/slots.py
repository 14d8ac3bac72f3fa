"""The tasks of the page: which frame slots each one wants filled, in words and as rules."""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum

from rdtf_ds.errors import UserError

MIN_SHOWN = 2  # a prediction or an interpolation starts from at least two frames (masks.mask_family)


class Preset(StrEnum):
    """A task as the page names it."""

    TEXT = "Text"
    PICTURE = "Text and picture"
    PREDICTION = "Prediction"
    INTERPOLATION = "Interpolation"
    ANY = "Any frames"


def asked_for(preset: Preset, num_frames: int) -> tuple[int, ...]:
    """The slots that the page marks: the usual choice, from which a task may allow others."""
    return {
        Preset.TEXT: (),
        Preset.PICTURE: (0,),
        Preset.PREDICTION: (0, 1),
        Preset.INTERPOLATION: (0, num_frames - 1),
        Preset.ANY: (),
    }[preset]


def hint(preset: Preset, num_frames: int) -> str:
    """What to do for a clip of ``num_frames`` frames, one sentence or two."""
    last = num_frames - 1
    return {
        Preset.TEXT: "Write a caption. All frame slots stay empty.",
        Preset.PICTURE: "Write a caption and put one picture into a slot, usually frame 0: the first. The caption may be left out.",
        Preset.PREDICTION: "Put the first two frames or more into slots 0, 1, …, or the last ones: the model goes on from there.",
        Preset.INTERPOLATION: f"Put two frames or more into slots, such as 0 and {last}: the model makes what lies between.",
        Preset.ANY: "Fill any slots, or none, with a caption or without. At least one frame must be left to make.",
    }[preset]


def slot_name(number: int, preset: Preset, num_frames: int) -> str:
    """What stands above a slot."""
    if number >= num_frames:
        return f"{number} –"
    return f"▸ {number}" if number in asked_for(preset, num_frames) else f"{number}"


def require(preset: Preset, filled: Collection[int], num_frames: int, prompt: str) -> None:
    """See that the caption and the filled slots are what the task takes.

    Raises:
        UserError: they are not; says which slots and what to do.
    """
    frames = sorted(filled)
    outside = [number for number in frames if number >= num_frames]
    if outside:
        raise UserError(f"Frame {outside[0]} has a picture, but the clip has {num_frames} frames, 0 to {num_frames - 1}. Clear that slot.")
    fault = _fault(preset, frames, num_frames, prompt)
    if fault:
        raise UserError(f"{preset}: {fault}")


def _fault(preset: Preset, frames: list[int], num_frames: int, prompt: str) -> str | None:
    """What is wrong with the sorted ``frames`` and the caption, or None."""
    told = f"frame {frames[0]} has one" if len(frames) == 1 else f"frames {', '.join(map(str, frames))} have"
    if preset is Preset.TEXT:
        if frames:
            return f"this task takes no pictures, and {told}. Clear every slot, or choose another task."
        return None if prompt.strip() else "there is no caption. Write one."
    if preset is Preset.PICTURE:
        return None if len(frames) == 1 else f"this task takes one picture, and {len(frames) or 'no'} slots have one. Fill one, usually 0."
    if preset is Preset.PREDICTION:
        ends = (list(range(len(frames))), list(range(num_frames - len(frames), num_frames)))
        if len(frames) >= MIN_SHOWN and frames in ends:
            return None
        return f"this task takes the first {MIN_SHOWN} frames or more without a gap, or the last ones. Fill slots 0, 1, …"
    if preset is Preset.INTERPOLATION:
        if len(frames) >= MIN_SHOWN and frames[-1] - frames[0] >= len(frames):
            return None
        return f"this task takes {MIN_SHOWN} frames or more with one missing between them. Fill slots such as 0 and {num_frames - 1}."
    return None if frames or prompt.strip() else "there is no caption and no picture, so nothing to go by. Write one or fill a slot."
