"""Decoding: formats, frames that are asked for, limits, and what is said of files that are no good."""

from __future__ import annotations

import hashlib
import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rdtf_ds.data.clips import animation, decoding
from rdtf_ds.data.clips.clip import ClipError, DecodeLimits, Place, letterbox
from rdtf_ds.data.clips.decoding import decode_clip, examine_clip, examine_image, probe_clip
from rdtf_ds.data.clips.frame_features import thumbnail
from rdtf_ds.data.clips.writing import write_clip
from tests.data.hand_made import (
    BLUE,
    GREEN,
    RED,
    Layer,
    Patch,
    apng,
    chunk,
    gif,
    riff_chunk,
    sub_blocks,
    uint24,
    webp,
    webp_file,
    webp_picture,
)  # fmt: skip
from tests.data.players import ffmpeg_frames, need

LIMITS = DecodeLimits()
WHITE, PINK = (255, 255, 255), (255, 100, 180)
SUFFIXES = (".gif", ".webp", ".png")


def changing(count: int = 11, side: int = 4) -> np.ndarray:
    """Grey frames, each lighter by 20."""
    return np.zeros((count, side, side, 3), np.uint8) + (np.arange(count, dtype=np.uint8) * 20)[:, None, None, None]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_frames_asked_for_are_positions_among_the_thinned_ones(tmp_path: Path, suffix: str) -> None:
    path, thin = tmp_path / f"a{suffix}", DecodeLimits(max_frames=6)
    write_clip(changing(), path)
    assert decode_clip(path, 4, WHITE, thin)[:, 0, 0, 0].tolist() == [0, 40, 80, 120, 160, 200]
    assert decode_clip(path, 4, WHITE, thin, frames=[1, 1, 5])[:, 0, 0, 0].tolist() == [40, 40, 200]
    assert decode_clip(path, 4, WHITE, thin, frames=np.array([4, 0]))[:, 0, 0, 0].tolist() == [160, 0]
    for frames in ([6], [-1], [0, 7]):
        with pytest.raises(ClipError, match="has 6 frames, but"):
            decode_clip(path, 4, WHITE, thin, frames=frames)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_few_frames_decode_few_patches(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_clip(changing(), tmp_path / f"a{suffix}")
    drawn: list[animation.Patch] = []
    draw = animation._draw
    monkeypatch.setattr(animation, "_draw", lambda canvas, patch: (drawn.append(patch), draw(canvas, patch)))
    decode_clip(tmp_path / f"a{suffix}", 4, WHITE, LIMITS, frames=[3, 7, 7])
    assert len(drawn) == 2


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_bytes_that_have_changed_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    write_clip(changing(3), path)
    content = examine_clip(path, LIMITS).content
    assert content == hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(decode_clip(path, 4, WHITE, LIMITS, content=content)) == 3
    write_clip(changing(4), path)
    with pytest.raises(ClipError, match="has changed since it was indexed"):
        decode_clip(path, 4, WHITE, LIMITS, content=content)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_examined_clip_comes_with_what_frames_are_told_apart_by(tmp_path: Path, suffix: str) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (7, 24, 16, 4), dtype=np.uint8)
    frames[..., 3] = np.where(frames[..., 3] < 128, 0, 255)
    write_clip(frames, tmp_path / f"a{suffix}")
    thin = DecodeLimits(max_frames=4)
    examined = examine_clip(tmp_path / f"a{suffix}", thin, PINK, describe_size=24)
    assert (examined.info.num_frames, examined.info.width, examined.info.height, examined.info.has_alpha) == (7, 16, 24, True)
    squares = decode_clip(tmp_path / f"a{suffix}", 24, PINK, thin)
    assert examined.frames is not None and np.array_equal(examined.frames, squares)
    expected = [thumbnail(Image.fromarray(np.ascontiguousarray(square[:, 4:20]))) for square in squares]
    assert examined.thumbnails.dtype == np.uint8 and np.array_equal(examined.thumbnails, expected)
    assert examine_clip(tmp_path / f"a{suffix}", thin).frames is None


def test_opaque_clips_are_told_from_clear_ones(tmp_path: Path) -> None:
    (tmp_path / "clear").write_bytes(apng(2, 2, [Layer((1, 2, 3, 255), (0, 0, 2, 2)), Layer((1, 2, 3, 254), (0, 0, 1, 1), blend=0)]))
    (tmp_path / "opaque").write_bytes(apng(2, 2, [Layer((1, 2, 3, 255), (0, 0, 2, 2)), Layer((1, 2, 3, 254), (0, 0, 1, 1), blend=1)]))
    assert probe_clip(tmp_path / "clear", LIMITS).has_alpha and not probe_clip(tmp_path / "opaque", LIMITS).has_alpha


def test_a_clip_within_a_larger_file(tmp_path: Path) -> None:
    write_clip(changing(3), tmp_path / "a.webp")
    data = (tmp_path / "a.webp").read_bytes()
    (tmp_path / "shard.tar").write_bytes(b"x" * 512 + data + b"y" * 512)
    place = Place(tmp_path / "shard.tar", 512, len(data))
    assert np.array_equal(decode_clip(place, 8, WHITE, LIMITS), decode_clip(tmp_path / "a.webp", 8, WHITE, LIMITS))
    assert examine_clip(place, LIMITS).content == hashlib.sha256(data).hexdigest()
    with pytest.raises(ClipError, match=r"shard.tar@512: file is truncated"):
        decode_clip(Place(tmp_path / "shard.tar", 512, len(data) - 1), 8, WHITE, LIMITS)
    with pytest.raises(ClipError, match="empty file"):
        decode_clip(Place(tmp_path / "shard.tar", 512, 0), 8, WHITE, LIMITS)


def test_gif_transparent_pixels_show_what_is_below_and_later_frames_are_clipped(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    path.write_bytes(gif(2, 2, [Patch(BLUE, (0, 0, 1, 2)), Patch(RED, (0, 0, 2, 2), transparent=RED), Patch(GREEN, (1, 1, 5, 5), delay=7)]))
    frames = decode_clip(path, 2, PINK, LIMITS)
    assert frames[1].tolist() == [[[0, 0, 255], [*PINK]], [[0, 0, 255], [*PINK]]]
    assert frames[2].tolist() == [[[0, 0, 255], [*PINK]], [[0, 0, 255], [0, 255, 0]]]
    info = probe_clip(path, LIMITS)
    assert (info.format, info.num_frames, info.width, info.height, info.has_alpha) == ("gif", 3, 2, 2, True)
    assert info.durations_ms == (50, 50, 70)


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
        (DecodeLimits(max_total_pixels=32 * 32 * 5 - 1), "max_total_pixels"),
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


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_truncated_files_are_broken(tmp_path: Path, suffix: str) -> None:
    frames = np.random.default_rng(1).integers(0, 255, (4, 16, 16, 4), dtype=np.uint8)
    write_clip(frames, tmp_path / f"a{suffix}")
    whole = (tmp_path / f"a{suffix}").read_bytes()
    for kept in (0, 3, 20, len(whole) // 3, len(whole) * 2 // 3, len(whole) - 40, len(whole) - 1):
        path = tmp_path / f"cut{suffix}"
        path.write_bytes(whole[:kept])
        for frames in (None, [0]):  # though the first frame is whole in most
            with pytest.raises(ClipError):
                decode_clip(path, 16, WHITE, LIMITS, frames=frames)
        with pytest.raises(ClipError):
            probe_clip(path, LIMITS)


def still_png(depth: int, kind: int, interlaced: int, transparency: bytes) -> bytes:
    """A PNG of 13×11 pixels of any colour type, of all values there are, rows unfiltered."""
    width, height, channels = 13, 11, {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
    values = (np.arange(width * height * channels) * 37 + 5).reshape(height, width, channels) % 2 ** min(depth, 8)
    out = b""
    adam7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    passes = adam7 if interlaced else [(0, 0, 1, 1)]
    for left, top, across, down in passes:
        for row in values[top::down, left::across]:
            digits = "".join(f"{value:0{min(depth, 8)}b}" + f"{value * 7 % 256:08b}" * (depth == 16) for value in row.ravel().tolist())
            out += b"\0" + int(digits.ljust(-(-len(digits) // 8) * 8, "0"), 2).to_bytes(-(-len(digits) // 8), "big") if digits else b""
    palette = chunk(b"PLTE", bytes(value * 7 % 256 for value in range(3 * 2 ** min(depth, 8)))) if kind == 3 else b""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, interlaced))
    clear = chunk(b"tRNS", transparency) if transparency else b""
    return b"\x89PNG\r\n\x1a\n" + header + palette + clear + chunk(b"IDAT", zlib.compress(out)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("interlaced", [0, 1])
@pytest.mark.parametrize(
    ("depth", "kind", "transparency"),
    [
        (1, 0, b""), (2, 0, b""), (4, 0, b""), (8, 0, b""), (16, 0, b""), (8, 2, b""), (16, 2, b""), (1, 3, b""), (2, 3, b""), (4, 3, b""),
        (8, 3, b""), (8, 4, b""), (16, 4, b""), (8, 6, b""), (16, 6, b""), (8, 0, b"\0\x2a"), (8, 2, b"\0\5\0\x2a\0\x4f"),
        (4, 3, b"\xff\0\x80"), (8, 3, b"\xff\0\x80"), (16, 0, b"\x2a\x26"),
    ],
)  # fmt: skip
def test_every_kind_of_png_is_read_as_ffmpeg_reads_it(tmp_path: Path, depth: int, kind: int, transparency: bytes, interlaced: int) -> None:
    need("ffmpeg")
    (tmp_path / "a.png").write_bytes(still_png(depth, kind, interlaced, transparency))
    frame = np.array(next(iter(animation.play(decoding.read_png((tmp_path / "a.png").read_bytes(), 1))))[1]).astype(int)
    expected = ffmpeg_frames(tmp_path / "a.png", 13, 11)[0].astype(int)
    assert (frame[..., 3] == 0).any() or not transparency
    tolerance = 1 if depth == 16 else 0  # of 16 bits we keep the upper 8; FFmpeg rounds, and dithers
    assert np.abs(frame - expected)[expected[..., 3] > 0].max() <= tolerance


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_the_transparent_grey_of_a_png_by_hand(depth: int) -> None:
    """FFmpeg does not know it below 8 bits."""
    values = (np.arange(13 * 11) * 37 + 5).reshape(11, 13) % 2**depth
    frame = np.array(next(iter(animation.play(decoding.read_png(still_png(depth, 0, 0, b"\0\1"), 1))))[1])
    assert ((frame[..., 3] == 0) == (values == 1)).all() and (values == 1).any()
    assert (frame[..., 0] == values * 255 // (2**depth - 1))[values != 1].all()


def webp_of(left: int = 0, size: tuple[int, int] = (4, 4), pixels: tuple[int, int] = (4, 4), canvas: int = 4) -> bytes:
    """One frame whose rectangle and picture may contradict each other."""
    still = io.BytesIO()
    Image.new("RGBA", pixels, (1, 2, 3, 99)).save(still, "WEBP", lossless=True)
    picture = webp_picture(still.getvalue())
    head = uint24(left // 2) + uint24(0) + uint24(size[0] - 1) + uint24(size[1] - 1) + uint24(40) + b"\0"
    return webp_file(canvas, canvas, riff_chunk(b"ANMF", head + picture))


ONE, TWO = (chunk(b"acTL", struct.pack(">II", frames, 0)) for frames in (1, 2))
ONE_OF_TWO = apng(2, 2, [Layer((1, 2, 3, 4), (0, 0, 2, 2))]).replace(ONE, TWO)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (webp_of(pixels=(4, 5)), "4×5 pixels where 4×4 are declared"),
        (webp_of(left=2), "leaves the canvas"),
        (webp_of().replace(b"ANIM", b"XXXX"), "before the ANIM chunk"),
        (webp_of().replace(b"VP8L", b"XXXX"), "without a picture"),
        (webp_of().replace(b"ANMF", b"XXXX"), "empty: 0 frames"),
        (webp_file(4, 4, riff_chunk(b"ANMF", b"\0" * 15)), "cut short"),
        (apng(2, 2, [Layer((1, 2, 3, 4), (0, 0, 2, 2)), Layer((1, 2, 3, 4), (1, 0, 2, 2))]), "leaves the canvas"),
        (ONE_OF_TWO, "1 frames found, 2 declared"),
        (gif(2, 2, [Patch(RED, (0, 0, 2, 2))])[:-1], "no end mark"),
        (gif(2, 2, [Patch(RED, (0, 0, 0, 2))]), "without pixels"),
        (gif(2, 2, []), "empty: 0 frames"),
        (gif(1, 1, [Patch(RED, (0, 0, 1, 1))]).replace(b"\0\x3b", sub_blocks(b"\1" * 69) + b"\0\x3b"), "more data than 1×1"),
    ],
)  # fmt: skip
def test_files_that_contradict_themselves(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "a").write_bytes(data)
    for attempt in (lambda: examine_clip(tmp_path / "a", LIMITS), lambda: decode_clip(tmp_path / "a", 4, WHITE, LIMITS, frames=[0])):
        with pytest.raises(ClipError, match=reason):
            attempt()


def test_the_webp_that_is_contradicted_above_is_fine_otherwise(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(webp_of())
    assert decode_clip(tmp_path / "a", 4, (0, 0, 0), LIMITS).shape == (1, 4, 4, 3)


def test_want_of_memory_is_no_fault_of_the_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(animation, "_draw", fail)
    with pytest.raises(ClipError, match="MemoryError") as caught:
        examine_image(gif(1, 1, [Patch(RED, (0, 0, 1, 1))]), "a.gif", LIMITS, WHITE)
    assert caught.value.transient


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
    for name, word in (("absent.gif", "No such file"), ("empty.gif", "empty"), ("text.gif", "not a GIF"), ("folder.gif", "is a folder")):
        with pytest.raises(ClipError, match=word) as caught:
            decode_clip(tmp_path / name, 8, WHITE, LIMITS)
        assert caught.value.path.endswith(name)


CLEAR_AND_BACK = [Layer((9, 9, 9, 255), (0, 0, 3, 3)), Layer((9, 200, 9, 99), (0, 2, 2, 1), 1), Layer((0, 0, 0, 0), (0, 0, 1, 1), 0)]
SEEDS = [
    gif(3, 3, [Patch(RED, (0, 0, 3, 3)), Patch(GREEN, (1, 1, 2, 2), 3), Patch(BLUE, (0, 0, 1, 1), 2, BLUE)]),
    apng(3, 3, CLEAR_AND_BACK),
    apng(2, 2, [Layer((1, 2, 3, 4), (0, 0, 2, 2))]).replace(chunk(b"IEND", b""), b""),
    webp(3, 3, CLEAR_AND_BACK),
    webp(3, 3, CLEAR_AND_BACK, lossless=False),
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
