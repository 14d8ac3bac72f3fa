"""What a plan says of the processes that decode videos is what one takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rdtf_ds.data.clips.clip import DecodeLimits
from rdtf_ds.data.clips.decoder_pool import DecoderPool
from rdtf_ds.data.clips.writing import write_clip
from rdtf_ds.memory.video_decoders import LARGE_BYTES, RESIDENT_BYTES, video_decoders

WHITE = (255, 255, 255)


def in_use(pid: int, key: str) -> int:
    """Bytes that the kernel says of a process."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def gradients(count: int, side: int) -> np.ndarray:
    """Frames that move and that a codec has to work on."""
    y, x = np.mgrid[:side, :side]
    frames = [np.stack([x + 3 * number, y + 2 * number, x * y // 64 + number], -1) for number in range(count)]
    return (np.stack(frames) % 256).astype(np.uint8)


def test_one_takes_what_is_said(tmp_path: Path) -> None:
    write_clip(gradients(72, 256), tmp_path / "clip.mp4", 40)
    with DecoderPool() as pool:
        for first in range(3):
            pool.decode(tmp_path / "clip.mp4", 256, WHITE, DecodeLimits(), frames=range(first, 72, 10))
        (child,) = pool._children
        measured = in_use(child.pid, "VmRSS")
    print(f"{measured / 1e6:.1f} MB")
    assert measured == pytest.approx(RESIDENT_BYTES, rel=0.3)


@pytest.mark.soak
@pytest.mark.parametrize(("count", "side", "told"), [(72, 256, 137_000_000), (100, 1024, 291_000_000), (60, 2048, LARGE_BYTES)])
def test_one_that_takes_all_frames_of_larger_clips(tmp_path: Path, count: int, side: int, told: int) -> None:
    """The most it ever has, of the figures that docs/memory.md tells."""
    write_clip(gradients(count, side), tmp_path / "clip.mp4", 40)
    with DecoderPool() as pool:
        for _ in range(3):
            assert len(pool.decode(tmp_path / "clip.mp4", 256, WHITE, DecodeLimits())) == count
        (child,) = pool._children
        measured = in_use(child.pid, "VmHWM")
    print(f"{count} frames of {side} x {side}: {measured / 1e6:.1f} MB")
    assert measured == pytest.approx(told, rel=0.3)


def test_each_process_that_loads_clips_has_one() -> None:
    assert video_decoders(4, "resident") == video_decoders(4, "cpu") == 4
    assert video_decoders(0, "resident") == 1, "the rank itself loads them"
    assert video_decoders(4, "cached") == 0
