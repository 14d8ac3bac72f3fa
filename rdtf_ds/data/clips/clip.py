"""What is known of one clip, what is allowed of it, what is wrong with it, and how its frames fit into a square."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image


class ClipError(Exception):
    """One clip cannot be used. ``str()`` is the path and the reason, a short phrase for people.

    Args:
        transient: It may be the machine's fault and not the clip's (a missed deadline, no memory): worth another try another day.
    """

    def __init__(self, path: str | Path | Place, reason: str, transient: bool = False) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason, self.transient = str(path), reason, transient

    def __reduce__(self) -> tuple[type[ClipError], tuple[str, str, bool]]:
        return ClipError, (self.path, self.reason, self.transient)  # crosses process borders


@dataclass(frozen=True, slots=True)
class Place:
    """Where the bytes of a clip lie: a whole file, or ``length`` bytes from ``offset`` of a tar shard."""

    path: Path
    offset: int = 0
    length: int | None = None

    def __str__(self) -> str:
        return str(self.path) if self.length is None else f"{self.path}@{self.offset}"


def as_place(where: str | Path | Place) -> Place:
    """A path is the whole file."""
    return where if isinstance(where, Place) else Place(Path(where))


@dataclass(frozen=True, slots=True)
class Window:
    """The frames of a long video that are one clip: ``count`` of them from frame ``first``."""

    first: int
    count: int


@dataclass(frozen=True, slots=True)
class VideoLength:
    """How long a video says it is."""

    frames: int
    seconds: float


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """Caps of one clip; a clip beyond any but ``max_frames`` is refused before it is decoded.

    Attributes:
        max_pixels: of one frame's canvas.
        max_frames: frames kept, evenly thinned.
        max_source_frames: frames in the file.
        max_bytes: of the file.
        max_total_pixels: canvas pixels times frames, which bounds decoding to some seconds.
        timeout_s: for one video in the child process.
    """

    max_pixels: int = 4096 * 4096
    max_frames: int = 128
    max_source_frames: int = 3000
    max_bytes: int = 64 * 2**20
    max_total_pixels: int = 256 * 2**20
    timeout_s: float = 20.0


@dataclass(frozen=True, slots=True)
class ClipInfo:
    """What a clip is: ``num_frames`` counts the file's frames, before thinning; videos are opaque (decord drops alpha)."""

    format: str
    num_frames: int
    width: int
    height: int
    has_alpha: bool
    durations_ms: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ExaminedClip:
    """All that is known of a clip once every frame of it was decoded.

    Attributes:
        content: SHA-256 of its bytes, in hex; of a window, over that of the file and where the window lies.
        thumbnails: uint8 (F, D) of its thinned frames, see `frame_features.thumbnail`.
        window: Which frames of a longer video it is.
        frames: uint8 (F, s, s, 3), the thinned frames letterboxed, if they were asked for.
    """

    content: str
    info: ClipInfo
    thumbnails: np.ndarray
    window: Window | None = None
    frames: np.ndarray | None = None


def letterbox(frame: Image.Image, size: int, background: tuple[int, int, int]) -> np.ndarray:
    """Composite an RGB or RGBA picture on the background and fit it, centred, into a square: uint8 (size, size, 3).

    Alpha is resolved before resizing, so that colours under transparent pixels cannot bleed in. Resizing is bicubic with antialiasing.
    """
    canvas = Image.new("RGB", frame.size, background)
    canvas.paste(frame, mask=frame.getchannel("A") if frame.mode == "RGBA" else None)
    scale = size / max(frame.size)
    inner = (max(1, round(frame.width * scale)), max(1, round(frame.height * scale)))
    if inner != frame.size:
        canvas = canvas.resize(inner, Image.Resampling.BICUBIC)
    if inner == (size, size):
        return np.asarray(canvas)
    square = Image.new("RGB", (size, size), background)
    square.paste(canvas, ((size - inner[0]) // 2, (size - inner[1]) // 2))
    return np.asarray(square)


def check_shape(path: str | Path | Place, width: int, height: int, num_frames: int, limits: DecodeLimits) -> None:
    """Raise :class:`ClipError` for an empty canvas or no frames, or for one beyond the limits."""
    if min(width, height) < 1 or num_frames < 1:
        raise ClipError(path, f"empty: {num_frames} frames of {width}×{height} pixels")
    if width * height > limits.max_pixels:
        raise ClipError(path, f"{width}×{height} pixels are more than rdtf.data.max_pixels ({limits.max_pixels})")
    if num_frames > limits.max_source_frames:
        raise ClipError(path, f"{num_frames} frames are more than rdtf.data.max_source_frames ({limits.max_source_frames})")
    if width * height * num_frames > limits.max_total_pixels:
        total = f"rdtf.data.max_total_pixels ({limits.max_total_pixels})"
        raise ClipError(path, f"{num_frames} frames of {width}×{height} pixels are more than {total}")
