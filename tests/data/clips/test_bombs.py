"""Small files that ask for much: each is refused with a reason, and the resident memory of the process hardly rises."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rdtf_ds.data.clips.clip import DecodeLimits
from rdtf_ds.data.clips.containers import join_gif
from rdtf_ds.data.clips.decoding import decode_clip
from tests.data.hand_made import RED, Layer, Patch, apng, chunk, gif, riff_chunk, sub_blocks, uint24, webp, webp_file

# One process for each: prints the reason of the refusal, or null, and by how many bytes its peak of resident memory rose.
_CHILD = """
import json, resource, sys
from rdtf_ds.data.clips.clip import ClipError, DecodeLimits
from rdtf_ds.data.clips.decoding import decode_clip, examine_clip
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = {}
for path in sys.argv[1:]:
    reasons = []
    for attempt in (lambda: examine_clip(path, DecodeLimits()), lambda: decode_clip(path, 64, (255, 255, 255), DecodeLimits(), frames=[0])):
        try:
            attempt()
            reasons.append(None)
        except ClipError as error:
            reasons.append(error.reason)
    report[path.rpartition("/")[2]] = [*reasons, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024]
print(json.dumps(report))
"""


@cache
def large_gif() -> bytes:
    """20 frames of 4000×4000 in some 260 KB."""
    still = io.BytesIO()
    Image.new("P", (4000, 4000)).save(still, "GIF")
    return join_gif([still.getvalue()] * 20, [50] * 20)


def png(width: int, height: int, rows: int, row: bytes, depth: int = 8) -> bytes:
    """A grey PNG that declares one size and holds ``rows`` rows of these bytes."""
    compressor = zlib.compressobj(9)
    data = b"".join([compressor.compress(row * 1000) for _ in range(rows // 1000)]) + compressor.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def lossless_head(width: int, height: int) -> bytes:
    """A VP8L chunk that declares a size and holds next to nothing."""
    return riff_chunk(b"VP8L", b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14 | 1 << 28) + b"\0" * 20)


def webp_frame(width: int, height: int, picture: bytes) -> bytes:
    return riff_chunk(b"ANMF", uint24(0) * 2 + uint24(width - 1) + uint24(height - 1) + uint24(40) + b"\0" + picture)


@cache
def bombs() -> dict[str, tuple[bytes, str]]:
    """The bytes of each, and what is said of it."""
    dot, clear = Patch(RED, (0, 0, 1, 1)), (0, 0, 0, 0)
    two = gif(1, 1, [dot, dot])
    last = two.rindex(b"\x2c" + struct.pack("<HHHH", 0, 0, 1, 1))
    huge_patch = two[:last] + b"\x2c" + struct.pack("<HHHH", 0, 0, 65535, 65535) + two[last + 9 :]
    return {
        "large.gif": (large_gif(), "more than rdtf.data.max_total_pixels"),
        "long.gif": (gif(1, 1, [dot] * 10_000), "more than rdtf.data.max_source_frames"),
        "long.png": (apng(1, 1, [Layer(clear, (0, 0, 1, 1))] * 10_000), "more than rdtf.data.max_source_frames"),
        "long.webp": (webp_file(1, 1, webp_frame(1, 1, lossless_head(1, 1)) * 10_000), "more than rdtf.data.max_source_frames"),
        "large.png": (png(10_000, 10_000, 10_000, bytes(10_001)), "more than rdtf.data.max_pixels"),
        "screen.gif": (gif(65535, 65535, [dot]), "more than rdtf.data.max_pixels"),
        "patch.gif": (huge_patch, "more than rdtf.data.max_pixels"),
        "far.gif": (gif(1, 1, [Patch(RED, (65535, 65535, 1, 1))]), "more than rdtf.data.max_pixels"),
        "patches.gif": (large_gif().replace(struct.pack("<HH", 4000, 4000), struct.pack("<HH", 4, 4), 1), "more than rdtf.data.max"),
        "patch.png": (apng(1, 1, [Layer(clear, (0, 0, 1, 1)), Layer(clear, (0, 0, 900, 900))]), "leaves the canvas"),
        "zlib.png": (png(16, 16, 100_000, bytes(1000)), "more data than the 272 bytes"),
        "lzw.gif": (gif(1, 1, [dot]).replace(b"\0\x3b", sub_blocks(bytes(200_000)) + b"\0\x3b"), "more data than 1×1 pixels"),
        "screen.webp": (webp_file(16383, 16383, b""), "frames of 16383"),
        "lie.webp": (webp_file(16, 16, webp_frame(16, 16, lossless_head(16383, 16383))), "16383×16383 pixels where 16×16 are declared"),
        "hollow.webp": (webp_file(4096, 4096, webp_frame(4096, 4096, lossless_head(4096, 4096))), "failed to read next frame"),
        "still.webp": (riff_chunk(b"RIFF", b"WEBP" + lossless_head(16383, 16383)), "more than rdtf.data.max_pixels"),
        "deep.png": (png(4096, 4096, 1000, bytes(8193), depth=16), "truncated"),
    }


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, project_root: Path) -> dict[str, tuple[str | None, str | None, int]]:
    folder = tmp_path_factory.mktemp("bombs")
    paths = []
    for name, (data, _) in bombs().items():
        assert len(data) < 2_000_000, name
        paths.append(str(folder / name))
        (folder / name).write_bytes(data)
    command = [sys.executable, "-c", _CHILD, *paths]
    done = subprocess.run(command, capture_output=True, text=True, cwd=project_root, timeout=120, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", bombs())
def test_a_bomb_is_refused_with_a_reason(name: str, report: dict[str, tuple[str | None, str | None, int]]) -> None:
    examined, decoded, rise = report[name]
    for reason in (examined, decoded):
        assert reason is not None and bombs()[name][1] in reason, reason
    assert rise <= 300 * 2**20


def test_data_beyond_the_last_pixel_of_a_gif_are_not_decoded(tmp_path: Path) -> None:
    """A picture of 4000×4000 pixels that declares 300×300: what is beyond is left alone, as all players do."""
    still = io.BytesIO()
    Image.new("P", (4000, 4000), 1).save(still, "GIF")
    (tmp_path / "a.gif").write_bytes(still.getvalue().replace(struct.pack("<HH", 4000, 4000), struct.pack("<HH", 300, 300)))
    frames = decode_clip(tmp_path / "a.gif", 300, (9, 9, 9), DecodeLimits())
    assert frames.shape == (1, 300, 300, 3) and (np.ptp(frames, axis=(0, 1, 2)) == 0).all()


def test_the_webp_of_these_bombs_would_be_fine(tmp_path: Path) -> None:
    (tmp_path / "a.webp").write_bytes(webp(16, 16, [Layer((1, 2, 3, 255), (0, 0, 16, 16))]))
    assert decode_clip(tmp_path / "a.webp", 16, (9, 9, 9), DecodeLimits())[0, 0, 0].tolist() == [1, 2, 3]
