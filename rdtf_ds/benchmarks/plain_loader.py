"""The loader that `rdtf_ds.benchmarks.loader` measures beside ours: what a competent user writes of well-known libraries in an afternoon.

imageio reads the frames of a clip, scikit-learn clusters them, torchvision resizes the chosen ones. It is spared all it can do without:
transparency is resolved on small frames for clustering and at full size for the chosen frames alone, and everything runs in one pass
over arrays.

Legend: F frames of a clip, k frames of a sample, S side of the square.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from rdtf_ds.errors import UserError

THUMBNAIL = 8
PEERS = ("imageio.v3", "sklearn.cluster", "torchvision.transforms.v2.functional")


def load_peers() -> tuple[Any, Any, Any]:
    """imageio.v3, sklearn.cluster and torchvision.transforms.v2.functional, none of which anything else needs.

    Raises:
        UserError: one is not installed, or torchvision does not fit torch.
    """
    try:
        return tuple(import_module(name) for name in PEERS)  # type: ignore[return-value]
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"The loader's peers cannot be imported ({error}). Type: pip install 'rdtf-ds[bench]', with torchvision from where your torch "
            "came from (0.28.0 is torch 2.13.0's, 0.25.0 torch 2.10.0's). --cached measures without them."
        ) from error


class PlainStickers(Dataset[tuple[Tensor, Tensor, str, int, Tensor]]):
    """Samples of animated stickers.

    Args:
        clips: Path and caption of each.
        size: S.
        latent: Shape (C, h, w) of the noise of a frame.
        timesteps: Of the noise schedule.
    """

    def __init__(self, clips: Sequence[tuple[Path, str]], size: int, latent: tuple[int, int, int], timesteps: int = 1000) -> None:
        self.clips, self.size, self.latent, self.timesteps = clips, size, latent, timesteps
        self._imageio, self._cluster, self._transforms = load_peers()

    def sample(self, clip: int, k: int) -> tuple[Tensor, Tensor, str, int, Tensor]:
        """k frames (3, k, S, S), which of them are given (k,), the caption, a timestep and noise (C, k, h, w)."""
        path, caption = self.clips[clip]
        frames = torch.from_numpy(self.all_frames(path)).permute(0, 3, 1, 2)  # (F, 4, H, W)
        small = on_white(self._transforms.resize(frames, [THUMBNAIL, THUMBNAIL], antialias=True))
        chosen = self._choose(small.flatten(1).numpy() / 255, k)
        shown = self._transforms.resize(on_white(frames[chosen]), [self.size, self.size], antialias=True)
        given = torch.rand(k) < 0.5
        channels, height, width = self.latent
        noise = torch.randn(channels, k, height, width)
        return shown.transpose(0, 1), given, caption, int(torch.randint(self.timesteps, ())), noise

    def __getitem__(self, clip: int) -> tuple[Tensor, Tensor, str, int, Tensor]:
        return self.sample(clip, int(torch.randint(3, 9, ())))

    def __len__(self) -> int:
        return len(self.clips)

    def all_frames(self, path: Path) -> np.ndarray:
        """uint8 (F, H, W, 4)."""
        read: np.ndarray = self._imageio.imread(path, index=..., plugin="pillow", mode="RGBA")
        return read

    def _choose(self, features: np.ndarray, k: int) -> np.ndarray:
        """The frame nearest to the middle of each of k clusters, in order of time."""
        clusters = self._cluster.KMeans(n_clusters=k).fit(features)
        return np.sort(clusters.transform(features).argmin(axis=0))


def on_white(frames: Tensor) -> Tensor:
    """uint8 (F, 4, H, W) over white: uint8 (F, 3, H, W)."""
    colour, alpha = frames[:, :3].to(torch.int32), frames[:, 3:].to(torch.int32)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).to(torch.uint8)
