"""Small data folders whose frames carry their own number, and plans to draw from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rdtf_ds.data.clips.clip import DecodeLimits
from rdtf_ds.data.clips.writing import write_clip
from rdtf_ds.data.dataset import DropRates, LatentShape, StickerDataset
from rdtf_ds.data.indexing.index_building import build_index
from rdtf_ds.data.step_plan import SamplePlan
from rdtf_ds.diffusion.masks import Task

SIDE = 16
NO_DROPS = DropRates(0, 0, 0, 0)


def numbered_clips(root: Path, frame_counts: list[int], caption: str = "one two three four") -> Path:
    """Clip i is ``i.png``; its frame f has red = 10·f and green = 20·i everywhere."""
    for number, num_frames in enumerate(frame_counts):
        frames = np.zeros((num_frames, SIDE, SIDE, 3), np.uint8)
        frames[..., 0] = 10 * np.arange(num_frames)[:, None, None]
        frames[..., 1] = 20 * number
        write_clip(frames, root / f"{number}.png")
        (root / f"{number}.txt").write_text(caption)
    return root


def dataset(root: Path, seed: int = 5, **options: Any) -> StickerDataset:
    index = build_index(root, DecodeLimits(), root / ".index", workers=1, drop_duplicates=False)
    return StickerDataset(index, seed, LatentShape(4, 2), SIDE, **{"drops": NO_DROPS, **options})


def plan(sample_number: int, clip_id: int, visible: str = "#..", text: bool = True, task: Task = Task.GENERATION) -> SamplePlan:
    """``visible``: one mark for each frame, # = visible."""
    return SamplePlan(sample_number, clip_id, len(visible), task, tuple(mark == "#" for mark in visible), text)
