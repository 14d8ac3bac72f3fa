"""Joins singly encoded frames into one animated GIF, APNG or WebP file, one stored frame for each frame given.

Pillow's and libwebp's own animation writers merge equal neighbouring frames, which changes the frame count that a training clip
is indexed by. So every frame is encoded alone and the containers are put together here, from their specifications:
GIF89a (W3C), Portable Network Graphics 3rd edition (W3C), WebP Container Specification (Google).
All frames are full-size and replace the canvas. What a file says of itself (`metadata`, see metadata.py) comes as a ready block.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from rdtf_ds.data.clips.headers import PNG_SIGNATURE

GIF_REPLACE, GIF_RESTORE_BACKGROUND = 1, 2
WEBP_ALPHA_FLAG, WEBP_XMP_FLAG, WEBP_ANIMATION_FLAG = 0x10, 0x04, 0x02
WEBP_NO_BLEND = 0x02
LONGEST_MS = 0xFFFF
"""The most milliseconds a frame can be shown: APNG has 16 bits for them."""


def join_gif(stills: Sequence[bytes], durations_ms: Sequence[int], metadata: bytes = b"") -> bytes:
    """One looping GIF of single-frame GIFs; each keeps its own colours as a local palette. Delays have a step of 10 ms, at least 20."""
    parsed = [_parse_still_gif(still) for still in stills]
    out = bytearray(b"GIF89a" + parsed[0].size + b"\x70\x00\x00")  # no global palette
    out += b"\x21\xff\x0bNETSCAPE2.0\x03\x01\x00\x00\x00" + metadata
    for frame, duration in zip(parsed, durations_ms, strict=True):
        transparent = frame.transparent_index is not None
        disposal = GIF_RESTORE_BACKGROUND if transparent else GIF_REPLACE
        delay = max(round(duration / 10), 2)  # viewers turn a delay below 20 ms into 100 ms
        out += struct.pack("<BBBBHBB", 0x21, 0xF9, 4, disposal << 2 | transparent, delay, frame.transparent_index or 0, 0)
        palette_bits = (len(frame.palette) // 3).bit_length() - 2
        out += b"\x2c\x00\x00\x00\x00" + frame.size + bytes([0x80 | palette_bits]) + frame.palette + frame.pixels
    return bytes(out + b"\x3b")


class _StillGIF:
    """The parts of a single-frame GIF that go into an animation."""

    def __init__(self, size: bytes, palette: bytes, transparent_index: int | None, pixels: bytes) -> None:
        self.size, self.palette, self.transparent_index, self.pixels = size, palette, transparent_index, pixels


def _parse_still_gif(data: bytes) -> _StillGIF:
    size, flags = data[6:10], data[10]
    palette_bytes = 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0
    palette, at = data[13 : 13 + palette_bytes], 13 + palette_bytes
    transparent_index = None
    while data[at] == 0x21:  # extensions before the image
        if data[at + 1] == 0xF9 and data[at + 3] & 1:
            transparent_index = data[at + 6]
        at = end_of_sub_blocks(data, at + 2)
    assert data[at] == 0x2C, "a GIF that Pillow wrote has an image after its extensions"
    local = data[at + 9]
    at += 10
    if local & 0x80:
        palette_bytes = 3 * 2 ** ((local & 7) + 1)
        palette, at = data[at : at + palette_bytes], at + palette_bytes
    return _StillGIF(size, palette, transparent_index, data[at : end_of_sub_blocks(data, at + 1)])


def end_of_sub_blocks(data: bytes, at: int) -> int:
    """The offset behind a chain of sub-blocks and its terminator (GIF89a, 15 and 16); ``at``: that of the first one's size.

    Raises:
        IndexError: ``data`` ends before the chain does.
    """
    while data[at]:
        at += data[at] + 1
    return at + 1


def join_apng(stills: Sequence[bytes], durations_ms: Sequence[int], metadata: bytes = b"") -> bytes:
    """One looping APNG of PNGs that share size and colour type."""
    header = next(body for kind, body in png_chunks(stills[0]) if kind == b"IHDR")
    width, height = struct.unpack(">II", header[:8])
    out = bytearray(PNG_SIGNATURE + png_chunk(b"IHDR", header))
    out += png_chunk(b"acTL", struct.pack(">II", len(stills), 0))
    sequence = 0
    for number, (still, duration) in enumerate(zip(stills, durations_ms, strict=True)):
        control = struct.pack(">IIIIIHHBB", sequence, width, height, 0, 0, duration, 1000, 0, 0)
        out += png_chunk(b"fcTL", control)
        sequence += 1
        for kind, body in png_chunks(still):
            if kind == b"IHDR":
                assert body == header, "frames of one APNG share size and colour type"
            if kind != b"IDAT":
                continue
            if number == 0:
                out += png_chunk(b"IDAT", body)
            else:
                out += png_chunk(b"fdAT", struct.pack(">I", sequence) + body)
                sequence += 1
    # Metadata at the end: FFmpeg takes a PNG for still whose first picture lies beyond the few KB that it looks at.
    return bytes(out + metadata + png_chunk(b"IEND", b""))


def png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(type, data) of each chunk of a PNG, in order; checksums are not held against them.

    Raises:
        struct.error: ``data`` ends within a chunk's length. A last chunk that is cut comes short.
    """
    at = len(PNG_SIGNATURE)
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        yield data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        at += length + 12


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk as a PNG stores it: length, type (4 bytes), data, CRC-32 of type and data."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def join_webp(
    stills: Sequence[bytes], durations_ms: Sequence[int], size: tuple[int, int], alpha: bool, metadata: bytes = b""
) -> bytes:
    """One looping WebP of still WebPs of ``size`` (width, height)."""
    extent = _uint24(size[0] - 1) + _uint24(size[1] - 1)
    flags = WEBP_ANIMATION_FLAG | (WEBP_ALPHA_FLAG if alpha else 0) | (WEBP_XMP_FLAG if metadata else 0)
    chunks = [riff_chunk(b"VP8X", bytes([flags, 0, 0, 0]) + extent), riff_chunk(b"ANIM", b"\x00\x00\x00\x00\x00\x00")]
    for still, duration in zip(stills, durations_ms, strict=True):
        images = b"".join(riff_chunk(kind, body) for kind, body in riff_chunks(still) if kind in (b"ALPH", b"VP8 ", b"VP8L"))
        head = _uint24(0) + _uint24(0) + extent + _uint24(min(duration, 0xFFFFFF)) + bytes([WEBP_NO_BLEND])
        chunks.append(riff_chunk(b"ANMF", head + images))
    return riff_chunk(b"RIFF", b"WEBP" + b"".join(chunks) + metadata)  # XMP stands after the frames


def riff_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(FourCC, payload) of each chunk behind a WebP's header of 12 bytes, in order, without padding bytes.

    Raises:
        struct.error: ``data`` ends within a chunk's length. A last chunk that is cut comes short.
    """
    at = 12
    while at < len(data):
        (length,) = struct.unpack("<I", data[at + 4 : at + 8])
        yield data[at : at + 4], data[at + 8 : at + 8 + length]
        at += 8 + length + (length & 1)


def riff_chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk as RIFF stores it: FourCC (``kind``), length, payload, and a zero byte after an odd length."""
    return kind + struct.pack("<I", len(body)) + body + b"\x00" * (len(body) & 1)


def _uint24(value: int) -> bytes:
    return struct.pack("<I", value)[:3]


def mp4_end(file: BinaryIO) -> int:
    """Where an MP4 ends by what its boxes say (ISO 14496-12); a last box without a size reaches to wherever the file does.

    Raises:
        struct.error: it is cut off within the head of a box.
    """
    at, end = 0, file.seek(0, 2)
    while at < end:
        file.seek(at)
        (size,) = struct.unpack(">I4x", file.read(8))
        if size == 1:
            (size,) = struct.unpack(">Q", file.read(8))
        if size < 8:  # 0, or damage, of which there is no end
            return end
        at += size
    return at


def webm_end(file: BinaryIO) -> int:
    """Where a WebM ends by the sizes of its header and its segment (RFC 8794, 9559); where none is told, as in a live stream, it is whole.

    Raises:
        struct.error: it is cut off before its segment begins.
    """
    at, end = 0, file.seek(0, 2)
    for expected in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):  # the header, then the segment
        file.seek(at)
        identifier, first = struct.unpack("4sB", file.read(5))
        if identifier != expected:
            return end
        length = 9 - first.bit_length()
        (size,) = struct.unpack(">Q", (bytes([first]) + file.read(length - 1)).rjust(8, b"\x00"))
        size &= (1 << 7 * length) - 1
        if size == (1 << 7 * length) - 1:
            return end
        at += 4 + length + size
    return at
