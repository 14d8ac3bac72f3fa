"""Reads a PNG or APNG into patches, each decoded by Pillow from a PNG that holds nothing else (PNG, 3rd edition, W3C).

Pillow's own player blends half-transparent pixels as if the canvas below were opaque, which darkens and thins soft edges. Every
checksum is verified, whether its chunk is needed or not.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO

import numpy as np
from PIL import Image

from rdtf_ds.data.clips.animation import Animation, Disposal, Patch, leaves_blank
from rdtf_ds.data.clips.headers import PNG_SIGNATURE

_DISPOSALS = (Disposal.KEEP, Disposal.CLEAR, Disposal.RESTORE)
_BLEND_SOURCE = 0
_WITH_ALPHA = (4, 6)  # colour types
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))  # left, top, steps across, down
_LONGEST_DELAY_MS = 65_535_000
_MOST_DECLARED = 2**31 - 1


@dataclass(slots=True)
class _Picture:
    """A compressed picture; of an animation's frame, with what its control chunk says."""

    width: int
    height: int
    left: int = 0
    top: int = 0
    duration_ms: int = 0
    disposal: int = 0
    blend: int = _BLEND_SOURCE
    data: list[tuple[int, int]] = field(default_factory=list)  # from where to where in the file


@dataclass(slots=True)
class _File:
    """What the chunks hold: the body of IHDR, PLTE and tRNS as they stand, the default image, and the animation's frames."""

    header: bytes = b""
    palette: bytes = b""
    transparency: bytes = b""
    declared: list[int] = field(default_factory=list)  # frame counts of the acTL chunks before the picture
    default: list[tuple[int, int]] = field(default_factory=list)
    frames: list[_Picture] = field(default_factory=list)


def read_png(data: bytes, most_frames: int) -> Animation:
    """Parse a PNG; nothing is decoded. A default image outside of the animation, for viewers that cannot animate, is left out.

    Args:
        most_frames: parsing ends after one frame more.
    Raises:
        ValueError, OSError, struct.error, IndexError: the data are cut short, damaged or out of order.
    """
    file = _parse(data, most_frames)
    width, height = struct.unpack_from(">II", file.header)
    declared = file.declared[0] if len(file.declared) == 1 else 0  # none or several: no animation, as decoders take it
    if len(file.frames) > most_frames:
        declared = len(file.frames)
    if not 0 < declared <= _MOST_DECLARED:
        still = _Picture(width, height, data=file.default)
        return Animation(width, height, [_patch(data, file, still, blank=True)])
    if len(file.frames) < declared:
        raise ValueError(f"{len(file.frames)} frames found, {declared} declared")
    patches: list[Patch] = []
    blank = True
    for number, frame in enumerate(file.frames[:declared]):
        if not frame.data:
            raise ValueError(f"frame {number} has no data")
        if frame.left + frame.width > width or frame.top + frame.height > height:
            raise ValueError(f"frame {number} leaves the canvas")
        patches.append(_patch(data, file, frame, blank))
        blank = leaves_blank(patches[-1], (width, height), blank)
    return Animation(width, height, patches)


def _parse(data: bytes, most_frames: int) -> _File:
    file = _File()
    sequence = 0
    for kind, start, stop in _chunks(data):
        if kind in (b"fcTL", b"fdAT"):
            if struct.unpack_from(">I", data, start)[0] != sequence:
                raise ValueError(f"animation chunk {sequence} is missing or out of order")
            sequence += 1
        if kind == b"IHDR":
            file.header = data[start:stop]
        elif kind == b"PLTE":
            file.palette = _chunk(kind, data[start:stop])
        elif kind == b"tRNS":
            file.transparency = _chunk(kind, data[start:stop])
        elif kind == b"acTL" and not file.default:
            file.declared.append(struct.unpack_from(">I", data, start)[0])
        elif kind == b"fcTL":
            file.frames.append(_control(data[start:stop]))
        elif kind == b"IDAT":
            file.default.append((start, stop))
            if file.frames:
                file.frames[-1].data.append((start, stop))
        elif kind == b"fdAT":
            if not file.frames:
                raise ValueError("frame data without a frame control")
            file.frames[-1].data.append((start + 4, stop))
        if len(file.frames) > most_frames and file.frames[-1].data:
            break
    if len(file.header) != 13 or file.header[9] not in _CHANNELS:
        raise ValueError("no header")
    if not (file.default or file.frames):
        raise ValueError("no picture")
    depth, colour_type = file.header[8:10]
    if file.transparency and colour_type == 0 and depth in (2, 4):  # Pillow spreads such greys over 0..255, and forgets the clear one
        (grey,) = struct.unpack_from(">H", file.transparency, 8)
        file.transparency = _chunk(b"tRNS", struct.pack(">H", (grey & (2**depth - 1)) * 255 // (2**depth - 1)))
    return file


def _control(body: bytes) -> _Picture:
    _, width, height, left, top, numerator, denominator, disposal, blend = struct.unpack(">IIIIIHHBB", body)
    duration_ms = min(round(1000 * numerator / (denominator or 100)), _LONGEST_DELAY_MS)  # 0 stands for 100, as the standard says
    if not (width and height):
        raise ValueError("a frame without pixels")
    return _Picture(width, height, left, top, duration_ms, disposal, blend)


def _patch(data: bytes, file: _File, picture: _Picture, blank: bool) -> Patch:
    box = (picture.left, picture.top, picture.left + picture.width, picture.top + picture.height)
    opaque = not file.transparency and file.header[9] not in _WITH_ALPHA
    over = None if blank or opaque or picture.blend == _BLEND_SOURCE else Image.alpha_composite
    return Patch(box, picture.duration_ms, _DISPOSALS[picture.disposal], partial(_decode, data, file, picture), over)


def _decode(data: bytes, file: _File, picture: _Picture) -> Image.Image:
    """RGBA, 8 bits a channel; of 16 bits the upper 8."""
    compressed = b"".join(data[start:stop] for start, stop in picture.data)
    filtered = _inflate(compressed, _filtered_bytes(picture.width, picture.height, file.header))
    header = struct.pack(">II", picture.width, picture.height) + file.header[8:]
    alone = [_chunk(b"IHDR", header), file.palette, file.transparency, _chunk(b"IDAT", zlib.compress(filtered, 0)), _chunk(b"IEND", b"")]
    with Image.open(BytesIO(PNG_SIGNATURE + b"".join(alone)), formats=["PNG"]) as image:
        image.load()
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip instead of scale
        return _from_deep_grey(np.asarray(image), file.transparency)
    return image if image.mode == "RGBA" else image.convert("RGBA")


def _from_deep_grey(grey: np.ndarray, transparency: bytes) -> Image.Image:
    pixels = np.repeat((grey >> 8).astype(np.uint8)[..., None], 4, axis=2)
    pixels[..., 3] = 255
    if transparency:
        pixels[grey == struct.unpack_from(">H", transparency, 8)[0]] = 0
    return Image.fromarray(pixels)


def _inflate(compressed: bytes, expected: int) -> bytes:
    """The data of a picture, which must inflate to just what it needs: a bomb would hold more, of which one byte is looked at."""
    inflater = zlib.decompressobj()
    filtered = inflater.decompress(compressed, expected + 1)
    if len(filtered) > expected:
        raise ValueError(f"a picture holds more data than the {expected} bytes that its size needs")
    if len(filtered) < expected or not inflater.eof:
        raise OSError("file is truncated inside a picture")
    return filtered


def _filtered_bytes(width: int, height: int, header: bytes) -> int:
    """Bytes of a picture before compression: its rows, each with its filter's number, of all passes if it is interlaced."""
    bits = header[8] * _CHANNELS[header[9]]
    passes = [(width, height)]
    if header[12]:
        passes = [(-(-(width - left) // across), -(-(height - top) // down)) for left, top, across, down in _ADAM7]
    return sum(rows * (1 + (columns * bits + 7) // 8) for columns, rows in passes if columns > 0 and rows > 0)


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, first byte and end of each chunk's body, up to the end mark."""
    at = len(PNG_SIGNATURE)
    view = memoryview(data)
    while True:
        if at + 12 > len(data):
            raise OSError("file is truncated: it has no end mark")
        (length,) = struct.unpack_from(">I", data, at)
        stop = at + 8 + length
        if stop + 4 > len(data):
            raise OSError("file is truncated inside a chunk")
        kind = data[at + 4 : at + 8]
        if zlib.crc32(view[at + 4 : stop]) != struct.unpack_from(">I", data, stop)[0]:
            raise ValueError(f"checksum of chunk {kind!r} is wrong: the file is damaged")
        yield kind, at + 8, stop
        if kind == b"IEND":
            return
        at = stop + 4


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
