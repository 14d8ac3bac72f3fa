"""Reads a GIF into patches, each decoded by Pillow from a GIF that holds nothing else (GIF89a, W3C).

They are played as browsers do: a disposed area becomes transparent. Pillow's own player fills it with the palette's background
colour when a frame declares no transparency, and so does FFmpeg.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from io import BytesIO

import numpy as np
from PIL import Image

from rdtf_ds.data.clips.animation import Animation, Disposal, Patch, leaves_blank

_DISPOSALS = {2: Disposal.CLEAR, 3: Disposal.RESTORE}  # all others keep
_EXTENSION, _IMAGE, _TRAILER, _GRAPHIC_CONTROL = 0x21, 0x2C, 0x3B, 0xF9
_BLOCK = re.compile(rb"[\x21\x2c\x3b]")  # what a block begins with; stray bytes in between are skipped, as decoders do
_GREY_PALETTE = bytes(value for grey in range(256) for value in (grey, grey, grey))
_MOST_BYTES_A_PIXEL = 4  # a code and a clear code of 12 bits each, in blocks of a few bytes


@dataclass(frozen=True, slots=True)
class _Control:
    """A graphic control extension: how the next image is drawn, shown and taken away."""

    disposal: Disposal = Disposal.KEEP
    duration_ms: int = 0
    transparent_index: int | None = None


@dataclass(frozen=True, slots=True)
class _Block:
    """An image block: its palette and pixels are ``start``..``stop`` of the file."""

    width: int
    height: int
    interlaced: int
    palette: bytes
    start: int
    stop: int
    transparent_index: int | None


def read_gif(data: bytes, most_frames: int) -> Animation:
    """Parse a GIF; nothing is decoded. The canvas is the logical screen, widened if the first frame needs it.

    Args:
        most_frames: parsing ends after one frame more.
    Raises:
        ValueError, OSError, struct.error, IndexError: the data are cut short or damaged.
    """
    width, height = struct.unpack_from("<HH", data, 6)
    patches: list[Patch] = []
    blank = True
    for control, left, top, block in _blocks(data):
        if not patches:
            width, height = max(width, left + block.width), max(height, top + block.height)
        if block.stop - block.start > _MOST_BYTES_A_PIXEL * block.width * block.height + 64:
            raise ValueError(f"frame {len(patches)} holds more data than {block.width}×{block.height} pixels can need")
        box = (left, top, left + block.width, top + block.height)
        over = None if blank or block.transparent_index is None else _lay
        patches.append(Patch(box, control.duration_ms, control.disposal, partial(_decode, data, block), over))
        blank = leaves_blank(patches[-1], (width, height), blank)
        if len(patches) > most_frames:
            break
    return Animation(width, height, patches)


def _blocks(data: bytes) -> Iterator[tuple[_Control, int, int, _Block]]:
    """Each image block with its control, left and top."""
    flags = data[10]
    at = 13 + _palette_bytes(flags)
    global_palette = data[13:at]
    control = _Control()
    while found := _BLOCK.search(data, at):
        at = found.start()
        if data[at] == _TRAILER:
            return
        if data[at] == _EXTENSION:
            if data[at + 1] == _GRAPHIC_CONTROL and data[at + 2] == 4:
                packed, delay, index = struct.unpack_from("<BHB", data, at + 3)
                control = _Control(_DISPOSALS.get(packed >> 2 & 7, Disposal.KEEP), delay * 10, index if packed & 1 else None)
            at = _skip_sub_blocks(data, at + 2)
        else:
            left, top, width, height, flags = struct.unpack_from("<HHHHB", data, at + 1)
            if not (width and height):
                raise ValueError("a frame without pixels")
            palette_end = at + 10 + _palette_bytes(flags)
            palette = data[at + 10 : palette_end] or global_palette or _GREY_PALETTE
            end = _skip_sub_blocks(data, palette_end + 1)
            yield control, left, top, _Block(width, height, flags & 0x40, palette, palette_end, end, control.transparent_index)
            control, at = _Control(), end
    raise OSError("file is truncated: it has no end mark")


def _decode(data: bytes, block: _Block) -> Image.Image:
    bits = max((len(block.palette) // 3 - 1).bit_length(), 1)
    size = struct.pack("<HH", block.width, block.height)
    alone = b"GIF89a" + size + bytes([0x80 | bits - 1, 0, 0]) + block.palette.ljust(3 << bits, b"\0")
    alone += b"\x2c\0\0\0\0" + size + bytes([block.interlaced]) + data[block.start : block.stop] + b"\x3b"
    colours = np.full((256, 4), 255, np.uint8)
    colours[:, :3] = np.frombuffer(block.palette.ljust(768, b"\0"), np.uint8).reshape(256, 3)
    if block.transparent_index is not None:
        colours[block.transparent_index] = 0
    with Image.open(BytesIO(alone), formats=["GIF"]) as image:
        image.load()
    image.putpalette(colours.tobytes(), "RGBA")  # of pixels that are indices, whatever Pillow thinks that they are
    return image.convert("RGBA")


def _lay(below: Image.Image, picture: Image.Image) -> Image.Image:
    """Pixels are clear or opaque, nothing in between."""
    below.paste(picture, mask=picture)
    return below


def _palette_bytes(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _skip_sub_blocks(data: bytes, at: int) -> int:
    """The offset after a chain of sub-blocks that starts at ``at``."""
    while at < len(data):
        if data[at] == 0:
            return at + 1
        at += data[at] + 1
    raise OSError("file is truncated inside a block")
