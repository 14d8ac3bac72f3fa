"""Video Swin Transformer (Liu et al. 2022), tiny, with the gated position biases that FAST-VQA adds (Wu et al. 2022, section 3.3).

Tokens of two frames and 4 × 4 pixels attend to each other within windows, which every other block shifts by half a window. In a picture
of fragments, tokens close to each other may come from far apart, so there are two tables of position biases: one for tokens of one
fragment, one for tokens of two. Names of modules are those of the project's weight files.

Legend: B clips, C channels, F H W tokens along time, height and width, n windows of N tokens, h heads, d channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor, nn

FRAGMENTS = 7
"""Fragments along height and width; time has one."""
_FORBIDDEN = -100.0
_TOKENS, _WINDOWS = "b (nf f) (nh h) (nw w) c", "b (nf nh nw) (f h w) c"

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Windows:
    """How a grid of tokens is split.

    Attributes:
        grid: F, H, W.
        window: Its size along each; never more than the grid.
        shift: By how much the grid is rolled first; 0 along an axis that one window covers.
    """

    grid: Grid
    window: Grid
    shift: Grid

    @classmethod
    def fit(cls, grid: Sequence[int], window: Sequence[int], shifted: bool) -> Windows:
        """Windows of this size, or of the grid's where that is smaller."""
        sizes = tuple(zip(grid, window, strict=True))
        shift = tuple(wanted // 2 if shifted and length > wanted else 0 for length, wanted in sizes)
        return cls(_grid(grid), _grid(min(size) for size in sizes), _grid(shift))

    @property
    def padded(self) -> Grid:
        """The grid filled up to whole windows."""
        return _grid(-(-length // size) * size for length, size in zip(self.grid, self.window, strict=True))

    def split(self, tokens: Tensor) -> Tensor:
        """(B, F, H, W, C) -> (B, n, N, C); what fills up is zero."""
        missing = [whole - length for whole, length in zip(self.padded, self.grid, strict=True)]
        tokens = functional.pad(tokens, (0, 0, 0, missing[2], 0, missing[1], 0, missing[0]))
        return self._split_padded(torch.roll(tokens, [-shift for shift in self.shift], (1, 2, 3)))

    def join(self, windows: Tensor) -> Tensor:
        """(B, n, N, C) -> (B, F, H, W, C), the way back."""
        counts = {f"n{axis}": whole // size for axis, whole, size in zip("fhw", self.padded, self.window, strict=True)}
        tokens = rearrange(windows, f"{_WINDOWS} -> {_TOKENS}", **counts, **self._lengths)
        frames, height, width = self.grid
        return torch.roll(tokens, self.shift, (1, 2, 3))[:, :frames, :height, :width]

    def fragment_distance(self, device: torch.device) -> Tensor:
        """Of each pair of tokens, how many fragments lie from one's to the other's, down and across: float32 (n, N, N)."""
        frames, height, width = self.padded
        down, across = (torch.arange(length, device=device) * FRAGMENTS // length for length in (height, width))
        places = torch.stack(torch.meshgrid(down, across, indexing="ij"), dim=-1)
        places = torch.roll(places, [-self.shift[1], -self.shift[2]], (0, 1)).expand(1, frames, -1, -1, -1)
        inside = self._split_padded(places)[0].float()  # (n, N, 2)
        return torch.cdist(inside, inside, p=1)

    def separated(self, device: torch.device) -> Tensor | None:
        """Pairs that a shift brought into one window from opposite ends of the grid: bool (n, N, N); None without a shift."""
        if not any(self.shift):
            return None
        sides = []
        for length, shift in zip(self.padded, self.shift, strict=True):
            wrapped = torch.arange(length, device=device) >= length - shift
            sides.append(wrapped if shift else torch.zeros_like(wrapped))
        frames, height, width = torch.meshgrid(*sides, indexing="ij")
        corner = (frames * 4 + height * 2 + width).to(torch.uint8)
        inside = self._split_padded(corner[None, ..., None])[0, :, :, 0]  # (n, N)
        return inside[:, :, None] != inside[:, None]

    @property
    def _lengths(self) -> dict[str, int]:
        return dict(zip("fhw", self.window, strict=True))

    def _split_padded(self, tokens: Tensor) -> Tensor:
        return rearrange(tokens, f"{_TOKENS} -> {_WINDOWS}", **self._lengths)


def _grid(lengths: Iterable[int]) -> Grid:
    frames, height, width = lengths
    return frames, height, width


class WindowAttention(nn.Module):
    """Attention within windows, with biases by relative position.

    Args:
        channels: C, divisible by ``heads``.
        window: The largest window; the tables cover its relative positions.
        gated: Whether there is a second table, for tokens of one fragment.
    """

    def __init__(self, channels: int, heads: int, window: Grid, gated: bool) -> None:
        super().__init__()
        self.heads, self.gated = heads, gated
        positions = math.prod(2 * length - 1 for length in window)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(positions, heads))
        if gated:
            self.fragment_position_bias_table = nn.Parameter(torch.zeros(positions, heads))
        self.rows: Tensor
        self.register_buffer("rows", table_rows(window), persistent=False)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor, windows: Windows) -> Tensor:
        """(B, n, N, C) of ``windows`` -> the same."""
        count = tokens.shape[1]
        query, key, value = rearrange(self.qkv(tokens), "b n t (three h d) -> three b (n h) t d", three=3, h=self.heads)
        biases = self.biases(windows).expand(count, -1, -1, -1).flatten(0, 1)
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=biases[None])
        mixed: Tensor = self.proj(rearrange(attended, "b (n h) t d -> b n t (h d)", h=self.heads))
        return mixed

    def biases(self, windows: Windows) -> Tensor:
        """What is added to the logits: (n, h, N, N), or (1, h, N, N) where all windows have the same."""
        size = math.prod(windows.window)
        # A window smaller than the tables takes their first rows, as the original does, also where it is narrower and not just shorter.
        rows = self.rows[:size, :size]
        device = rows.device
        biases = _by_heads(self.relative_position_bias_table[rows])
        if self.gated:
            # Wu et al. 2022, equation 5, as trained: the gate is the distance in fragments, and goes on beyond 1.
            within = _by_heads(self.fragment_position_bias_table[rows])
            biases = torch.lerp(within, biases, windows.fragment_distance(device)[:, None].to(within.dtype))
        separated = windows.separated(device)
        return biases if separated is None else biases + _FORBIDDEN * separated[:, None]


def _by_heads(biases: Tensor) -> Tensor:
    return rearrange(biases, "q k h -> 1 h q k").contiguous()


def table_rows(window: Grid) -> Tensor:
    """The row of each relative position in a table of biases: int64 (N, N), by query and key."""
    places = torch.cartesian_prod(*(torch.arange(length) for length in window))  # (N, 3)
    steps = places[:, None] - places + torch.tensor(window) - 1
    _, height, width = (2 * length - 1 for length in window)
    return steps @ torch.tensor([height * width, width, 1])


class MLP(nn.Module):
    """Two linear layers, four times as wide between."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., C) -> (..., C), with a GELU between the layers."""
        widened: Tensor = self.fc2(functional.gelu(self.fc1(tokens)))
        return widened


class Block(nn.Module):
    """Attention within windows, then an MLP, each on normalised tokens and added to them."""

    def __init__(self, channels: int, heads: int, window: Grid, shifted: bool, gated: bool) -> None:
        super().__init__()
        self.window, self.shifted = window, shifted
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attn, self.mlp = WindowAttention(channels, heads, window, gated), MLP(channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, F, H, W, C) -> the same."""
        windows = Windows.fit(tokens.shape[1:4], self.window, self.shifted)
        # Normalised before it is filled up: what fills up is zero, not a norm's bias.
        tokens = tokens + windows.join(self.attn(windows.split(self.norm1(tokens)), windows))
        mixed: Tensor = tokens + self.mlp(self.norm2(tokens))
        return mixed


class Merging(nn.Module):
    """2 × 2 tokens become one of twice the channels: (B, F, H, W, C) -> (B, F, ⌈H/2⌉, ⌈W/2⌉, 2C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * channels), nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, F, H, W, C) -> (B, F, ⌈H/2⌉, ⌈W/2⌉, 2C): odd sides are filled up with zeros, the four joined column by column."""
        height, width = tokens.shape[2:4]
        even = functional.pad(tokens, (0, 0, 0, width % 2, 0, height % 2))
        merged: Tensor = self.reduction(self.norm(rearrange(even, "b f (h i) (w j) c -> b f h w (j i c)", i=2, j=2)))
        return merged


class Stage(nn.Module):
    """Blocks in turn plain and shifted, then a merging unless it is the last."""

    def __init__(self, channels: int, depth: int, heads: int, window: Grid, gated: bool, last: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(channels, heads, window, number % 2 == 1, gated) for number in range(depth))
        self.downsample = None if last else Merging(channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, F, H, W, C) -> what `Merging` makes of it, or the same shape in the last stage."""
        for block in self.blocks:
            tokens = block(tokens)
        return tokens if self.downsample is None else self.downsample(tokens)


class PatchEmbedding(nn.Module):
    """Pixels become tokens, filled up with zeros at the ends: (B, 3, frames, height, width) -> (B, F, H, W, C)."""

    def __init__(self, channels: int, patch: Grid) -> None:
        super().__init__()
        self.patch = patch
        self.proj, self.norm = nn.Conv3d(3, channels, patch, patch), nn.LayerNorm(channels)

    def forward(self, clips: Tensor) -> Tensor:
        """(B, 3, frames, height, width) -> (B, F, H, W, C), a token for each patch, the filled-up ones included."""
        missing = [-length % size for length, size in zip(clips.shape[2:], self.patch, strict=True)]
        tokens = self.proj(functional.pad(clips, (0, missing[2], 0, missing[1], 0, missing[0])))
        normed: Tensor = self.norm(rearrange(tokens, "b c f h w -> b f h w c"))
        return normed


class Swin3D(nn.Module):
    """The backbone: (B, 3, frames, height, width) -> (B, 8C, F, H, W), each side a 32nd of the picture's, half as many frames.

    Args:
        channels: C of the first stage; each merging doubles them.
        depths, heads: Of each stage; ``channels`` must be divisible by the first stage's heads.
        gated: Stages whose biases know fragments.
    """

    def __init__(
        self,
        channels: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        window: Grid = (8, 7, 7),
        patch: Grid = (2, 4, 4),
        gated: Sequence[bool] = (True, True, True, False),
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbedding(channels, patch)
        last = len(depths) - 1
        self.layers = nn.ModuleList(
            Stage(channels * 2**number, depth, heads[number], window, gated[number], number == last) for number, depth in enumerate(depths)
        )
        self.features = channels * 2**last
        self.norm = nn.LayerNorm(self.features)

    def forward(self, clips: Tensor) -> Tensor:
        """Clips (B, 3, frames, height, width), normalised -> (B, `features`, F, H, W)."""
        tokens = self.patch_embed(clips)
        for stage in self.layers:
            tokens = stage(tokens)
        features: Tensor = self.norm(tokens)
        return rearrange(features, "b f h w c -> b c f h w")
