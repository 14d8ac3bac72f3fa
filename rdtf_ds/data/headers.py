"""What a clip's bytes say before anything is decoded: its format, canvas and frame count, so that caps cost no memory.

The walk is lenient: it reports what it has seen when the data ends or stops making sense, and leaves judging to the decoder.
Pillow alone would not do: it counts frames without a limit, and libwebp allocates the whole canvas as soon as a file is opened.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
STILL_FORMATS = ("gif", "webp", "png")  # decoded by Pillow
VIDEO_FORMATS = ("webm", "mp4")  # decoded by decord
_GIF_EXTENSION, _GIF_IMAGE, _GIF_TRAILER = 0x21, 0x2C, 0x3B


@dataclass(frozen=True, slots=True)
class Header:
    """Canvas in pixels and frame count, all 0 for videos; ``largest``: pixels of the largest picture a decoder must hold."""

    format: str
    width: int = 0
    height: int = 0
    num_frames: int = 0
    largest: int = 0


def sniff_format(start: bytes) -> str | None:
    """The format of a file from its first 12 bytes or more: gif, webp, png, webm, mp4, or None."""
    if start[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    if start[:8] == PNG_SIGNATURE:
        return "png"
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "webp"
    if start[:4] == b"\x1a\x45\xdf\xa3":
        return "webm"
    if start[4:8] == b"ftyp":
        return "mp4"
    return None


def read_header(data: bytes) -> Header | None:
    """The header of a whole file in memory, or None for an unknown format."""
    format = sniff_format(data)
    if format is None:
        return None
    walk = {"gif": _walk_gif, "png": _walk_png, "webp": _walk_webp}.get(format)
    return walk(data) if walk else Header(format)


def _walk_gif(data: bytes) -> Header:
    """The canvas is the logical screen, widened if the first frame needs it. Players clip later frames to it, but a decoder may widen
    it for those too: ``largest`` counts their extent."""
    if len(data) < 13:
        return Header("gif")
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at, frames, largest = 13 + _gif_palette_bytes(flags), 0, 0
    while at + 10 <= len(data) and data[at] != _GIF_TRAILER:
        if data[at] == _GIF_EXTENSION:
            at += 2
        elif data[at] == _GIF_IMAGE:
            left, top, frame_width, frame_height, flags = struct.unpack_from("<HHHHB", data, at + 1)
            if frames == 0:
                width, height = max(width, left + frame_width), max(height, top + frame_height)
            largest = max(largest, max(width, left + frame_width) * max(height, top + frame_height))
            frames += 1
            at += 11 + _gif_palette_bytes(flags)
        else:
            at += 1  # stray bytes between blocks are skipped, as decoders do
            continue
        while at < len(data) and data[at]:
            at += data[at] + 1
        at += 1
    return Header("gif", width, height, frames, max(largest, width * height))


def _gif_palette_bytes(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _walk_png(data: bytes) -> Header:
    width = height = 0
    declared = controls = 0
    at = len(PNG_SIGNATURE)
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind = data[at + 4 : at + 8]
        if kind == b"IHDR" and at + 16 <= len(data):
            width, height = struct.unpack_from(">II", data, at + 8)
        elif kind == b"acTL" and at + 12 <= len(data):
            (value,) = struct.unpack_from(">I", data, at + 8)
            declared = value if value < 2**31 else 0  # beyond what PNG allows: decoders show the default image
        elif kind == b"fcTL":
            controls += 1
        elif kind == b"IEND":
            break
        at += 12 + length
    return Header("png", width, height, max(1, declared, controls), width * height)


def _walk_webp(data: bytes) -> Header:
    width = height = frames = 0
    at = 12
    while at + 8 <= len(data):
        kind, length = data[at : at + 4], struct.unpack_from("<I", data, at + 4)[0]
        body = data[at + 8 : at + 8 + 16]
        if kind == b"VP8X" and len(body) >= 10:
            width, height = 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
        elif kind == b"VP8 " and len(body) >= 10:
            width, height = max(width, body[6] | (body[7] & 0x3F) << 8), max(height, body[8] | (body[9] & 0x3F) << 8)
        elif kind == b"VP8L" and len(body) >= 5:
            bits = int.from_bytes(body[1:5], "little")
            width, height = max(width, 1 + (bits & 0x3FFF)), max(height, 1 + (bits >> 14 & 0x3FFF))
        elif kind == b"ANMF":
            frames += 1
        at += 8 + length + (length & 1)
    return Header("webp", width, height, max(1, frames), width * height)
