"""The report on a data folder: the survey of its index, how varied the chosen frames are, and a sample of its clips."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from rdtf_ds.config import DataSection
from rdtf_ds.data.clips.clip import DecodeLimits
from rdtf_ds.data.indexing.index import ClipIndex
from rdtf_ds.data.indexing.index_building import build_index
from rdtf_ds.inspection.page import render
from rdtf_ds.inspection.survey import COLUMNS, Survey, survey
from rdtf_ds.inspection.variety import measure_variety
from rdtf_ds.inspection.views import ClipView, pick_clips, view_clip
from rdtf_ds.models.frame_encoder import CLIPFrames
from rdtf_ds.models.local_weights import KnownHashes
from rdtf_ds.seeding import numpy_generator

MOST_MEASURED = 1000
"""Clips whose variety is measured: a few seconds."""


@dataclass(frozen=True)
class Report:
    """What there is to tell of a folder."""

    survey: Survey
    clips: list[ClipView]
    seed: int

    def page(self) -> str:
        """As HTML."""
        return render(self.survey, self.clips, self.seed)


def inspect_folder(root: str | Path, data: DataSection, clips: int, seed: int, folder: Path | None = None) -> Report:
    """Index a folder as a run with these keys would, and look at it; that there is nothing to train on is no error.

    Args:
        root: What ``rdtf.data.data_dir`` may be; ``data.data_dir`` is not looked at, nor is ``data.index_dir``.
        clips: Clips to show.
        folder: Where the index is kept; None: nowhere.
    Raises:
        UserError: there is nothing to index, the index cannot be kept there, or ``data.frame_features`` is no model.
    """
    describer = None
    if data.frame_features != DataSection().frame_features:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        describer = CLIPFrames(data.frame_features, device, KnownHashes(folder))
    limits = DecodeLimits(**data.limits())
    index = build_index(root, limits, folder, describer=describer, require_trainable=False, **data.index_options())
    return inspect(str(root), index, clips, seed)


def inspect(root: str, index: ClipIndex, clips: int, seed: int) -> Report:
    """Look at what is indexed; ``root`` is what people call it."""
    found = survey(root, index.summary(), index.counts(), partial(index.parts, *COLUMNS))
    ids = index.trainable
    measured = np.sort(numpy_generator(seed, "measured clips").permutation(ids)[:MOST_MEASURED]).tolist()
    if measured:
        found.variety_clips = len(measured)
        found.variety = measure_variety(((clip_id, index.frame_features(clip_id)) for clip_id in measured), seed)
    picked = pick_clips(ids, _formats(index)[ids], index.frame_counts, clips, seed) if clips else []
    return Report(found, [view_clip(index, clip_id, seed, index.settings.limits, index.settings.background) for clip_id in picked], seed)


def _formats(index: ClipIndex) -> np.ndarray:
    """A number for each clip's format, in the order of their names."""
    column = index.columns("format").column(0).dictionary_encode()
    numbers: np.ndarray = np.argsort(np.argsort(column.dictionary.to_pylist()))[column.indices.to_numpy()]
    return numbers
