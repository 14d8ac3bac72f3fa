"""Plays a GIF as browsers do: frame patches decoded by Pillow one by one, disposed and composited here (GIF89a, W3C).

Pillow's own player fills a disposed area with the palette's background colour when a frame declares no transparency; viewers and
FFmpeg clear it to transparent, as every player does since the nineties.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image

from rdtf_ds.data.headers import read_header

_DISPOSE_BACKGROUND, _DISPOSE_PREVIOUS = 2, 3
_EXTENSION, _IMAGE, _TRAILER, _GRAPHIC_CONTROL = 0x21, 0x2C, 0x3B, 0xF9
_PIXEL = np.uint32  # red, green, blue, alpha in memory; an opaque pixel is never 0
_GREY_PALETTE = bytes(value for grey in range(256) for value in (grey, grey, grey))


@dataclass(frozen=True, slots=True)
class _Control:
    """A graphic control extension: how the next image is drawn, shown and taken away."""

    disposal: int = 0
    duration_ms: int = 0
    transparent_index: int | None = None


def gif_frames(data: bytes) -> Iterator[tuple[Image.Image, int]]:
    """Every frame as shown, RGBA on the full canvas, with its duration in ms.

    Raises:
        ValueError, OSError: the data are cut short or are no GIF.
    """
    header = read_header(data)
    if header is None or header.format != "gif":
        raise ValueError("not a GIF")
    canvas = np.zeros((header.height, header.width), _PIXEL)
    for control, left, top, patch in _patches(data):
        area = canvas[top : top + patch.shape[0], left : left + patch.shape[1]]  # clipped to the canvas
        patch = patch[: area.shape[0], : area.shape[1]]
        before = area.copy() if control.disposal == _DISPOSE_PREVIOUS else None
        np.copyto(area, patch, where=patch != 0)
        yield Image.fromarray(canvas.copy().view(np.uint8).reshape(*canvas.shape, 4)), control.duration_ms
        if control.disposal == _DISPOSE_BACKGROUND:
            area[:] = 0
        elif before is not None:
            area[:] = before


def _patches(data: bytes) -> Iterator[tuple[_Control, int, int, np.ndarray]]:
    """Each image block: its control, left and top on the canvas, and its pixels (H, W), 0 where it is transparent."""
    flags = data[10]
    palette_end = 13 + _palette_bytes(flags)
    global_palette, at = data[13:palette_end], palette_end
    control = _Control()
    while at < len(data) and data[at] != _TRAILER:
        if data[at] == _EXTENSION:
            if data[at + 1] == _GRAPHIC_CONTROL and data[at + 2] == 4:
                packed, delay, index = struct.unpack_from("<BHB", data, at + 3)
                control = _Control(packed >> 2 & 7, delay * 10, index if packed & 1 else None)
            at = _skip_sub_blocks(data, at + 2)
        elif data[at] == _IMAGE:
            left, top, width, height, flags = struct.unpack_from("<HHHHB", data, at + 1)
            palette_end = at + 10 + _palette_bytes(flags)
            palette = data[at + 10 : palette_end] or global_palette or _GREY_PALETTE
            end = _skip_sub_blocks(data, palette_end + 1)
            pixels = _decode_patch(width, height, flags & 0x40, palette, data[palette_end:end], control.transparent_index)
            yield control, left, top, pixels
            control, at = _Control(), end
        else:
            at += 1  # stray bytes between blocks are skipped, as decoders do


def _decode_patch(width: int, height: int, interlaced: int, palette: bytes, pixels: bytes, transparent_index: int | None) -> np.ndarray:
    """One image block, decoded by Pillow from a GIF that holds nothing else."""
    bits = max((len(palette) // 3 - 1).bit_length(), 1)
    size = struct.pack("<HH", width, height)
    still = b"GIF89a" + size + bytes([0x80 | bits - 1, 0, 0]) + palette.ljust(3 << bits, b"\0")
    still += b"\x2c\0\0\0\0" + size + bytes([interlaced]) + pixels + b"\x3b"
    colours = np.full((256, 4), 255, np.uint8)
    colours[:, :3] = np.frombuffer(palette.ljust(768, b"\0"), np.uint8).reshape(256, 3)
    if transparent_index is not None:
        colours[transparent_index] = 0
    with Image.open(BytesIO(still), formats=["GIF"]) as image:
        return colours.view(_PIXEL)[:, 0].take(np.asarray(image))


def _palette_bytes(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _skip_sub_blocks(data: bytes, at: int) -> int:
    """The offset after a chain of sub-blocks that starts at ``at``."""
    while at < len(data):
        if data[at] == 0:
            return at + 1
        at += data[at] + 1
    raise OSError("file is truncated inside a frame")
