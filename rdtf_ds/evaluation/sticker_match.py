"""Reads colour and motion back from a clip of one flat sticker on white, and compares them with what was asked for.

The judge knows nothing of the model: it sees decoded frames only, uint8 (F, H, W, 3). A pixel's colour is its hue (what is
left of RGB without the grey part), so a washed-out red still counts as red; grey or black counts as no colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rdtf_ds.data.synthetic import COLOURS, Sticker

_FOREGROUND = 60.0  # levels below white in the lowest channel; noise of sigma 25 reaches about 35 after the 3 x 3 mean
_COLOURFUL = 30.0  # length of the grey-free RGB vector under which a pixel has no hue (a full red has about 155)
_FULL_TRAVEL = 0.49  # share of the side that a slide covers
_FULL_GROWTH = 2.1  # log area ratio of a shape that grows from 0.35 of its radius to all of it
_MIN_MOTION = 0.25  # of the full travel or growth; less is standing still


@dataclass(frozen=True)
class Report:
    """What :func:`judge` found; shares are in 0..1, changes in grey levels of 255."""

    clips: int
    colour_match: float
    colour_match_shuffled: float
    motion_match: float
    motion_match_shuffled: float
    frame_change: float
    held_out_clips: int
    held_out_colour_match: float | None
    training_frame_change: float | None

    @property
    def change_ratio(self) -> float | None:
        """Change between frames as a share of the training clips' change."""
        return self.frame_change / self.training_frame_change if self.training_frame_change else None

    def lines(self) -> list[str]:
        """One line per finding, ``colour match: 83 %`` first."""
        lines = [
            f"colour match: {_percent(self.colour_match)}",
            f"colour match with prompts shuffled: {_percent(self.colour_match_shuffled)}",
        ]
        if self.held_out_colour_match is not None:
            lines.append(
                f"colour match on held-out pairs: {_percent(self.held_out_colour_match)} ({self.held_out_clips} of {self.clips} clips)"
            )
        lines += [
            f"motion match: {_percent(self.motion_match)}",
            f"motion match with prompts shuffled: {_percent(self.motion_match_shuffled)}",
            f"change between frames: {self.frame_change:.2f} of 255 levels",
        ]
        if self.change_ratio is not None:
            lines.append(f"change between frames against training clips: {_percent(self.change_ratio)}")
        return lines


def judge(clips: Sequence[tuple[Sticker, np.ndarray]], training: Sequence[np.ndarray] = ()) -> Report:
    """Compares each clip with what its prompt asked for.

    Args:
        clips: (what was asked for, frames uint8 (F, H, W, 3)), at least two.
        training: frames of training clips with as many frames each, for the ratio of changes; empty: no ratio.

    Raises:
        ValueError: fewer than two clips (shuffling prompts needs two).
    """
    if len(clips) < 2:
        raise ValueError(f"the judge needs at least 2 clips, got {len(clips)}")
    asked = [sticker for sticker, _ in clips]
    colours = [dominant_colour(frames)[0] for _, frames in clips]
    motions = [detect_motion(frames) for _, frames in clips]
    right = [sticker.colour == colour for sticker, colour in zip(asked, colours, strict=True)]
    held_out = [match for sticker, match in zip(asked, right, strict=True) if sticker.held_out]
    return Report(
        clips=len(clips),
        colour_match=float(np.mean(right)),
        colour_match_shuffled=_shuffled_match([sticker.colour for sticker in asked], colours),
        motion_match=float(np.mean([sticker.motion == motion for sticker, motion in zip(asked, motions, strict=True)])),
        motion_match_shuffled=_shuffled_match([sticker.motion for sticker in asked], motions),
        frame_change=float(np.mean([frame_change(frames) for _, frames in clips])),
        held_out_clips=len(held_out),
        held_out_colour_match=float(np.mean(held_out)) if held_out else None,
        training_frame_change=float(np.mean([frame_change(frames) for frames in training])) if len(training) else None,
    )


def dominant_colour(frames: np.ndarray) -> tuple[str | None, float]:
    """The colour most foreground pixels are nearest to, and their share of the foreground.

    Returns:
        ``(name, share)``, or ``(None, 0.0)`` when nothing stands out from white or most of it has no hue.
    """
    pixels = _smooth(frames)
    foreground = pixels[_below_white(pixels) > _FOREGROUND]  # (N, 3)
    if not len(foreground):
        return None, 0.0
    hue = _without_grey(foreground)
    references = _without_grey(np.array(list(COLOURS.values()), np.float32))
    references /= np.linalg.norm(references, axis=1, keepdims=True)
    votes = (hue @ references.T).argmax(axis=1)
    votes[np.linalg.norm(hue, axis=1) < _COLOURFUL] = len(COLOURS)
    counts = np.bincount(votes, minlength=len(COLOURS) + 1)
    winner = int(counts.argmax())
    if winner == len(COLOURS):
        return None, 0.0
    return list(COLOURS)[winner], float(counts[winner] / len(foreground))


def detect_motion(frames: np.ndarray) -> str | None:
    """The motion in ``MOTIONS`` that the frames show, or None when the sticker stands still or is not there.

    Centre and area of the foreground are fitted by straight lines over the frames; each slope, as a share of a full
    slide's travel or a full growth, is one candidate and the largest wins.
    """
    if len(frames) < 2:
        return None
    mass = np.clip((_below_white(_smooth(frames)) - _FOREGROUND) / _FOREGROUND, 0, 1)  # (F, H, W), soft edges
    area = mass.sum(axis=(1, 2))
    seen = area >= 4.0  # pixels: less is a speck, its centre means nothing
    if seen.sum() < 2:
        return None
    height, width = mass.shape[1:]
    x = (mass.sum(axis=1)[seen] @ np.arange(width)) / area[seen] / width
    y = (mass.sum(axis=2)[seen] @ np.arange(height)) / area[seen] / height
    time = np.flatnonzero(seen) / (len(frames) - 1)
    right, down = _slope(time, x) / _FULL_TRAVEL, _slope(time, y) / _FULL_TRAVEL
    growth = _slope(time, np.log(area[seen])) / _FULL_GROWTH
    candidates = {
        "slides right": right, "slides left": -right, "falls": down, "rises": -down, "grows": growth, "shrinks": -growth,
    }  # fmt: skip
    name = max(candidates, key=candidates.__getitem__)
    return name if candidates[name] >= _MIN_MOTION else None


def frame_change(frames: np.ndarray) -> float:
    """Mean absolute change between consecutive frames in levels of 255; 0 for a single frame."""
    if len(frames) < 2:
        return 0.0
    return float(np.abs(np.diff(frames.astype(np.float32), axis=0)).mean())


def _shuffled_match(asked: Sequence[str], found: Sequence[str | None]) -> float:
    """Expected match when every clip is held against another clip's prompt.

    In a uniformly drawn derangement each of the other prompts is equally likely, so the mean over all derangements is the
    mean over all ordered pairs of different clips.
    """
    pairs = [prompt == seen for i, prompt in enumerate(asked) for j, seen in enumerate(found) if i != j]
    return float(np.mean(pairs))


def _smooth(frames: np.ndarray) -> np.ndarray:
    """Mean over 3 x 3 pixels, borders repeated: float32 (F, H, W, 3)."""
    padded = np.pad(frames.astype(np.float32), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    return (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]) / 9


def _below_white(pixels: np.ndarray) -> np.ndarray:
    """How far the darkest channel lies below white."""
    return 255 - pixels.min(axis=-1)


def _without_grey(colours: np.ndarray) -> np.ndarray:
    return colours - colours.mean(axis=-1, keepdims=True)


def _slope(time: np.ndarray, values: np.ndarray) -> float:
    """Least-squares change of ``values`` while ``time`` goes from 0 to 1."""
    centred = time - time.mean()
    return float(centred @ values / (centred @ centred))


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
