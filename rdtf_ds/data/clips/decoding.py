"""Decodes animated stickers into frames: GIF, WebP and APNG with Pillow here, WebM and MP4 with decord in a child process.

Files are hostile until decoded: the format is told by content and not by suffix, the structure of the whole file is verified and
caps on bytes, pixels and frames are checked before any pixel is decoded, and :class:`ClipError` is the only exception that leaves
this module. Orientation tags (EXIF) are not applied, as animation viewers ignore them. A truncated file is broken, not shorter.

Legend: F frames of a clip, n frames of a sample, s side of a square.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from rdtf_ds.data.clips.animation import Animation, play
from rdtf_ds.data.clips.apng import read_png
from rdtf_ds.data.clips.clip import ClipError, ClipInfo, DecodeLimits, ExaminedClip, Place, Window, as_place, check_shape, letterbox
from rdtf_ds.data.clips.decoder_pool import process_pool
from rdtf_ds.data.clips.frame_features import thumbnail
from rdtf_ds.data.clips.gif import read_gif
from rdtf_ds.data.clips.headers import SNIFFED_BYTES, VIDEO_FORMATS, sniff_format
from rdtf_ds.data.clips.places import open_regular, read_place, unreadable
from rdtf_ds.data.clips.webp import read_webp
from rdtf_ds.diffusion.masks import evenly_spaced

Colour = tuple[int, int, int]

_READERS: dict[str, Callable[[bytes, int], Animation]] = {"gif": read_gif, "png": read_png, "webp": read_webp}
_WHITE = (255, 255, 255)

# Pillow warns about odd metadata and large pictures; here it is errors and our own caps that count. (A filter for good, since
# warnings.catch_warnings is not safe in threads.)
warnings.filterwarnings("ignore", module=r"PIL\.")

# glibc hands freed memory back at once, and the kernel clears it anew for every frame, until a larger block was freed once (mallopt(3),
# M_MMAP_THRESHOLD: it adapts). This block is never touched, so it costs nothing; 8 of 72 frames of a WebP then take 1 to 28 % less time.
bytearray(2**25 - 2**13)


def examine_clip(
    where: str | Path | Place, limits: DecodeLimits, background: Colour = _WHITE, describe_size: int | None = None
) -> ExaminedClip:
    """Decode every frame of a clip once and say what it is. A clip that passes can be decoded at any size.

    Args:
        background: is seen through transparency in the thumbnails.
        describe_size: side of the square frames that come along, for features other than thumbnails; None: none come.
    Raises:
        ClipError: unreadable, beyond a limit, or broken anywhere.
    """
    place = as_place(where)
    if _is_video(place):
        return process_pool().examine(place, limits, background, describe_size=describe_size)
    return examine_image(read_place(place, limits.max_bytes), place, limits, background, describe_size)


def probe_clip(where: str | Path | Place, limits: DecodeLimits) -> ClipInfo:
    """What `examine_clip` finds out about a clip, without its thumbnails."""
    return examine_clip(where, limits).info


def decode_clip(
    where: str | Path | Place,
    size: int,
    background: Colour,
    limits: DecodeLimits,
    *,
    frames: Sequence[int] | None = None,
    content: str | None = None,
    window: Window | None = None,
) -> np.ndarray:
    """Decode a clip, or some frames of it, to squares: composited on the background, fitted inside ``size`` and letterboxed with it.

    Of a clip's frames at most ``limits.max_frames`` count, evenly spread with the first and last among them: the thinned frames.

    Args:
        frames: positions among the thinned frames, in any order, repeats allowed; None: all of them.
        content: the SHA-256 that the file's bytes must have, in hex; None: any.
        window: the frames of a longer video that are the clip.
    Returns:
        uint8 (n, size, size, 3) RGB.
    Raises:
        ClipError: unreadable, changed, beyond a limit, or broken where it was looked at.
    """
    place = as_place(where)
    if _is_video(place):
        return process_pool().decode(place, size, background, limits, frames=frames, content=content, window=window)
    data = read_place(place, limits.max_bytes)
    return decode_image(data, place, size, background, limits, frames=frames, content=content)


def examine_image(
    data: bytes, where: str | Path | Place, limits: DecodeLimits, background: Colour, describe_size: int | None = None
) -> ExaminedClip:
    """`examine_clip` of the bytes of a GIF, WebP or PNG; ``where`` is for messages."""
    name = str(where)
    format, animation = _parse(data, name, limits)
    total = len(animation.patches)
    kept = set(evenly_spaced(total, min(total, limits.max_frames)).tolist())
    has_alpha = False
    thumbnails: list[np.ndarray] = []
    squares: list[np.ndarray] = []
    for number, frame in _played(animation, None, name):
        clear = frame.getchannel("A").getextrema() != (255, 255)
        has_alpha = has_alpha or clear
        if number not in kept:
            continue
        picture = Image.new("RGB", frame.size, background)
        picture.paste(frame, mask=frame if clear else None)
        thumbnails.append(thumbnail(picture))
        if describe_size is not None:
            squares.append(letterbox(picture, describe_size, background))
    durations = tuple(patch.duration_ms for patch in animation.patches)
    info = ClipInfo(format, total, animation.width, animation.height, has_alpha, durations)
    return ExaminedClip(hashlib.sha256(data).hexdigest(), info, np.stack(thumbnails), frames=np.stack(squares) if squares else None)


def decode_image(
    data: bytes,
    where: str | Path | Place,
    size: int,
    background: Colour,
    limits: DecodeLimits,
    frames: Sequence[int] | None = None,
    content: str | None = None,
) -> np.ndarray:
    """`decode_clip` of the bytes of a GIF, WebP or PNG; ``where`` is for messages. Only patches that the frames show are decoded."""
    name = str(where)
    if content is not None and hashlib.sha256(data).hexdigest() != content:
        raise ClipError(name, "has changed since it was indexed")
    _, animation = _parse(data, name, limits)
    total = len(animation.patches)
    kept = evenly_spaced(total, min(total, limits.max_frames)).tolist()
    if frames is not None and len(frames) and not 0 <= min(frames) <= max(frames) < len(kept):
        raise ClipError(name, f"has {len(kept)} frames, but frame {max(frames)} was asked for: it has changed since it was indexed")
    numbers = kept if frames is None else [kept[position] for position in frames]
    squares = {number: letterbox(frame, size, background) for number, frame in _played(animation, sorted(set(numbers)), name)}
    return np.stack([squares[number] for number in numbers])


def _is_video(place: Place) -> bool:
    """By the first bytes. Raises :class:`ClipError` for what is no clip at all."""
    descriptor = open_regular(place.path)
    try:
        start = os.pread(descriptor, SNIFFED_BYTES, place.offset)
    except OSError as error:
        raise unreadable(place, error) from error
    finally:
        os.close(descriptor)
    return _format(start if place.length is None else start[: place.length], str(place)) in VIDEO_FORMATS


def _format(start: bytes, where: str) -> str:
    if (format := sniff_format(start)) is None:
        raise ClipError(where, "not a GIF, WebP, PNG, WebM or MP4 file" if start else "empty file")
    return format


def _parse(data: bytes, where: str, limits: DecodeLimits) -> tuple[str, Animation]:
    """The file's format and patches, within the caps. Parsers of ours meet doctored files too: whatever they raise, it means the same."""
    format = _format(data, where)
    try:
        animation = _READERS[format](data, limits.max_source_frames)
    except Exception as error:
        raise ClipError(where, _reason(error)) from error
    check_shape(where, animation.width, animation.height, len(animation.patches), limits)
    areas = [(right - left) * (bottom - top) for left, top, right, bottom in (patch.box for patch in animation.patches)]
    if max(areas) > limits.max_pixels:
        raise ClipError(where, f"a frame of {max(areas)} pixels is more than rdtf.data.max_pixels ({limits.max_pixels})")
    if sum(areas) > limits.max_total_pixels:
        raise ClipError(where, f"frames of {sum(areas)} pixels in all are more than rdtf.data.max_total_pixels ({limits.max_total_pixels})")
    return format, animation


def _played(animation: Animation, wanted: Sequence[int] | None, where: str) -> Iterator[tuple[int, Image.Image]]:
    """The wanted frames as `play` shows them.

    Pillow's decoders raise OSError, SyntaxError, ValueError, DecompressionBombError and, on doctored files, nearly anything else;
    all of it means the same here. Only decoding stands inside the ``try``.
    """
    frames = play(animation, wanted)
    while True:
        try:
            number, frame = next(frames)
        except StopIteration:
            return
        except Exception as error:
            raise ClipError(where, _reason(error), transient=isinstance(error, MemoryError)) from error
        yield number, frame


def _reason(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text if isinstance(error, OSError) and len(text) > 8 else f"{type(error).__name__}: {text}"
