"""Tiny GIFs and APNGs put together byte by byte, with full control of boxes, disposal and blending."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

BLACK, RED, GREEN, BLUE = range(4)
PALETTE = bytes([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
COLOURS = {"k": (0, 0, 0), "r": (255, 0, 0), "g": (0, 255, 0), "b": (0, 0, 255), ".": None}


@dataclass(frozen=True)
class Patch:
    """A one-colour rectangle: colour index, left, top, width, height."""

    colour: int
    box: tuple[int, int, int, int]
    disposal: int = 0
    transparent: int | None = None
    delay: int = 5


def gif(width: int, height: int, patches: list[Patch]) -> bytes:
    """Uncompressed in spirit: a clear code before every pixel keeps all LZW codes 3 bits wide."""
    out = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x81, BLUE, 0) + PALETTE
    for patch in patches:
        flag = patch.transparent is not None
        out += struct.pack("<BBBBHBB", 0x21, 0xF9, 4, patch.disposal << 2 | flag, patch.delay, patch.transparent or 0, 0)
        out += struct.pack("<BHHHHB", 0x2C, *patch.box, 0) + b"\x02" + _lzw(patch.colour, patch.box[2] * patch.box[3]) + b"\0"
    return out + b"\x3b"


def _lzw(colour: int, pixels: int) -> bytes:
    clear, end = 4, 5
    codes = [code for _ in range(pixels) for code in (clear, colour)] + [end]
    value = sum(code << 3 * place for place, code in enumerate(codes))
    data = value.to_bytes((3 * len(codes) + 7) // 8, "little")
    blocks = [data[at : at + 255] for at in range(0, len(data), 255)]
    return b"".join(bytes([len(block)]) + block for block in blocks)


@dataclass(frozen=True)
class Layer:
    """A one-colour RGBA rectangle of an APNG: left, top, width, height."""

    rgba: tuple[int, int, int, int]
    box: tuple[int, int, int, int]
    disposal: int = 0
    blend: int = 1


def apng(width: int, height: int, layers: list[Layer], default_image: bool = False) -> bytes:
    out = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0))
    out += chunk(b"acTL", struct.pack(">II", len(layers), 0))
    if default_image:
        out += chunk(b"IDAT", _pixels((1, 2, 3, 255), width, height))
    sequence = 0
    for number, layer in enumerate(layers):
        left, top, w, h = layer.box
        out += chunk(b"fcTL", struct.pack(">IIIIIHHBB", sequence, w, h, left, top, 1, 20, layer.disposal, layer.blend))
        sequence += 1
        if number == 0 and not default_image:
            out += chunk(b"IDAT", _pixels(layer.rgba, w, h))
        else:
            out += chunk(b"fdAT", struct.pack(">I", sequence) + _pixels(layer.rgba, w, h))
            sequence += 1
    return out + chunk(b"IEND", b"")


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _pixels(rgba: tuple[int, int, int, int], width: int, height: int) -> bytes:
    return zlib.compress((b"\0" + bytes(rgba) * width) * height)
