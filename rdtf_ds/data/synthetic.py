"""Captioned stickers made on the spot: a flat shape in one colour, moving in one way, on a transparent background.

The demo trains on these and a judge reads colour and motion back from what the model draws
(:mod:`rdtf_ds.evaluation.sticker_match`), so the six colours are the corners of the hue circle, 60 degrees apart,
and every motion spans its whole clip: any few frames of it in order still show it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from rdtf_ds.data.clips.writing import write_clip
from rdtf_ds.seeding import numpy_generator

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (230, 40, 40),
    "yellow": (240, 215, 30),
    "green": (40, 190, 50),
    "cyan": (30, 200, 220),
    "blue": (45, 60, 230),
    "magenta": (225, 45, 205),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "heart", "diamond")
MOTIONS: tuple[str, ...] = ("slides left", "slides right", "rises", "falls", "grows", "shrinks")

_PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
# Two diagonals of the colour x shape table: each colour and each shape stays in training with at least four partners.
HELD_OUT: frozenset[tuple[str, str]] = frozenset(
    (colour, SHAPES[(row + step) % 6]) for row, colour in enumerate(COLOURS) for step in (2, 5) if step == 2 or row % 2 == 0
)

MIN_FRAMES, MAX_FRAMES = 3, 48
_TAIL = 1.5  # P(F) ~ F^-1.5: a long tail as in the paper's Figure 3; mean 12 frames
_OVERSAMPLING = 4  # edges are drawn four times larger and averaged
_FORMATS = {".gif": 0.45, ".webp": 0.25, ".png": 0.24, ".webm": 0.03, ".mp4": 0.03}
_OPAQUE = {".webm", ".mp4"}


@dataclass(frozen=True)
class Sticker:
    """What one clip shows."""

    colour: str
    shape: str
    motion: str

    @property
    def caption(self) -> str:
        """For example ``a red circle slides right``."""
        return f"a {self.colour} {self.shape} {self.motion}"

    @property
    def held_out(self) -> bool:
        """Whether the colour x shape pair is kept out of training."""
        return (self.colour, self.shape) in HELD_OUT


def all_stickers(*, held_out: bool) -> list[Sticker]:
    """Every colour x shape x motion whose pair is held out of training, or every one that is not."""
    pairs = [pair for pair in _PAIRS if (pair in HELD_OUT) == held_out]
    return [Sticker(colour, shape, motion) for colour, shape in pairs for motion in MOTIONS]


def write_stickers(
    out: str | Path, count: int, seed: int, size: int = 64, *, held_out: bool = False, suffixes: Sequence[str] = tuple(_FORMATS)
) -> None:
    """Writes ``count`` clips and ``metadata.jsonl`` (``file_name``, ``text``) into the folder ``out``.

    Clip i depends on ``seed`` and i alone; attributes are balanced: every (pair, motion) once before any comes twice.

    Args:
        size: side of the square frames in pixels.
        held_out: draw the pairs kept out of training instead of the training pairs.
        suffixes: formats to draw from, out of .gif .webp .png (APNG) .webm .mp4; their relative shares stay.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    stickers = all_stickers(held_out=held_out)
    shares = np.array([_FORMATS[suffix] for suffix in suffixes])
    lines = []
    for number in range(count):
        round_number, place = divmod(number, len(stickers))
        order = numpy_generator(seed, "sticker order", round_number).permutation(len(stickers))
        sticker = stickers[order[place]]
        rng = numpy_generator(seed, "sticker", number)
        suffix = suffixes[rng.choice(len(suffixes), p=shares / shares.sum())]
        frames = render(sticker, draw_frame_count(rng), size, rng)
        name = f"{number:05d}{suffix}"
        delay = int(np.clip(rng.normal(1200 / len(frames), 20), 20, 200)) // 10 * 10  # GIF counts hundredths of a second
        write_clip(on_white(frames) if suffix in _OPAQUE else frames, folder / name, [delay] * len(frames))
        lines.append(json.dumps({"file_name": name, "text": sticker.caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n" if lines else "", encoding="utf-8")


def draw_frame_count(rng: np.random.Generator) -> int:
    """A frame count in 3..48 with P(F) ~ F^-1.5."""
    counts = np.arange(MIN_FRAMES, MAX_FRAMES + 1)
    weights = counts**-_TAIL
    return int(rng.choice(counts, p=weights / weights.sum()))


def render(sticker: Sticker, num_frames: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draws a clip: uint8 (F, size, size, 4), straight alpha, anti-aliased; place and size are jittered by ``rng``."""
    outline = _outline(sticker.shape)
    frames = np.empty((num_frames, size, size, 4), np.uint8)
    frames[..., :3] = COLOURS[sticker.colour]
    for frame, (x, y, radius) in zip(frames, _trajectory(sticker.motion, num_frames, rng), strict=True):
        scale = size * _OVERSAMPLING
        points = (outline * radius + (x, y)) * scale
        canvas = Image.new("L", (scale, scale))
        ImageDraw.Draw(canvas).polygon([(float(px), float(py)) for px, py in points], fill=255)
        frame[..., 3] = np.asarray(canvas.reduce(_OVERSAMPLING))
    return frames


def on_white(frames: np.ndarray) -> np.ndarray:
    """Composites uint8 (F, H, W, 4) with straight alpha on white: uint8 (F, H, W, 3)."""
    alpha = frames[..., 3:].astype(np.float32) / 255
    return np.rint(frames[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def _trajectory(motion: str, num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """(F, 3): centre x, y (down) and radius of each frame, as shares of the side; the shape never leaves the picture."""
    time = np.linspace(0.0, 1.0, num_frames)
    if motion in ("grows", "shrinks"):
        large = rng.uniform(0.36, 0.42)
        radius = large * np.interp(time, [0, 1], [0.35, 1.0])
        x, y = 0.5 + rng.uniform(-0.05, 0.05, size=2)
        return np.stack([np.full(num_frames, x), np.full(num_frames, y), radius[:: 1 if motion == "grows" else -1]], axis=1)
    radius = np.full(num_frames, rng.uniform(0.19, 0.23))
    travel = rng.uniform(0.46, 0.52)
    along = 0.5 + rng.uniform(-0.01, 0.01) + travel * (time - 0.5)
    across = np.full(num_frames, 0.5 + rng.uniform(-0.05, 0.05))
    if motion in ("slides left", "rises"):
        along = along[::-1]
    centre = (along, across) if motion.startswith("slides") else (across, along)
    return np.stack([*centre, radius], axis=1)


def _outline(shape: str) -> np.ndarray:
    """Corners (N, 2) of a shape in the unit circle around the origin, y down."""
    if shape == "heart":
        t = np.linspace(0, 2 * math.pi, 60, endpoint=False)
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return np.stack([16 * np.sin(t) ** 3, -y - 2.5], axis=1) / 17
    polygons = {"circle": (48, 0.0), "square": (4, 45.0), "triangle": (3, -90.0), "star": (10, -90.0), "diamond": (4, 0.0)}
    corners, first_angle = polygons[shape]
    angle = np.radians(first_angle) + np.arange(corners) * 2 * math.pi / corners
    points = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    if shape == "star":
        points[1::2] *= 0.45
    if shape == "diamond":
        points[:, 0] *= 0.7  # narrower than a square on its corner
    return points
