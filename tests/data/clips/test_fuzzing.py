"""Real clips of every image format, damaged at random: they decode or are a ClipError, within the deadline, and nothing else happens."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from rdtf_ds.data.clips.clip import ClipError, DecodeLimits
from rdtf_ds.data.clips.decoding import decode_image, examine_image

LIMITS = DecodeLimits()
WHITE = (255, 255, 255)
DAMAGES = ("flip", "truncate", "delete", "duplicate", "zero")


def damaged(data: bytes, damage: str, rng: np.random.Generator) -> bytes:
    """One kind of damage somewhere; half of it in the first 200 bytes, where headers are."""
    end = len(data) if rng.random() < 0.5 else min(len(data), 200)
    start = int(rng.integers(end))
    stop = min(len(data), start + int(rng.choice([1, 2, 7, 64, 1000, 20_000])))
    if damage == "flip":
        out = bytearray(data)
        for place in rng.integers(0, end, int(rng.integers(1, 9))).tolist():
            out[place] ^= 1 << int(rng.integers(8))
        return bytes(out)
    if damage == "truncate":
        return data[: int(rng.integers(len(data)))]
    middle = {"delete": b"", "duplicate": data[start:stop] * 2, "zero": bytes(stop - start)}[damage]
    return data[:start] + middle + data[stop:]


def fuzz(folder: Path, count: int, seed: int) -> Counter[str]:
    """Damage ``count`` clips; how many of them still decode and how many are refused."""
    paths = [path for path in sorted(folder.rglob("*.*")) if path.suffix in (".gif", ".png", ".webp", ".apng")]
    by_format = [[path for path in paths if path.suffix == suffix] for suffix in (".webp", ".gif", ".png")]
    outcomes: Counter[str] = Counter()
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        path = by_format[number % 3][int(rng.integers(len(by_format[number % 3])))]
        damage = DAMAGES[number // 3 % len(DAMAGES)]
        data = damaged(path.read_bytes(), damage, rng)
        started = time.perf_counter()
        try:
            info = examine_image(data, path, LIMITS, WHITE).info
        except ClipError:
            outcome = "refused"
        else:
            outcome = "decoded"
            kept = min(info.num_frames, LIMITS.max_frames)
            everything = decode_image(data, path, 32, WHITE, LIMITS)
            wanted = np.sort(rng.integers(0, kept, 4))
            assert everything.shape == (kept, 32, 32, 3), (number, path)
            np.testing.assert_array_equal(decode_image(data, path, 32, WHITE, LIMITS, frames=wanted), everything[wanted])
        try:
            decode_image(data, path, 32, WHITE, LIMITS, frames=[0])  # of a clip that is broken further on, this may succeed
        except ClipError:
            assert outcome == "refused", (number, path)
        assert time.perf_counter() - started < LIMITS.timeout_s, (number, path)
        outcomes[outcome] += 1
        outcomes[f"{damage}: {outcome}"] += 1
    return outcomes


def test_damaged_clips_decode_or_are_refused(real_data: Path) -> None:
    outcomes = fuzz(real_data, 150, seed=1)
    assert outcomes["refused"] + outcomes["decoded"] == 150 and outcomes["refused"] > 50
    assert outcomes["truncate: decoded"] == 0


@pytest.mark.soak
def test_a_thousand_damaged_clips(real_data: Path) -> None:
    outcomes = fuzz(real_data, 1000, seed=2)
    print(dict(sorted(outcomes.items())))
    assert outcomes["refused"] + outcomes["decoded"] == 1000
