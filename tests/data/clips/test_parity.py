"""Real clips and every odd file, against decoders that are not Pillow: FFmpeg for GIF and APNG, the system's libwebp for WebP.

No pixel may differ. Where FFmpeg is no reference, the file stands below with the reason; the same table is in docs/data.md.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rdtf_ds.data.clips.animation import play
from rdtf_ds.data.clips.clip import ClipError, DecodeLimits
from rdtf_ds.data.clips.decoding import _parse, decode_clip, examine_clip
from tests.data.players import ffmpeg_frames, libwebp_frames, need, shown

pytestmark = pytest.mark.filterwarnings("ignore:Invalid APNG")
LIMITS = DecodeLimits()

_CLEARS = "FFmpeg fills what is disposed of with the palette's background colour; browsers clear it, and so do we"
DISAGREEMENTS = {
    "dispose_bgnd.gif": _CLEARS,
    "dispose_bgnd_rgba.gif": _CLEARS,
    "test_extents_transparency.gif": _CLEARS,
    "no_palette.gif": "FFmpeg refuses a GIF without a palette; the standard leaves the colours to the decoder, we take greys",
    "no_palette_after_rgb.gif": "the same, from the second frame on",
    "decompression_bomb_extents.gif": "FFmpeg refuses a frame that leaves the canvas; browsers clip it, and so do we",
    "mode_16bit.png": "FFmpeg does not decode a second frame of 16 bits a channel; the standard allows it, the first frames are equal",
    "fctl_actl.png": "FFmpeg refuses a frame control before acTL; the standard sets no order between them",
    "syntax_num_frames_low.png": "acTL declares one frame of two; FFmpeg goes by what it finds, we and browsers by what is declared",
    "syntax_num_frames_invalid.png": "acTL declares more than a PNG may; FFmpeg plays it, we show the default image as libpng's readers do",
}

# Broken by their standard's own words, as their names say (Pillow's tests for its own refusals).
BROKEN = {
    "chunk_no_fctl.png", "chunk_no_fdat.png", "chunk_repeat_fctl.png", "sequence_fdat_fctl.png", "sequence_gap.png",
    "sequence_reorder.png", "sequence_reorder_chunk.png", "sequence_repeat.png", "sequence_repeat_chunk.png", "sequence_start.png",
    "syntax_num_frames_high.png", "syntax_num_frames_zero.png", "zero_width.gif", "decompression_bomb.gif",
}  # fmt: skip


def pictures(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*.*")) if path.suffix in (".gif", ".png", ".apng", ".webp")]


def frames_that_differ(path: Path) -> int:
    """How many frames are not shown as the other decoder shows them, be it that it has fewer or more; hidden colours count for WebP."""
    animation = _parse(path.read_bytes(), path, LIMITS)[1]
    ours = np.stack([np.array(canvas) for _, canvas in play(animation)])
    if path.suffix == ".webp":
        theirs, durations = libwebp_frames(path)
        if len(theirs) > 1:
            assert durations == [patch.duration_ms for patch in animation.patches]
    else:
        ours, theirs = shown(ours), shown(ffmpeg_frames(path, animation.width, animation.height))
    if theirs.shape[1:] != ours.shape[1:]:
        return len(ours)
    both = min(len(ours), len(theirs))
    return int((ours[:both] != theirs[:both]).any(axis=(1, 2, 3)).sum()) + abs(len(ours) - len(theirs))


def test_every_odd_file_is_decoded_or_refused_as_listed(real_data: Path) -> None:
    broken = set()
    for path in pictures(real_data / "odd"):
        try:
            frames = decode_clip(path, 32, (255, 255, 255), LIMITS)
            assert frames.dtype == np.uint8 and frames.shape[1:] == (32, 32, 3)
        except ClipError:
            broken.add(path.name)
            with pytest.raises(ClipError):
                examine_clip(path, LIMITS)
    assert broken == BROKEN


def test_odd_files_and_a_sample_of_real_clips_agree_to_the_last_bit(real_data: Path) -> None:
    need("ffmpeg")
    stickers = pictures(real_data / "stickers")
    for path in [*pictures(real_data / "odd"), *stickers[::16]]:
        if path.name not in BROKEN:
            assert (frames_that_differ(path) > 0) == (path.name in DISAGREEMENTS), path


@pytest.mark.soak
def test_all_real_clips_agree_to_the_last_bit(real_data: Path) -> None:
    need("ffmpeg")
    paths = pictures(real_data / "stickers")
    assert len(paths) == 80
    assert {path.name: count for path in paths if (count := frames_that_differ(path))} == {}


@pytest.mark.soak
def test_chosen_frames_of_all_real_clips_equal_the_same_of_all(real_data: Path) -> None:
    rng = np.random.default_rng(0)
    for path in pictures(real_data):
        if path.name in BROKEN:
            continue
        everything = decode_clip(path, 64, (255, 100, 180), LIMITS)
        for _ in range(3):
            wanted = np.sort(rng.integers(0, len(everything), 8))
            np.testing.assert_array_equal(decode_clip(path, 64, (255, 100, 180), LIMITS, frames=wanted), everything[wanted])


def test_video_agrees_with_ffmpeg(real_data: Path) -> None:
    need("ffmpeg")
    stickers = real_data / "stickers"
    for path in sorted(stickers.glob("*.mp4"))[:2] + sorted(stickers.glob("*.webm"))[:2]:
        info = examine_clip(path, LIMITS).info
        side = max(info.width, info.height)
        top, left = (side - info.height) // 2, (side - info.width) // 2
        ours = decode_clip(path, side, (0, 0, 0), LIMITS)[:, top : top + info.height, left : left + info.width]
        expected = ffmpeg_frames(path, info.width, info.height, "rgb24")
        assert ours.shape == expected.shape, path
        assert np.abs(ours.astype(int) - expected).mean() < 2, path  # two FFmpegs, ten years apart, convert colours a little differently
