"""I3D, the video classifier whose logits FVD compares (Carreira and Zisserman 2017, Inception-v1 inflated; Kinetics-400).

Written to take the weights of the network's own TensorFlow release: paddings are TensorFlow's "SAME", batch norms have no scale.

Legend: B clips, C channels, F frames, H W pixels, N classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

CLASSES = 400
FEWEST_FRAMES = 9
"""Below this nothing is left for the last pooling over two time steps."""

_EPSILON = 1e-3
# Of each Inception block: 1×1; 1×1, 3×3×3; 1×1, 3×3×3; pooled 1×1.
_BLOCKS = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}


class I3D(nn.Module):
    """(B, 3, F, H, W) in [-1, 1], F ≥ 9, H = W = 224 -> logits (B, 400), the mean over time."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.ModuleDict(
            {
                "Conv3d_1a_7x7": Unit(3, 64, 7, stride=2),
                "Conv3d_2b_1x1": Unit(64, 64, 1),
                "Conv3d_2c_3x3": Unit(64, 192, 3),
            }
        )
        self.mixed = nn.ModuleDict()
        channels = 192
        for name, widths in _BLOCKS.items():
            self.mixed[name] = Inception(channels, widths)
            channels = widths[0] + widths[2] + widths[4] + widths[5]
        self.logits = nn.Conv3d(channels, CLASSES, 1)

    def forward(self, clips: Tensor) -> Tensor:
        """Raises ValueError for too few frames."""
        if clips.shape[2] < FEWEST_FRAMES:
            raise ValueError(f"I3D needs at least {FEWEST_FRAMES} frames, not {clips.shape[2]}")
        x = self.stem["Conv3d_1a_7x7"](clips)
        x = max_pool_same(x, (1, 3, 3), (1, 2, 2))
        x = self.stem["Conv3d_2c_3x3"](self.stem["Conv3d_2b_1x1"](x))
        x = max_pool_same(x, (1, 3, 3), (1, 2, 2))
        for name, block in self.mixed.items():
            if name == "Mixed_4b":
                x = max_pool_same(x, (3, 3, 3), (2, 2, 2))
            elif name == "Mixed_5b":
                x = max_pool_same(x, (2, 2, 2), (2, 2, 2))
            x = block(x)
        x = functional.avg_pool3d(x, (2, 7, 7), stride=1)
        averaged: Tensor = self.logits(x).mean(dim=(2, 3, 4))
        return averaged


class Unit(nn.Module):
    """Convolution, batch norm without scale, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride, bias=False)
        for name in ("mean", "variance", "bias"):
            self.register_buffer(name, torch.zeros(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F, H, W) -> (B, out_channels, ⌈F / stride⌉, ⌈H / stride⌉, ⌈W / stride⌉), never negative."""
        x = self.conv(pad_same(x, self.conv.kernel_size, self.conv.stride))
        scale = torch.rsqrt(self.variance + _EPSILON)
        return functional.relu((x - _per_channel(self.mean)) * _per_channel(scale) + _per_channel(self.bias))


class Inception(nn.Module):
    """Four branches over one input, joined along the channels."""

    def __init__(self, channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.branches = nn.ModuleDict(
            {
                "Branch_0/Conv3d_0a_1x1": Unit(channels, widths[0], 1),
                "Branch_1/Conv3d_0a_1x1": Unit(channels, widths[1], 1),
                "Branch_1/Conv3d_0b_3x3": Unit(widths[1], widths[2], 3),
                "Branch_2/Conv3d_0a_1x1": Unit(channels, widths[3], 1),
                "Branch_2/Conv3d_0b_3x3": Unit(widths[3], widths[4], 3),
                "Branch_3/Conv3d_0b_1x1": Unit(channels, widths[5], 1),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F, H, W) -> the same with ``widths`` 0, 2, 4 and 5 as channels, in this order."""
        branch = self.branches
        return torch.cat(
            [
                branch["Branch_0/Conv3d_0a_1x1"](x),
                branch["Branch_1/Conv3d_0b_3x3"](branch["Branch_1/Conv3d_0a_1x1"](x)),
                branch["Branch_2/Conv3d_0b_3x3"](branch["Branch_2/Conv3d_0a_1x1"](x)),
                branch["Branch_3/Conv3d_0b_1x1"](max_pool_same(x, (3, 3, 3), (1, 1, 1))),
            ],
            dim=1,
        )


def pad_same(x: Tensor, kernel: Sequence[int], stride: Sequence[int], value: float = 0.0) -> Tensor:
    """TensorFlow's "SAME": ceil(n / stride) outputs, the odd element of padding at the end."""
    padding: list[int] = []
    for size, width, step in zip(x.shape[:1:-1], kernel[::-1], stride[::-1], strict=True):  # functional.pad goes from the last axis
        total = max((-(-size // step) - 1) * step + width - size, 0)
        padding += [total // 2, total - total // 2]
    return functional.pad(x, padding, value=value)


def max_pool_same(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    """Largest of each window, (B, C, F, H, W) -> ⌈n / stride⌉ along F, H, W; padded as `pad_same` says, by −∞, which never is it."""
    return functional.max_pool3d(pad_same(x, kernel, stride, float("-inf")), kernel, stride)


def _per_channel(values: Tensor) -> Tensor:
    return values[:, None, None, None]
