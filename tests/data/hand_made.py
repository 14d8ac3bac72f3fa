"""Tiny GIFs, APNGs and WebPs put together byte by byte, with full control of boxes, disposal and blending."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

BLACK, RED, GREEN, BLUE = range(4)
PALETTE = bytes([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
COLOURS = {"k": (0, 0, 0), "r": (255, 0, 0), "g": (0, 255, 0), "b": (0, 0, 255), ".": None}


@dataclass(frozen=True)
class Patch:
    """A rectangle of a GIF: colour index, or one a pixel (H, W); left, top, width, height."""

    colour: int | np.ndarray
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
        indices = np.broadcast_to(patch.colour, (patch.box[3], patch.box[2])).ravel().tolist()
        out += struct.pack("<BHHHHB", 0x2C, *patch.box, 0) + b"\x02" + sub_blocks(_lzw(indices)) + b"\0"
    return out + b"\x3b"


def _lzw(indices: list[int]) -> bytes:
    clear, end = 4, 5
    bits = "".join(f"{code:03b}" for code in reversed([code for index in indices for code in (clear, index)] + [end]))
    return int(bits, 2).to_bytes((len(bits) + 7) // 8, "little")


def sub_blocks(data: bytes) -> bytes:
    """GIF data in blocks of at most 255 bytes, without the empty one that ends them."""
    blocks = [data[at : at + 255] for at in range(0, len(data), 255)]
    return b"".join(bytes([len(block)]) + block for block in blocks)


@dataclass(frozen=True)
class Layer:
    """A rectangle of an APNG or WebP: one RGBA colour, or pixels (H, W, 4); left, top, width, height (even left and top for WebP)."""

    rgba: tuple[int, int, int, int] | np.ndarray
    box: tuple[int, int, int, int]
    disposal: int = 0
    blend: int = 1

    def pixels(self) -> np.ndarray:
        return np.ascontiguousarray(np.broadcast_to(np.array(self.rgba, np.uint8), (self.box[3], self.box[2], 4)))


def apng(width: int, height: int, layers: list[Layer], default_image: bool = False) -> bytes:
    out = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0))
    out += chunk(b"acTL", struct.pack(">II", len(layers), 0))
    if default_image:
        out += chunk(b"IDAT", _compressed(Layer((1, 2, 3, 255), (0, 0, width, height)).pixels()))
    sequence = 0
    for number, layer in enumerate(layers):
        left, top, w, h = layer.box
        out += chunk(b"fcTL", struct.pack(">IIIIIHHBB", sequence, w, h, left, top, 1, 20, layer.disposal, layer.blend))
        sequence += 1
        if number == 0 and not default_image:
            out += chunk(b"IDAT", _compressed(layer.pixels()))
        else:
            out += chunk(b"fdAT", struct.pack(">I", sequence) + _compressed(layer.pixels()))
            sequence += 1
    return out + chunk(b"IEND", b"")


def chunk(kind: bytes, body: bytes) -> bytes:
    """A PNG chunk."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _compressed(pixels: np.ndarray) -> bytes:
    return zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels))


def webp(width: int, height: int, layers: list[Layer], lossless: bool = True) -> bytes:
    """An animation of 40 ms a frame; each layer is encoded by libwebp on its own."""
    frames = b""
    for layer in layers:
        left, top, w, h = layer.box
        assert left % 2 == top % 2 == 0, "WebP stores half of an offset"
        still = io.BytesIO()
        Image.fromarray(layer.pixels()).save(still, "WEBP", lossless=lossless, quality=60, method=0, exact=True)
        head = b"".join(uint24(value) for value in (left // 2, top // 2, w - 1, h - 1, 40))
        frames += riff_chunk(b"ANMF", head + bytes([(layer.blend == 0) << 1 | layer.disposal]) + webp_picture(still.getvalue()))
    return webp_file(width, height, frames)


def webp_file(width: int, height: int, frames: bytes) -> bytes:
    """ANMF chunks with what stands before them."""
    head = riff_chunk(b"VP8X", b"\x12\0\0\0" + uint24(width - 1) + uint24(height - 1)) + riff_chunk(b"ANIM", b"\xff\xff\xff\xff\0\0")
    return riff_chunk(b"RIFF", b"WEBP" + head + frames)


def webp_picture(still: bytes) -> bytes:
    """The chunks of a still WebP that hold its picture."""
    at, found = 12, b""
    while at < len(still):
        (length,) = struct.unpack_from("<I", still, at + 4)
        end = at + 8 + length + (length & 1)
        if still[at : at + 4] in (b"ALPH", b"VP8 ", b"VP8L"):
            found += still[at:end]
        at = end
    return found


def riff_chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a RIFF file, padded."""
    return kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) & 1)


def uint24(value: int) -> bytes:
    return value.to_bytes(3, "little")


def random_animation(format: str, seed: int) -> tuple[bytes, int]:
    """An animation of random rectangles, disposals, blends and pixels, of 2-9 frames; and their number.

    A third of the pixels is clear, a third opaque, and where the format has it, a third in between.
    """
    rng = np.random.default_rng(seed)
    width, height, count = (int(value) for value in rng.integers((2, 2, 2), (13, 13, 10)))
    layers: list[Layer] = []
    for number in range(count):
        full = number == 0 and format == "png" or rng.random() < 0.2
        left, top = (0, 0) if full else (int(rng.integers(width)), int(rng.integers(height)))
        if format == "webp":
            left, top = left // 2 * 2, top // 2 * 2
        box = (left, top, width, height) if full else (left, top, *(int(rng.integers(1, n + 1)) for n in (width - left, height - top)))
        pixels = rng.integers(0, 256, (box[3], box[2], 4), dtype=np.uint8)
        kinds = rng.integers(0, 3, pixels.shape[:2])
        pixels[..., 3] = np.where(kinds == 0, 0, np.where(kinds == 1, 255, pixels[..., 3])).astype(np.uint8)
        if rng.random() < 0.2:
            pixels[..., 3] = 255
        layers.append(Layer(pixels, box, int(rng.integers(2 if format == "webp" else 3)), int(rng.random() < 0.7)))
    if format == "webp":
        return webp(width, height, layers, lossless=bool(rng.random() < 0.7)), count
    if format == "png":
        return apng(width, height, layers, default_image=bool(rng.random() < 0.3)), count
    patches = []
    for layer in layers:
        transparent = None if rng.random() < 0.3 else int(rng.integers(4))
        patches.append(Patch(layer.pixels()[..., 0] % 4, layer.box, layer.disposal + 1, transparent))
    return gif(width, height, patches), count
