"""Decoders that are not Pillow, as references: FFmpeg for GIF, APNG and video, libwebp's command-line tools for WebP."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest


def need(*programs: str) -> None:
    """Skip the test if a program is not installed."""
    absent = [program for program in programs if shutil.which(program) is None]
    if absent:
        pytest.skip(f"not installed: {', '.join(absent)} (Debian packages ffmpeg and webp)")


def over(frames: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """RGBA frames composited on a colour, computed in float64, as int."""
    alpha = frames[..., 3:] / 255.0
    return np.rint(frames[..., :3] * alpha + np.array(background) * (1 - alpha)).astype(int)


def ffmpeg_frames(path: Path, width: int, height: int, pixels: str = "rgba") -> np.ndarray:
    """Every frame FFmpeg decodes: uint8 (F, H, W, 3|4)."""
    quiet, raw = ["-v", "quiet", "-nostdin", "-threads", "1"], ["-vsync", "0", "-f", "rawvideo", "-pix_fmt", pixels, "-"]
    output = subprocess.run(["ffmpeg", *quiet, "-i", str(path), *raw], capture_output=True, timeout=60).stdout
    return np.frombuffer(output, np.uint8).reshape(-1, height, width, len(pixels.rstrip("24")))


def libwebp_frames(path: Path, scratch: Path) -> np.ndarray:
    """Every frame of an animated WebP: patches by webpmux and dwebp, put together here by the container specification."""
    info = subprocess.run(["webpmux", "-info", str(path)], capture_output=True, text=True, timeout=60, check=True).stdout
    width, height = map(int, re.search(r"Canvas size: (\d+) x (\d+)", info).groups())  # type: ignore[union-attr]
    rows = re.findall(r"^\s*(\d+):\s+(\d+)\s+(\d+)\s+(?:yes|no)\s+(\d+)\s+(\d+)\s+\d+\s+(\w+)\s+(yes|no)", info, re.M)
    canvas, frames = np.zeros((height, width, 4)), []
    for number, w, h, left, top, dispose, blend in rows:
        still = scratch / "frame.webp"
        subprocess.run(["webpmux", "-get", "frame", number, str(path), "-o", str(still)], capture_output=True, timeout=60, check=True)
        pam = subprocess.run(["dwebp", str(still), "-pam", "-o", "-"], capture_output=True, timeout=60, check=True).stdout
        patch = np.frombuffer(pam.partition(b"ENDHDR\n")[2], np.uint8).reshape(int(h), int(w), 4).astype(float)
        area = canvas[int(top) : int(top) + int(h), int(left) : int(left) + int(w)]
        area[:] = blended(patch, area) if blend == "yes" else patch
        frames.append(np.rint(canvas).astype(np.uint8))
        if dispose == "background":
            area[:] = 0
    return np.stack(frames)


def blended(source: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Source over destination, alpha not premultiplied, 0..255 (Porter and Duff 1984)."""
    source_alpha, below_alpha = source[..., 3:] / 255, below[..., 3:] / 255
    alpha = source_alpha + below_alpha * (1 - source_alpha)
    colour = source[..., :3] * source_alpha + below[..., :3] * below_alpha * (1 - source_alpha)
    return np.concatenate([np.divide(colour, alpha, out=np.zeros_like(colour), where=alpha > 0), alpha * 255], axis=-1)
