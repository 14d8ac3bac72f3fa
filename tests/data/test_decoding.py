"""Decoding: against FFmpeg and libwebp, against frames computed by hand, and against hostile files."""

from __future__ import annotations

import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rdtf_ds.data.apng import apng_frames
from rdtf_ds.data.clip import ClipError, DecodeLimits, letterbox
from rdtf_ds.data.decoding import decode_clip, probe_clip
from rdtf_ds.data.gif import gif_frames
from rdtf_ds.data.writing import write_clip
from tests.data.hand_made import BLUE, COLOURS, GREEN, RED, Layer, Patch, apng, chunk, gif
from tests.data.players import blended, ffmpeg_frames, libwebp_frames, need, over

pytestmark = pytest.mark.filterwarnings("ignore:Invalid APNG")  # pytest takes away the filter that decoding.py sets

LIMITS = DecodeLimits()
WHITE, PINK = (255, 255, 255), (255, 100, 180)

# Where FFmpeg is no reference: it fills disposed areas with the palette's background colour where browsers clear them, refuses a GIF
# without palette, 16-bit APNG and an early frame control, or goes by frames instead of the declared count.
NOT_AS_FFMPEG = {
    "dispose_bgnd.gif", "dispose_bgnd_rgba.gif", "no_palette.gif", "no_palette_after_rgb.gif", "test_extents_transparency.gif",
    "mode_16bit.png", "fctl_actl.png", "syntax_num_frames_invalid.png", "syntax_num_frames_low.png",
}  # fmt: skip

# What Pillow cannot decode either.
BROKEN = {
    "chunk_no_fctl.png", "chunk_no_fdat.png", "chunk_repeat_fctl.png", "sequence_fdat_fctl.png", "sequence_gap.png",
    "sequence_reorder.png", "sequence_reorder_chunk.png", "sequence_repeat.png", "sequence_repeat_chunk.png", "sequence_start.png",
    "syntax_num_frames_high.png", "syntax_num_frames_zero.png", "zero_width.gif", "decompression_bomb.gif",
    "decompression_bomb_extents.gif",
}  # fmt: skip


def native(path: Path, background: tuple[int, int, int] = PINK) -> np.ndarray:
    """Decode without resizing, and cut the letterbox off."""
    info = probe_clip(path, LIMITS)
    side = max(info.width, info.height)
    frames = decode_clip(path, side, background, DecodeLimits(max_frames=LIMITS.max_source_frames))
    top, left = (side - info.height) // 2, (side - info.width) // 2
    assert len(frames) == info.num_frames
    return frames[:, top : top + info.height, left : left + info.width]


def test_gif_and_apng_agree_with_ffmpeg(real_data: Path) -> None:
    need("ffmpeg")
    compared = 0
    odd = [path for path in sorted((real_data / "odd").rglob("*.*")) if path.suffix in (".gif", ".png", ".apng")]
    for path in [*odd, *sorted((real_data / "stickers").glob("*.gif"))[::8], *sorted((real_data / "stickers").glob("*.png"))[::4]]:
        if path.name in NOT_AS_FFMPEG | BROKEN or probe_clip(path, LIMITS).num_frames == 1:
            continue
        ours = native(path)
        expected = over(ffmpeg_frames(path, ours.shape[2], ours.shape[1]), PINK)
        assert ours.shape == expected.shape, path
        assert np.abs(ours - expected).max() <= 2, path
        compared += 1
    assert compared >= 45


def test_webp_agrees_with_libwebp(real_data: Path, tmp_path: Path) -> None:
    need("webpmux", "dwebp")
    for path in sorted((real_data / "stickers").glob("*.webp"))[5:6]:
        ours, expected = native(path), over(libwebp_frames(path, tmp_path), PINK)
        assert ours.shape == expected.shape, path
        assert np.abs(ours - expected).max() <= 2, path


def test_video_agrees_with_ffmpeg(real_data: Path) -> None:
    need("ffmpeg")
    paths = sorted((real_data / "stickers").glob("*.mp4"))[:2] + sorted((real_data / "stickers").glob("*.webm"))[:2]
    for path in paths:
        ours = native(path)
        expected = ffmpeg_frames(path, ours.shape[2], ours.shape[1], "rgb24")
        assert ours.shape == expected.shape, path
        assert np.abs(ours.astype(int) - expected).mean() < 2, path  # two FFmpegs, ten years apart, convert colours a little differently


def test_every_odd_file_decodes_or_is_a_clip_error(real_data: Path) -> None:
    broken = {}
    for path in sorted(path for path in (real_data / "odd").rglob("*.*") if path.is_file()):
        try:
            frames = decode_clip(path, 32, WHITE, LIMITS)
            assert frames.dtype == np.uint8 and frames.shape[1:] == (32, 32, 3)
        except ClipError as error:
            broken[path.name] = error.reason
    assert set(broken) == BROKEN


@pytest.mark.parametrize(
    ("disposal", "transparent", "last"),
    [
        (0, None, "rrg ........."),  # kept
        (1, None, "rrg ........."),
        (2, None, "..g ........."),  # cleared to transparent, as browsers do, not to the background colour
        (3, None, "bbg ........."),  # as it was before
        (2, BLUE, "..g ........."),
    ],
)
def test_gif_disposal_by_hand(disposal: int, transparent: int | None, last: str) -> None:
    first_row = [Patch(BLUE, (0, 0, 2, 1)), Patch(RED, (0, 0, 2, 1), disposal, transparent), Patch(GREEN, (2, 0, 1, 1))]
    frames = [np.array(frame) for frame, _ in gif_frames(gif(3, 4, first_row))]
    assert len(frames) == 3
    expected = [COLOURS[mark] for mark in last.replace(" ", "")]
    for pixel, colour in zip(frames[-1].reshape(-1, 4), expected, strict=True):
        assert pixel[3] == 0 if colour is None else tuple(pixel) == (*colour, 255)
    assert tuple(frames[1][0, 0]) == (255, 0, 0, 255)


def test_gif_transparent_pixels_show_what_is_below_and_later_frames_are_clipped(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    path.write_bytes(gif(2, 2, [Patch(BLUE, (0, 0, 1, 2)), Patch(RED, (0, 0, 2, 2), transparent=RED), Patch(GREEN, (1, 1, 5, 5), delay=7)]))
    frames = decode_clip(path, 2, PINK, LIMITS)
    assert frames[1].tolist() == [[[0, 0, 255], [*PINK]], [[0, 0, 255], [*PINK]]]
    assert frames[2].tolist() == [[[0, 0, 255], [*PINK]], [[0, 0, 255], [0, 255, 0]]]
    info = probe_clip(path, LIMITS)
    assert (info.format, info.num_frames, info.width, info.height, info.has_alpha) == ("gif", 3, 2, 2, True)
    assert info.durations_ms == (50, 50, 70)


@pytest.mark.parametrize("default_image", [False, True])
@pytest.mark.parametrize("disposal", [0, 1, 2])
def test_apng_blending_and_disposal_by_hand(disposal: int, default_image: bool) -> None:
    layers = [
        Layer((200, 0, 0, 255), (0, 0, 2, 2)),
        Layer((0, 100, 0, 128), (0, 0, 3, 1), disposal),  # half over red, half over nothing
        Layer((0, 0, 50, 100), (1, 0, 2, 1), blend=0),  # replaces
    ]
    data = apng(3, 2, layers, default_image)
    frames = [np.array(frame).astype(float) for frame, duration in apng_frames(data, 3) if duration == 50]
    base = np.zeros((2, 3, 4))
    base[:, :2] = (200, 0, 0, 255)
    middle = base.copy()
    middle[:1] = blended(np.broadcast_to(np.array([0.0, 100, 0, 128]), (1, 3, 4)), base[:1])
    last = {0: middle.copy(), 1: middle.copy(), 2: base.copy()}[disposal]
    if disposal == 1:
        last[:1] = 0
    last[0, 1:] = (0, 0, 50, 100)
    for ours, expected in zip(frames, [base, middle, last], strict=True):
        assert np.abs(ours - expected).max() <= 1


def test_a_first_apng_frame_disposed_to_previous_is_cleared() -> None:
    data = apng(1, 1, [Layer((9, 9, 9, 255), (0, 0, 1, 1), disposal=2), Layer((0, 0, 0, 0), (0, 0, 1, 1))])
    assert [np.array(frame)[0, 0].tolist() for frame, _ in apng_frames(data, 2)] == [[9, 9, 9, 255], [0, 0, 0, 0]]


def test_letterbox_centres_composites_and_never_bleeds_hidden_colours() -> None:
    picture = np.zeros((2, 4, 4), np.uint8)
    picture[:, :2] = (10, 20, 30, 255)
    picture[:, 2:] = (255, 0, 0, 0)  # red under transparency
    square = letterbox(Image.fromarray(picture), 4, (0, 255, 0))
    assert square.shape == (4, 4, 3)
    assert (square[[0, 3]] == (0, 255, 0)).all() and (square[1:3, 2:] == (0, 255, 0)).all()
    assert (square[1:3, :2] == (10, 20, 30)).all()
    assert letterbox(Image.fromarray(picture), 16, (0, 255, 0))[..., 0].max() <= 12


def test_format_is_told_by_content_and_thinning_is_even(tmp_path: Path) -> None:
    frames = np.zeros((11, 4, 4, 3), np.uint8) + (np.arange(11, dtype=np.uint8) * 20)[:, None, None, None]
    for suffix in (".gif", ".webp", ".png"):
        write_clip(frames, tmp_path / f"x{suffix}")
        disguised = (tmp_path / f"x{suffix}").rename(tmp_path / f"{suffix[1:]}.mp4")
        assert probe_clip(disguised, LIMITS).format == suffix[1:]
        thinned = decode_clip(disguised, 4, WHITE, DecodeLimits(max_frames=3))
        assert thinned[:, 0, 0, 0].tolist() == [0, 100, 200]


def test_thinning_does_not_hold_all_frames(tmp_path: Path) -> None:
    write_clip(np.zeros((100, 256, 256, 3), np.uint8), tmp_path / "long.gif")
    tracemalloc.start()
    try:
        decode_clip(tmp_path / "long.gif", 16, WHITE, DecodeLimits(max_frames=8))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12 * 256 * 256 * 4  # a few canvases, not a hundred


@pytest.mark.parametrize(
    ("limits", "word"),
    [
        (DecodeLimits(max_pixels=32 * 32 - 1), "max_pixels"),
        (DecodeLimits(max_source_frames=4), "max_source_frames"),
        (DecodeLimits(max_bytes=50), "max_bytes"),
        (DecodeLimits(max_total_pixels=32 * 32 * 5 - 1), "in all"),
    ],
)
@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".mp4"])
def test_each_limit_refuses_and_says_which(tmp_path: Path, limits: DecodeLimits, word: str, suffix: str) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3), dtype=np.uint8)
    write_clip(frames, tmp_path / f"a{suffix}")
    with pytest.raises(ClipError, match=word):
        decode_clip(tmp_path / f"a{suffix}", 8, WHITE, limits)
    with pytest.raises(ClipError, match=word):
        probe_clip(tmp_path / f"a{suffix}", limits)
    just = DecodeLimits(max_pixels=32 * 32, max_source_frames=5, max_bytes=100_000, max_total_pixels=32 * 32 * 5)
    assert len(decode_clip(tmp_path / f"a{suffix}", 8, WHITE, just)) == 5


def webp_claiming(side: int) -> bytes:
    extent = struct.pack("<I", side - 1)[:3]
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + b"\x12\0\0\0" + extent * 2 + b"ANMF" + struct.pack("<I", 0)
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(
    "bomb",
    [
        pytest.param(gif(65535, 65535, [Patch(RED, (0, 0, 1, 1))]), id="gif-canvas"),
        pytest.param(gif(1, 1, [Patch(RED, (0, 0, 1, 1)), Patch(RED, (65535, 65535, 1, 1))]), id="gif-extent"),
        pytest.param(gif(1000, 1000, [Patch(RED, (0, 0, 1, 1))] * 2000), id="gif-frames"),
        pytest.param(gif(1, 1, [Patch(RED, (0, 0, 1, 1))] * 3001), id="gif-count"),
        pytest.param(apng(60000, 60000, [Layer((0, 0, 0, 0), (0, 0, 1, 1))]), id="png-canvas"),
        pytest.param(webp_claiming(16383), id="webp-canvas"),
    ],
)
def test_bombs_are_refused_before_decoding(tmp_path: Path, bomb: bytes) -> None:
    path = tmp_path / "bomb.gif"
    path.write_bytes(bomb)
    tracemalloc.start()
    started = time.perf_counter()
    try:
        with pytest.raises(ClipError, match="are more than|is more than"):
            decode_clip(path, 64, WHITE, LIMITS)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - started < 2 and peak < 4_000_000


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_truncated_files_are_broken(tmp_path: Path, suffix: str) -> None:
    frames = np.random.default_rng(1).integers(0, 255, (4, 16, 16, 4), dtype=np.uint8)
    write_clip(frames, tmp_path / f"a{suffix}")
    whole = (tmp_path / f"a{suffix}").read_bytes()
    for kept in (0, 3, 20, len(whole) // 3, len(whole) * 2 // 3, len(whole) - 40):
        path = tmp_path / f"cut{suffix}"
        path.write_bytes(whole[:kept])
        with pytest.raises(ClipError):
            decode_clip(path, 16, WHITE, LIMITS)
        with pytest.raises(ClipError):
            probe_clip(path, LIMITS)


def test_a_flipped_bit_in_an_apng_frame_is_noticed(tmp_path: Path) -> None:
    data = bytearray(apng(4, 4, [Layer((9, 9, 9, 255), (0, 0, 4, 4))] * 3))
    data[data.rindex(b"fdAT") + 12] ^= 1
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ClipError, match="checksum"):
        decode_clip(tmp_path / "a.png", 4, WHITE, LIMITS)


def test_missing_empty_and_foreign_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "empty.gif").write_bytes(b"")
    (tmp_path / "text.gif").write_text("hello, this is no picture")
    (tmp_path / "folder.gif").mkdir()
    for name, word in (("absent.gif", "No such file"), ("empty.gif", "empty"), ("text.gif", "not a GIF"), ("folder.gif", "cannot be read")):
        with pytest.raises(ClipError, match=word) as caught:
            decode_clip(tmp_path / name, 8, WHITE, LIMITS)
        assert caught.value.path.endswith(name)


SEEDS = [
    gif(3, 3, [Patch(RED, (0, 0, 3, 3)), Patch(GREEN, (1, 1, 2, 2), 3), Patch(BLUE, (0, 0, 1, 1), 2, BLUE)]),
    apng(3, 3, [Layer((9, 9, 9, 255), (0, 0, 3, 3)), Layer((9, 200, 9, 99), (1, 1, 2, 2), 1), Layer((0, 0, 0, 0), (0, 0, 1, 1), 2)]),
    apng(2, 2, [Layer((1, 2, 3, 4), (0, 0, 2, 2))]).replace(chunk(b"IEND", b""), b""),
]


EDITS = st.lists(st.tuples(st.integers(6, 400), st.integers(0, 255)), max_size=6)


@given(seed=st.sampled_from(SEEDS), edits=EDITS, cut=st.integers(0, 400))
def test_nothing_but_clip_error_leaves(
    tmp_path_factory: pytest.TempPathFactory, seed: bytes, edits: list[tuple[int, int]], cut: int
) -> None:
    data = bytearray(seed)
    for place, value in edits:
        data[place % len(data)] = value
    path = tmp_path_factory.mktemp("fuzz") / "f.gif"
    path.write_bytes(data[: max(20, len(data) - cut // 8)])
    try:
        frames = decode_clip(path, 4, WHITE, LIMITS)
    except ClipError:
        return
    assert frames.shape[1:] == (4, 4, 3)
