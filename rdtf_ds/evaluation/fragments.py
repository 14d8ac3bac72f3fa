"""Fragments: what FAST-VQA looks at instead of a video (Wu et al. 2022, sections 3.1 and 3.2).

Every frame is cut into 7 × 7 cells, one 32-px patch is taken out of each, at the same place in all frames of a view, and the patches are
laid side by side: 224 px of original texture, whatever the size of the video. Four views of 32 frames make one score.

Legend: F frames of a clip, T = 32 frames of a view, V views, H W pixels, G = 7 cells a side.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

VIEWS, VIEW_FRAMES = 4, 32
CELLS, PATCH = 7, 32
SIDE = CELLS * PATCH
# ImageNet's, of pixels 0..255, as the project's data sets have them.
_MEAN, _DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def frames_of_views(num_frames: int, interval: int = 1) -> np.ndarray:
    """Which frames the four views show: int64 (V, T).

    Views of a long clip lie evenly over it. A clip shorter than a view (T · interval) starts all views at frame 0 and is played again and
    again: every view of 8 frames shows 0 to 7 four times at interval 1, and 0, 2, 4, 6 eight times at interval 2.

    Raises:
        ValueError: No frames, or an interval below 1.
    """
    if num_frames < 1 or interval < 1:
        raise ValueError(f"a clip needs a frame, and an interval of at least 1; got {num_frames} frames and {interval}")
    share = max(0, num_frames - VIEW_FRAMES * interval + 1) / VIEWS
    starts = (np.arange(VIEWS) * share + share / 2).astype(np.int64)
    return (starts[:, None] + np.arange(VIEW_FRAMES) * interval) % num_frames


def cut_views(clip: np.ndarray, seed: int, interval: int = 1) -> Tensor:
    """The views of a clip, uint8 (F, H, W, 3), normalised for the network: float32 (V', 3, T, 224, 224).

    V' is 4, or 1 where all four are the same, as they are for a short clip of at most 224 px: their mean is that one's score. Patches are
    drawn from a generator of this clip alone, so that a score hangs neither on other clips nor on their order.

    Raises:
        ValueError: Not a clip of uint8 (F, H, W, 3).
    """
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3 or 0 in clip.shape:
        raise ValueError(f"a clip must be uint8 (F, H, W, 3), not {clip.dtype} {clip.shape}")
    frames = enlarge(torch.from_numpy(np.ascontiguousarray(clip)).permute(3, 0, 1, 2))
    corners = draw_corners(frames.shape[2], frames.shape[3], np.random.default_rng(seed))
    shown = frames_of_views(len(clip), interval)
    if all((values == values[0]).all() for values in (shown, corners)):
        shown, corners = shown[:1], corners[:1]
    views = torch.stack([cut_patches(frames, places)[:, numbers] for places, numbers in zip(corners, shown, strict=True)])
    mean, deviation = (torch.tensor(values)[:, None, None, None] for values in (_MEAN, _DEVIATION))
    return (views.float() - mean) / deviation


def enlarge(frames: Tensor) -> Tensor:
    """Frames uint8 (3, F, H, W) with the shorter side brought to 224 px if it is below: bilinear, rounded down."""
    short = min(frames.shape[-2:])
    if short >= SIDE:
        return frames
    # A hair more, or rounding makes 223 px of 55. What is left of the longer side beyond whole pixels is dropped, not squeezed in.
    larger = functional.interpolate(frames / 255, scale_factor=SIDE / short * (1 + 1e-12), mode="bilinear", align_corners=False)
    return (larger * 255).to(torch.uint8)


def draw_corners(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Upper left corners (y, x) of the patches, drawn within their cells: int64 (V, G, G, 2). No draws where a cell has no room."""
    cells = height // CELLS, width // CELLS
    down, across = (rng.integers(0, max(cell - PATCH, 1), (VIEWS, CELLS, CELLS)) for cell in cells)
    numbers = np.arange(CELLS)
    return np.stack([numbers[:, None] * cells[0] + down, numbers * cells[1] + across], axis=-1)


def cut_patches(frames: Tensor, corners: np.ndarray) -> Tensor:
    """The patches at ``corners`` (G, G, 2) of frames (3, F, H, W), side by side: (3, F, 224, 224)."""
    rows = [torch.cat([frames[:, :, y : y + PATCH, x : x + PATCH] for y, x in row], dim=3) for row in corners.tolist()]
    return torch.cat(rows, dim=2)
