"""Condition masks and the loss mask: how one sticker becomes many training samples (paper, dual mask; Table 7).

Legend: k, frames of a sample that count in the loss, 3..8; N, the masked frame length: those of them that the model does not see.
A mask is a tuple of booleans, True = the model sees this frame clean.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from functools import cache

import numpy as np
import numpy.typing as npt

MIN_FRAMES = 3
MAX_FRAMES = 8

Mask = tuple[bool, ...]


class Task(StrEnum):
    """The tasks of the condition mask, from easy to hard."""

    INTERPOLATION = "IPT"
    PREDICTION = "PDT"
    GENERATION = "GRT"


@cache
def mask_family(task: Task, k: int) -> tuple[Mask, ...]:
    """All condition masks of a task on k frames, without duplicates, in a fixed order.

    - Interpolation: every second or third frame is visible, from every offset; at least 2 visible and 1 hidden.
    - Prediction: a visible prefix or suffix of at least 2 frames; at least 1 hidden.
    - Generation: one visible frame, each of the k in turn, and lastly none.

    The families are defined on k frames, since cutting 8-frame masks to k would leave many without a visible frame.

    Raises:
        ValueError: k is outside 3..8.
    """
    _check_k(k)
    masks = {Task.INTERPOLATION: _interpolation, Task.PREDICTION: _prediction, Task.GENERATION: _generation}[Task(task)](k)
    return tuple(dict.fromkeys(masks))


def level(mask: Mask) -> int:
    """N, the masked frame length: frames under the loss (all of the mask's) that are not visible."""
    return sum(not visible for visible in mask)


def loss_mask(k: int, frames: int = MAX_FRAMES) -> Mask:
    """The first k of ``frames`` frames count in the loss.

    Raises:
        ValueError: k is not in 1..frames.
    """
    if not 1 <= k <= frames:
        raise ValueError(f"loss mask of {k} frames out of {frames}: k must be in 1..{frames}")
    return tuple(frame < k for frame in range(frames))


def evenly_spaced(num_frames: int, k: int) -> npt.NDArray[np.int64]:
    """k distinct, sorted frame numbers spread over a clip, its first and last among them (k = 1: the first).

    Raises:
        ValueError: k is not in 1..num_frames.
    """
    if not 1 <= k <= num_frames:
        raise ValueError(f"cannot choose {k} distinct frames out of {num_frames}")
    gaps = max(k - 1, 1)
    positions = np.arange(k, dtype=np.int64) * (num_frames - 1)
    return (2 * positions + gaps) // (2 * gaps)  # rounded half up, in integers


def _check_k(k: int) -> None:
    if not MIN_FRAMES <= k <= MAX_FRAMES:
        raise ValueError(f"no condition masks for k = {k}: k must be in {MIN_FRAMES}..{MAX_FRAMES}")


def _interpolation(k: int) -> Iterable[Mask]:
    for stride in (2, 3):
        for offset in range(stride):
            mask = tuple(frame % stride == offset for frame in range(k))
            if sum(mask) >= 2 and level(mask) >= 1:
                yield mask


def _prediction(k: int) -> Iterable[Mask]:
    for visible in range(2, k):
        yield tuple(frame < visible for frame in range(k))
        yield tuple(frame >= k - visible for frame in range(k))


def _generation(k: int) -> Iterable[Mask]:
    for visible in range(k):
        yield tuple(frame == visible for frame in range(k))
    yield (False,) * k
