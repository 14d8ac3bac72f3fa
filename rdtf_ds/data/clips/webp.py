"""Reads a WebP file into patches, each decoded by libwebp, through Pillow, from a file that holds nothing else.

Source: WebP Container Specification (Google). Patches are put together as libwebp's own player does, to the last bit
(``WebPAnimDecoder`` of libwebp 1.2 to 1.6): not premultiplied, in integers that truncate.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from io import BytesIO

import numpy as np
from PIL import Image

from rdtf_ds.data.clips.animation import Animation, Box, Disposal, Patch, leaves_blank

_ANIMATED, _HAS_ALPHA = 0x02, 0x10  # flags of VP8X
_DISPOSE_BACKGROUND, _NO_BLEND = 0x01, 0x02  # flags of ANMF
_FRAME_HEAD = 16  # bytes of ANMF before its picture


@dataclass(frozen=True, slots=True)
class _Picture:
    """Where the chunks of one picture lie, and what they say of themselves."""

    start: int
    stop: int
    size: tuple[int, int]
    says_alpha: bool
    opaque: bool


def read_webp(data: bytes, most_frames: int) -> Animation:
    """Parse a WebP; nothing is decoded.

    Args:
        most_frames: parsing ends after one frame more.
    Raises:
        ValueError, OSError, struct.error: the data are cut short, damaged or contradict themselves.
    """
    (length,) = struct.unpack_from("<I", data, 4)
    if 8 + length > len(data):
        raise OSError(f"file is truncated: {len(data)} bytes of {8 + length}")
    end = 8 + length
    chunks = _chunks(data, 12, end)
    kind, start, stop = next(chunks, (b"", end, end))
    if kind != b"VP8X":
        picture = _picture(data, 12, end)
        return Animation(*picture.size, [_still(data, picture)])
    if stop - start < 10:
        raise ValueError("the VP8X chunk is cut short")
    canvas = 1 + _uint24(data, start + 4), 1 + _uint24(data, start + 7)
    if data[start] & _ANIMATED:
        return Animation(*canvas, _frames(data, chunks, canvas, most_frames))
    picture = _picture(data, stop + (stop & 1), end)
    _demand_size(picture, canvas)
    return Animation(*canvas, [_still(data, picture)])


def _still(data: bytes, picture: _Picture) -> Patch:
    return Patch((0, 0, *picture.size), 0, Disposal.KEEP, partial(_decode, data, picture))


def _frames(data: bytes, chunks: Iterator[tuple[bytes, int, int]], canvas: tuple[int, int], most_frames: int) -> list[Patch]:
    patches: list[Patch] = []
    announced, blank = False, True
    for kind, start, stop in chunks:
        announced = announced or kind == b"ANIM"
        if kind != b"ANMF":
            continue
        if not announced:
            raise ValueError("frames before the ANIM chunk")
        if stop - start < _FRAME_HEAD:
            raise ValueError(f"frame {len(patches)} is cut short")
        patches.append(_frame(data, start, stop, canvas, patches[-1] if patches else None, blank))
        blank = leaves_blank(patches[-1], canvas, blank)
        if len(patches) > most_frames:
            break
    return patches


def _frame(data: bytes, start: int, stop: int, canvas: tuple[int, int], before: Patch | None, blank: bool) -> Patch:
    """One ANMF chunk as a patch. libwebp does not blend in a key frame, nor over what the frame before it cleared."""
    left, top = 2 * _uint24(data, start), 2 * _uint24(data, start + 3)
    size = 1 + _uint24(data, start + 6), 1 + _uint24(data, start + 9)
    duration_ms, flags = _uint24(data, start + 12), data[start + 15]
    box = (left, top, left + size[0], top + size[1])
    if box[2] > canvas[0] or box[3] > canvas[1]:
        raise ValueError("a frame leaves the canvas")
    picture = _picture(data, start + _FRAME_HEAD, stop)
    _demand_size(picture, size)
    disposal = Disposal.CLEAR if flags & _DISPOSE_BACKGROUND else Disposal.KEEP
    key_frame = blank or (size == canvas and not picture.says_alpha)
    bare = before.box if before is not None and before.disposal is Disposal.CLEAR else None
    over = None if flags & _NO_BLEND or key_frame or picture.opaque else partial(_blend_around, box=box, bare=bare)
    return Patch(box, duration_ms, disposal, partial(_decode, data, picture), over)


def _picture(data: bytes, start: int, end: int) -> _Picture:
    alpha_at: int | None = None
    for kind, at, stop in _chunks(data, start, end):
        if kind == b"ALPH" and alpha_at is None:
            alpha_at = at - 8
        elif kind in (b"VP8 ", b"VP8L"):
            if kind == b"VP8L" and alpha_at is not None:
                raise ValueError("two alpha channels in one frame")
            *size, flag = _extent(data, kind, at, stop)
            says_alpha = flag or alpha_at is not None
            opaque = kind == b"VP8 " and alpha_at is None  # VP8L's flag is a hint that may lie
            return _Picture(at - 8 if alpha_at is None else alpha_at, stop, (size[0], size[1]), says_alpha, opaque)
    raise ValueError("a frame without a picture")


def _extent(data: bytes, kind: bytes, start: int, stop: int) -> tuple[int, int, bool]:
    """Width, height and alpha flag that a VP8 or VP8L bitstream begins with."""
    body = data[start : min(stop, start + 10)]
    if kind == b"VP8 " and len(body) == 10 and not body[0] & 1 and body[3:6] == b"\x9d\x01\x2a":
        return (body[6] | body[7] << 8) & 0x3FFF, (body[8] | body[9] << 8) & 0x3FFF, False
    if kind == b"VP8L" and len(body) >= 5 and body[0] == 0x2F:
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF), bool(bits >> 28 & 1)
    raise ValueError(f"no picture in chunk {kind!r}")


def _demand_size(picture: _Picture, size: tuple[int, int]) -> None:
    if picture.size != size:
        raise ValueError(f"a picture of {picture.size[0]}×{picture.size[1]} pixels where {size[0]}×{size[1]} are declared")


def _decode(data: bytes, picture: _Picture) -> Image.Image:
    body = data[picture.start : picture.stop] + b"\0" * ((picture.stop - picture.start) & 1)
    extent = b"".join((side - 1).to_bytes(3, "little") for side in picture.size)
    head = b"WEBPVP8X" + struct.pack("<II", 10, _HAS_ALPHA) + extent
    alone = b"RIFF" + struct.pack("<I", len(head) + len(body)) + head + body
    with Image.open(BytesIO(alone), formats=["WEBP"]) as image:
        image.load()
    return image if image.mode == "RGBA" else image.convert("RGBA")


def _blend_around(below: Image.Image, picture: Image.Image, box: Box, bare: Box | None) -> Image.Image:
    """Lay a picture over what is below it, but leave it as it is where the canvas is bare."""
    laid = blend(np.asarray(picture), np.asarray(below))
    if bare is not None:
        left, top = max(bare[0] - box[0], 0), max(bare[1] - box[1], 0)
        area = (slice(top, max(bare[3] - box[1], 0)), slice(left, max(bare[2] - box[0], 0)))
        laid[area] = np.asarray(picture)[area]
    return Image.fromarray(laid)


def blend(source: np.ndarray, below: np.ndarray) -> np.ndarray:
    """libwebp's rule for a half-transparent pixel over another, uint8 (H, W, 4) both (``BlendPixelNonPremult`` of its anim_decode.c)."""
    alpha = source[..., 3]
    out = np.where((alpha == 0)[..., None], below, source)
    mixed = (alpha > 0) & (alpha < 255)
    over, under = source[mixed].astype(np.uint32), below[mixed].astype(np.uint32)
    over_alpha = over[:, 3:]
    under_alpha = under[:, 3:] * (256 - over_alpha) >> 8
    total = over_alpha + under_alpha
    scale = 2**24 // total
    colour = (over[:, :3] * over_alpha + under[:, :3] * under_alpha) * scale >> 24
    out[mixed] = np.concatenate([colour, total], axis=1).astype(np.uint8)
    return out


def _chunks(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Kind, first byte and end of each chunk's body."""
    while at < end:
        if at + 8 > end:
            raise OSError("file is truncated inside a chunk's head")
        (length,) = struct.unpack_from("<I", data, at + 4)
        stop = at + 8 + length
        if stop > end:
            raise OSError(f"file is truncated inside chunk {data[at : at + 4]!r}")
        yield data[at : at + 4], at + 8, stop
        at = stop + (length & 1)


def _uint24(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 3], "little")
