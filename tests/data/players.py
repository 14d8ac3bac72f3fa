"""Decoders that are not Pillow, as references: FFmpeg for GIF, APNG and video, libwebp's own player for WebP."""

from __future__ import annotations

import ctypes
import ctypes.util
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

_ABI, _RGBA = 0x0107, 1  # of libwebpdemux, any version 1.x


def need(*programs: str) -> None:
    """Skip the test if a program is not installed."""
    absent = [program for program in programs if shutil.which(program) is None]
    if absent:
        pytest.skip(f"not installed: {', '.join(absent)} (Debian packages ffmpeg and webp)")


def over(frames: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """RGBA frames composited on a colour, computed in float64, as int."""
    alpha = frames[..., 3:] / 255.0
    return np.rint(frames[..., :3] * alpha + np.array(background) * (1 - alpha)).astype(int)


def shown(frames: np.ndarray) -> np.ndarray:
    """RGBA frames without the colours that full transparency hides."""
    return np.where(frames[..., 3:] == 0, 0, frames)


def ffmpeg_frames(path: Path, width: int, height: int, pixels: str = "rgba") -> np.ndarray:
    """Every frame FFmpeg decodes: uint8 (F, H, W, 3|4); none if it decodes another size or nothing."""
    quiet, raw = ["-v", "quiet", "-nostdin", "-threads", "1"], ["-vsync", "0", "-f", "rawvideo", "-pix_fmt", pixels, "-"]
    output = subprocess.run(["ffmpeg", *quiet, "-i", str(path), *raw], capture_output=True, timeout=60).stdout
    frame_bytes = height * width * len(pixels.rstrip("24"))
    return np.frombuffer(output[: len(output) // frame_bytes * frame_bytes], np.uint8).reshape(-1, height, width, len(pixels.rstrip("24")))


class _Data(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_char_p), ("size", ctypes.c_size_t)]


class _Options(ctypes.Structure):
    _fields_ = [("color_mode", ctypes.c_int), ("use_threads", ctypes.c_int), ("padding", ctypes.c_uint32 * 7)]


class _Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("width", "height", "loops", "background", "frames")] + [("pad", ctypes.c_uint32 * 4)]


def libwebp_frames(path: Path) -> tuple[np.ndarray, list[int]]:
    """Every frame of a WebP by the system's own libwebp (``WebPAnimDecoder``, what its tool anim_dump prints), and their durations in ms.

    Returns:
        uint8 (F, H, W, 4); F is 0 where libwebp refuses the file. Skips the test if the library is not installed.
    """
    name = ctypes.util.find_library("webpdemux")
    if name is None:
        pytest.skip("not installed: libwebpdemux (comes with the Debian package webp)")
    library = ctypes.CDLL(name)
    library.WebPAnimDecoderNewInternal.restype = ctypes.c_void_p
    library.WebPAnimDecoderNewInternal.argtypes = [ctypes.POINTER(_Data), ctypes.POINTER(_Options), ctypes.c_int]
    for function in (library.WebPAnimDecoderGetInfo, library.WebPAnimDecoderGetNext):
        function.argtypes = [ctypes.c_void_p] + [ctypes.c_void_p] * (1 if function is library.WebPAnimDecoderGetInfo else 2)
    library.WebPAnimDecoderDelete.argtypes = [ctypes.c_void_p]
    library.WebPAnimDecoderDelete.restype = None
    content = path.read_bytes()
    data, options, info = _Data(content, len(content)), _Options(_RGBA, 0), _Info()
    decoder = library.WebPAnimDecoderNewInternal(ctypes.byref(data), ctypes.byref(options), _ABI)
    if not decoder:
        return np.zeros((0, 1, 1, 4), np.uint8), []
    try:
        assert library.WebPAnimDecoderGetInfo(decoder, ctypes.byref(info))
        frames, ends = [], [0]
        pixels, end = ctypes.POINTER(ctypes.c_uint8)(), ctypes.c_int()
        while library.WebPAnimDecoderGetNext(decoder, ctypes.byref(pixels), ctypes.byref(end)):
            frames.append(np.ctypeslib.as_array(pixels, (info.height, info.width, 4)).copy())
            ends.append(end.value)
    finally:
        library.WebPAnimDecoderDelete(decoder)
    return np.stack(frames), np.diff(ends).tolist()


def blended(source: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Source over destination, alpha not premultiplied, 0..255 (Porter and Duff 1984), in float64."""
    source_alpha, below_alpha = source[..., 3:] / 255, below[..., 3:] / 255
    alpha = source_alpha + below_alpha * (1 - source_alpha)
    colour = source[..., :3] * source_alpha + below[..., :3] * below_alpha * (1 - source_alpha)
    return np.concatenate([np.divide(colour, alpha, out=np.zeros_like(colour), where=alpha > 0), alpha * 255], axis=-1)
