"""Decodes animated stickers into frames: GIF, WebP and APNG with Pillow here, WebM and MP4 with decord in a child process.

Files are hostile until decoded: the format is told by content and not by suffix, caps on bytes, pixels and frames are checked
against the container's own headers before any decoding, and :class:`ClipError` is the only exception that leaves this module.
Orientation tags (EXIF) are not applied, as animation viewers ignore them. A truncated file is broken, not shorter.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from rdtf_ds.data.apng import apng_frames
from rdtf_ds.data.clip import ClipError, ClipInfo, DecodeLimits, check_shape, letterbox
from rdtf_ds.data.gif import gif_frames
from rdtf_ds.data.headers import VIDEO_FORMATS, Header, read_header
from rdtf_ds.data.video import child_reader
from rdtf_ds.diffusion.masks import evenly_spaced

# Pillow warns about odd metadata and large pictures; here it is errors and our own caps that count. (A filter for good, since
# warnings.catch_warnings is not safe in threads.)
warnings.filterwarnings("ignore", module=r"PIL\.")


def probe_clip(path: str | Path, limits: DecodeLimits) -> ClipInfo:
    """Decode every frame of a clip once, keep none, and say what it is. A clip that passes can be decoded at any size.

    Raises:
        ClipError: unreadable, beyond a limit, or broken anywhere.
    """
    path = Path(path)
    data, header = _read(path, limits)
    if header.format in VIDEO_FORMATS:
        return child_reader().probe(path, limits)
    durations: list[int] = []
    has_alpha, size = False, (0, 0)
    for frame, duration in _pillow_frames(path, data, header):
        durations.append(duration)
        size = frame.size
        has_alpha = has_alpha or frame.getchannel("A").getextrema() != (255, 255)
    return ClipInfo(header.format, len(durations), size[0], size[1], has_alpha, tuple(durations))


def decode_clip(path: str | Path, size: int, background: tuple[int, int, int], limits: DecodeLimits) -> np.ndarray:
    """Decode a clip to square frames: composited on the background colour, fitted inside ``size`` and letterboxed with it.

    At most ``limits.max_frames`` frames are kept, evenly spread with the first and last among them; only kept frames are held.

    Returns:
        uint8 (F, size, size, 3) RGB.
    Raises:
        ClipError: unreadable, beyond a limit, or broken anywhere.
    """
    path = Path(path)
    data, header = _read(path, limits)
    if header.format in VIDEO_FORMATS:
        return child_reader().decode(path, size, background, limits)
    total = _count_frames(path, data, header, limits)
    wanted = set(evenly_spaced(total, min(total, limits.max_frames)).tolist())
    kept = [
        letterbox(frame, size, background)
        for number, (frame, _) in enumerate(_pillow_frames(path, data, header))
        if number in wanted
    ]
    return np.stack(kept)


def _read(path: Path, limits: DecodeLimits) -> tuple[bytes, Header]:
    """The file's bytes (empty for a video: the child reads it) and its header, within the caps."""
    try:
        num_bytes = path.stat().st_size
        if num_bytes > limits.max_bytes:
            raise ClipError(path, f"{num_bytes} bytes are more than rdtf.data.max_bytes ({limits.max_bytes})")
        data = path.read_bytes()
    except OSError as error:
        raise ClipError(path, f"cannot be read: {error.strerror or error}") from error
    header = read_header(data)
    if header is None:
        raise ClipError(path, "empty file" if not data else "not a GIF, WebP, PNG, WebM or MP4 file")
    if header.format in VIDEO_FORMATS:
        return b"", header
    if header.largest > limits.max_pixels:
        raise ClipError(path, f"a frame of {header.largest} pixels is more than rdtf.data.max_pixels ({limits.max_pixels})")
    check_shape(path, header.width, header.height, header.num_frames, limits)
    return data, header


def _open(data: bytes, header: Header) -> Image.Image:
    return Image.open(BytesIO(data), formats=[header.format.upper()])


def _count_frames(path: Path, data: bytes, header: Header, limits: DecodeLimits) -> int:
    if header.format == "gif":
        return header.num_frames
    try:
        with _open(data, header) as image:
            total = _frames_of(image)
    except Exception as error:
        raise ClipError(path, _reason(error)) from error
    check_shape(path, header.width, header.height, total, limits)
    return total


def _pillow_frames(path: Path, data: bytes, header: Header) -> Iterator[tuple[Image.Image, int]]:
    """Every frame as shown (RGBA, full canvas, disposed and blended) with its duration in ms.

    Pillow's parsers raise OSError, SyntaxError, ValueError, DecompressionBombError and, on doctored files, nearly anything else;
    all of it means the same here. Only Pillow's calls stand inside the ``try``.
    """
    frames = gif_frames(data) if header.format == "gif" else _animation_frames(data, header)
    while True:
        try:
            frame, duration = next(frames)
        except StopIteration:
            return
        except Exception as error:
            raise ClipError(path, _reason(error)) from error
        yield frame, duration


def _animation_frames(data: bytes, header: Header) -> Iterator[tuple[Image.Image, int]]:
    """A WebP, an APNG or a still picture, which is one frame."""
    with _open(data, header) as image:
        total = _frames_of(image)
        if header.format == "png" and getattr(image, "is_animated", False):
            yield from apng_frames(data, total)
            return
        for number in range(total):
            image.seek(number)
            yield image.convert("RGBA"), round(image.info.get("duration", 0))


def _frames_of(image: Image.Image) -> int:
    """Frames of the animation; an APNG's default image, for viewers that cannot animate, is none of them."""
    return getattr(image, "n_frames", 1) - bool(getattr(image, "default_image", False))


def _reason(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text if isinstance(error, OSError) and len(text) > 8 else f"{type(error).__name__}: {text}"
