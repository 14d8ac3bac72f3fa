"""Plays an APNG: frames decoded by Pillow one by one, disposed and blended here (Portable Network Graphics, 3rd edition, W3C).

Pillow's own player blends half-transparent pixels as if the canvas below were opaque, which darkens and thins soft edges.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO

from PIL import Image

from rdtf_ds.data.headers import PNG_SIGNATURE

_DISPOSE_NONE, _DISPOSE_BACKGROUND, _DISPOSE_PREVIOUS = 0, 1, 2
_BLEND_SOURCE = 0
_SHARED = (b"PLTE", b"tRNS")  # chunks that every frame needs to be read as a picture
_LONGEST_DELAY_MS = 65_535_000


@dataclass(slots=True)
class _Frame:
    """One frame control chunk and the compressed picture that follows it."""

    left: int
    top: int
    width: int
    height: int
    duration_ms: int
    disposal: int
    blend: int
    data: list[bytes] = field(default_factory=list)


def apng_frames(data: bytes, num_frames: int) -> Iterator[tuple[Image.Image, int]]:
    """Every frame as shown, RGBA on the full canvas, with its duration in ms. A default image outside the animation is left out.

    Args:
        num_frames: how many frames the file says it has.
    Raises:
        ValueError, OSError, SyntaxError: the data are cut short, damaged or out of order.
    """
    header, shared, frames = _parse(data)
    if len(frames) < num_frames:
        raise ValueError(f"{len(frames)} frames found, {num_frames} declared")
    canvas = Image.new("RGBA", struct.unpack(">II", header[:8]))
    for number, frame in enumerate(frames[:num_frames]):
        box = (frame.left, frame.top, frame.left + frame.width, frame.top + frame.height)
        if box[2] > canvas.width or box[3] > canvas.height:
            raise ValueError(f"frame {number} leaves the canvas")
        before = canvas.crop(box)
        picture = _decode(header, shared, frame)
        canvas.paste(picture if frame.blend == _BLEND_SOURCE else Image.alpha_composite(before, picture), box)
        yield canvas.copy(), frame.duration_ms
        if frame.disposal == _DISPOSE_BACKGROUND or (frame.disposal == _DISPOSE_PREVIOUS and number == 0):
            canvas.paste((0, 0, 0, 0), box)
        elif frame.disposal == _DISPOSE_PREVIOUS:
            canvas.paste(before, box)


def _parse(data: bytes) -> tuple[bytes, bytes, list[_Frame]]:
    """The header chunk's body, the chunks all frames share, and the frames."""
    header, shared = b"", b""
    frames: list[_Frame] = []
    sequence = 0
    for kind, body in _chunks(data):
        if kind in (b"fcTL", b"fdAT"):
            if struct.unpack_from(">I", body)[0] != sequence:
                raise ValueError(f"animation chunk {sequence} is missing or out of order")
            sequence += 1
        if kind == b"IHDR":
            header = body
        elif kind in _SHARED:
            shared += _chunk(kind, body)
        elif kind == b"fcTL":
            if frames and not frames[-1].data:
                raise ValueError(f"frame {len(frames) - 1} has no data")
            frames.append(_control(body))
        elif kind == b"IDAT" and frames:
            frames[-1].data.append(body)
        elif kind == b"fdAT":
            if not frames:
                raise ValueError("frame data without a frame control")
            frames[-1].data.append(body[4:])
    if frames and not frames[-1].data:
        raise ValueError(f"frame {len(frames) - 1} has no data")
    return header, shared, frames


def _control(body: bytes) -> _Frame:
    _, width, height, left, top, numerator, denominator, disposal, blend = struct.unpack(">IIIIIHHBB", body)
    duration_ms = min(round(1000 * numerator / (denominator or 100)), _LONGEST_DELAY_MS)  # 0 stands for 100, as the standard says
    return _Frame(left, top, width, height, duration_ms, disposal, blend)


def _decode(header: bytes, shared: bytes, frame: _Frame) -> Image.Image:
    """One frame as RGBA, decoded by Pillow from a PNG that holds nothing else."""
    own_header = struct.pack(">II", frame.width, frame.height) + header[8:]
    still = PNG_SIGNATURE + _chunk(b"IHDR", own_header) + shared + _chunk(b"IDAT", b"".join(frame.data)) + _chunk(b"IEND", b"")
    with Image.open(BytesIO(still), formats=["PNG"]) as image:
        return image.convert("RGBA")


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = len(PNG_SIGNATURE)
    while True:
        if at + 12 > len(data):
            raise OSError("file is truncated")
        (length,) = struct.unpack_from(">I", data, at)
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        end = at + 12 + length
        if end > len(data):
            raise OSError("file is truncated")
        if zlib.crc32(kind + body) != struct.unpack_from(">I", data, end - 4)[0]:
            raise ValueError(f"checksum of chunk {kind!r} is wrong: the file is damaged")
        yield kind, body
        if kind == b"IEND":
            return
        at = end


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
