"""VQA: how good a clip looks, as FAST-VQA-B judges it from the clip alone (Wu et al. 2022).

The network was trained on people's ratings of real videos (LSVQ). Its raw scores have no unit; what is told here is the project's own
rescaling to 0..1, a sigmoid around the mean of raw scores with their deviation as unit, both as its vqa.py has them for this network.

Legend: n clips, F frames, H W pixels, V views, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from rdtf_ds.evaluation.fast_vqa_weights import load_weights
from rdtf_ds.evaluation.fragments import SIDE, VIEW_FRAMES, cut_views, frames_of_views
from rdtf_ds.evaluation.swin3d import Swin3D

RAW_MEAN, RAW_DEVIATION = -0.110198185, 0.04178565
"""Of raw scores, in the project's vqa.py under the name FAST-VQA."""


class QualityHead(nn.Module):
    """A score of each place: (B, C, F, H, W) -> (B, 1, F, H, W)."""

    def __init__(self, channels: int, hidden: int = 64) -> None:
        super().__init__()
        self.fc_hid, self.fc_last = nn.Conv3d(channels, hidden, 1), nn.Conv3d(hidden, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Features of the backbone, (B, C, F, H, W) -> raw scores (B, 1, F, H, W)."""
        scores: Tensor = self.fc_last(functional.gelu(self.fc_hid(features)))
        return scores


class FastVQA(nn.Module):
    """Fragments (B, 3, 32, 224, 224), normalised -> raw scores (B,), the mean over places.

    Args:
        backbone: Another one than FAST-VQA-B's, for tests.
    """

    def __init__(self, backbone: Swin3D | None = None) -> None:
        super().__init__()
        self.fragments_backbone = Swin3D() if backbone is None else backbone
        self.vqa_head = QualityHead(self.fragments_backbone.features)

    def forward(self, fragments: Tensor) -> Tensor:
        """(B, 3, 32, 224, 224) as `cut_views` makes it -> raw scores (B,)."""
        scores: Tensor = self.vqa_head(self.fragments_backbone(fragments))
        return scores.mean(dim=(1, 2, 3, 4))


class VideoQuality:
    """Scores clips one by one.

    Args:
        weights: ``FAST_VQA_B_1_4.pth`` of the FAST-VQA project.
        device: Where the network runs.
        seed: Of the places of patches. Each clip is cut by a generator of its own, so clips of one size are cut alike.
        frame_interval: 1, as the project's vqa.py scores a video. Its benchmark of long videos takes 2, which shows 0, 2, 4 and 6 of 8
            frames and never the others.

    Raises:
        UserError: The weights are not here, or are not those of FAST-VQA-B.
    """

    def __init__(self, weights: Path, device: torch.device | str = "cpu", seed: int = 0, frame_interval: int = 1) -> None:
        self.device, self.seed, self.frame_interval = torch.device(device), seed, frame_interval
        self._network = FastVQA().eval().requires_grad_(False)
        load_weights(self._network, weights)
        self._network.to(self.device)

    @torch.no_grad()
    def score(self, clips: Iterable[np.ndarray]) -> np.ndarray:
        """Quality of clips, uint8 (F, H, W, 3) each, of any lengths and sizes: float64 (n,), 0..1, more is better.

        Raises:
            ValueError: Something that is no such clip.
        """
        raw = [self._network(cut_views(clip, self.seed, self.frame_interval).to(self.device)).double().mean() for clip in clips]
        scores = [torch.sigmoid((value - RAW_MEAN) / RAW_DEVIATION) for value in raw]
        return np.array([float(value) for value in scores], np.float64)

    def variant(self, num_frames: int) -> str:
        """What a score of clips of ``num_frames`` frames is made of, for people."""
        views = frames_of_views(num_frames, self.frame_interval)
        distinct = len(np.unique(views))
        shown = f"{num_frames} frames" if distinct == num_frames else f"{distinct} of {num_frames} frames"
        played = f", played over and over to {VIEW_FRAMES}" if num_frames <= (VIEW_FRAMES - 1) * self.frame_interval else ""
        return (
            f"FAST-VQA-B; {shown}{played}; {len(views)} views of 7 x 7 fragments of 32 px, smaller clips enlarged to {SIDE} px; "
            f"seed {self.seed}; sigmoid((raw {-RAW_MEAN:+.4f}) / {RAW_DEVIATION:.4f})"
        )
