"""Whole videos through decord, in the process that the package decodes them in."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rdtf_ds.data.clips.clip import ClipError, DecodeLimits, Place, VideoLength, letterbox
from rdtf_ds.data.clips.decoder_pool import DecoderPool
from rdtf_ds.data.clips.decoding import decode_clip, probe_clip
from rdtf_ds.data.clips.frame_features import thumbnail
from rdtf_ds.data.clips.writing import write_clip
from tests.data.moving_pictures import all_frames, encode, pictures, with_hidden_packets

LIMITS = DecodeLimits()
WHITE, RED = (255, 255, 255), (255, 0, 0)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine grey frames, each brighter than the one before."""
    path = tmp_path_factory.mktemp("video") / "steps.webm"
    frames = np.zeros((9, 64, 80, 3), np.uint8) + (np.arange(9, dtype=np.uint8) * 25 + 20)[:, None, None, None]
    write_clip(frames, path, 80)
    return path


def letterboxed(frames: np.ndarray, size: int, background: tuple[int, int, int] = WHITE) -> np.ndarray:
    return np.stack([letterbox(Image.fromarray(frame), size, background) for frame in frames])


def test_frames_are_thinned_in_order_and_letterboxed(clip: Path) -> None:
    frames = decode_clip(clip, 40, RED, DecodeLimits(max_frames=3))
    assert frames.shape == (3, 40, 40, 3)
    assert np.abs(frames[:, 20, 20].astype(int) - np.array([20, 120, 220])[:, None]).max() <= 4
    assert (frames[:, :4] == RED).all() and (frames[:, 36:] == RED).all()


def test_examining_says_what_the_file_is(pool: DecoderPool, clip: Path) -> None:
    found = pool.examine(clip, DecodeLimits(max_frames=5), RED, describe_size=24)
    info = found.info
    assert (info.format, info.num_frames, info.width, info.height, info.has_alpha) == ("webm", 9, 80, 64, False)
    assert len(info.durations_ms) == 9 and all(abs(duration - 80) <= 2 for duration in info.durations_ms)
    assert found.content == hashlib.sha256(clip.read_bytes()).hexdigest() and found.window is None
    assert found.frames is not None and np.array_equal(found.frames, pool.decode(clip, 24, RED, DecodeLimits(max_frames=5)))
    assert found.thumbnails.shape == (5, 192) and found.thumbnails.dtype == np.uint8
    assert np.abs(found.thumbnails.astype(int) - np.array([20, 70, 120, 170, 220])[:, None]).max() <= 4
    assert pool.examine(clip, LIMITS).frames is None


def test_only_the_chosen_frames_come_in_the_order_asked(pool: DecoderPool, clip: Path) -> None:
    limits = DecodeLimits(max_frames=5)
    everything = pool.decode(clip, 20, WHITE, limits)
    for frames in ([0], [4], [1, 3], [3, 1, 1, 4], [2, 2]):
        assert np.array_equal(pool.decode(clip, 20, WHITE, limits, frames=frames), everything[frames])


@pytest.mark.parametrize("frames", [[5], [-1], [0, 9]])
def test_a_frame_that_is_not_there_is_an_error(pool: DecoderPool, clip: Path, frames: list[int]) -> None:
    with pytest.raises(ClipError, match=r"was asked for, and it has 5: it has changed since it was indexed"):
        pool.decode(clip, 20, WHITE, DecodeLimits(max_frames=5), frames=frames)


def test_other_bytes_than_expected_are_refused(pool: DecoderPool, clip: Path, tmp_path: Path) -> None:
    content = pool.examine(clip, LIMITS).content
    assert len(pool.decode(clip, 16, WHITE, LIMITS, content=content)) == 9
    with pytest.raises(ClipError, match="has changed since it was indexed"):
        pool.decode(clip, 16, WHITE, LIMITS, content="0" * 64)


@pytest.mark.parametrize("side", [8, 16, 24, 48, 72])
def test_pictures_too_narrow_for_decord_come_out_right(tmp_path: Path, pool: DecoderPool, side: int) -> None:
    frames = np.full((3, side, side, 3), (40, 90, 200), np.uint8)
    write_clip(frames, tmp_path / "small.mp4")
    found = pool.examine(tmp_path / "small.mp4", LIMITS)
    assert (found.info.width, found.info.height) == (side, side)
    assert np.abs(found.thumbnails.reshape(3, 8, 8, 3).astype(int) - (40, 90, 200)).max() <= 6
    assert np.abs(decode_clip(tmp_path / "small.mp4", 16, WHITE, LIMITS).astype(int) - (40, 90, 200)).max() <= 6


@pytest.mark.parametrize("width", [128, 130, 150, 198])
def test_rows_of_any_length_come_out_as_pyav_has_them(tmp_path: Path, pool: DecoderPool, width: int) -> None:
    path = encode(tmp_path / "wide.mp4", pictures(5, width, 66), "libx264", bf="2")
    expected = all_frames(path)
    assert np.array_equal(pool.decode(path, 64, RED, LIMITS), letterboxed(expected, 64, RED))
    thumbnails = np.stack([thumbnail(Image.fromarray(frame)) for frame in expected])
    assert np.array_equal(pool.examine(path, LIMITS).thumbnails, thumbnails)


def test_what_an_edit_list_cuts_away_is_no_frame(tmp_path: Path, pool: DecoderPool) -> None:
    path = encode(tmp_path / "cut.mp4", pictures(60), "libx264", [512 * (number - 33) for number in range(60)], g="40", bf="2")
    expected = all_frames(path)
    assert len(expected) == 27
    assert pool.examine(path, LIMITS).info.num_frames == 27
    assert np.array_equal(pool.decode(path, 96, WHITE, LIMITS), letterboxed(expected, 96))


def test_pictures_that_nobody_sees_are_no_frames(tmp_path: Path, pool: DecoderPool) -> None:
    plain = encode(tmp_path / "plain.webm", pictures(40), "libvpx", g="30", deadline="realtime")
    path = with_hidden_packets(plain, tmp_path / "hidden.webm", every=7)
    expected = all_frames(path)
    assert len(expected) == 40 and not np.array_equal(expected, all_frames(plain))
    assert pool.examine(path, LIMITS).info.num_frames == 40
    assert np.array_equal(pool.decode(path, 96, WHITE, LIMITS), letterboxed(expected, 96))


@pytest.mark.parametrize(("name", "codec"), [("uneven.mp4", "libx264"), ("uneven.webm", "libvpx")])
def test_uneven_durations_are_how_long_each_frame_is_seen(tmp_path: Path, pool: DecoderPool, name: str, codec: str) -> None:
    milliseconds = [40, 400, 80, 1000, 200, 40]
    starts = np.cumsum([0, *milliseconds[:-1]])
    path = encode(tmp_path / name, pictures(6), codec, [int(start) * 12800 // 1000 for start in starts])
    durations = pool.examine(path, LIMITS).info.durations_ms
    assert all(abs(a - b) <= 1 for a, b in zip(durations[:-1], milliseconds[:-1], strict=True)) and durations[-1] >= 1
    length = pool.measure(path, LIMITS)
    assert length.frames == 6 and abs(1000 * length.seconds - sum(durations)) <= 3


def test_measuring_decodes_nothing(tmp_path: Path, pool: DecoderPool) -> None:
    path = encode(tmp_path / "long.mp4", pictures(75), "libx264")
    assert pool.measure(path, DecodeLimits(max_source_frames=10, max_total_pixels=1)) == VideoLength(75, 3.0)


def test_a_video_inside_a_shard_is_read_where_it_lies(tmp_path: Path, pool: DecoderPool, clip: Path) -> None:
    data = clip.read_bytes()
    shard = tmp_path / "shard.tar"
    shard.write_bytes(b"\x1a\x45\xdf\xa3" * 333 + data + data[:500])
    place = Place(shard, 4 * 333, len(data))
    assert pool.examine(place, LIMITS).info == pool.examine(clip, LIMITS).info
    assert np.array_equal(pool.decode(place, 32, WHITE, LIMITS), pool.decode(clip, 32, WHITE, LIMITS))
    with pytest.raises(ClipError, match=r"rdtf.data.max_bytes") as caught:
        pool.examine(place, DecodeLimits(max_bytes=len(data) - 1))
    assert caught.value.path == str(place)


@pytest.mark.parametrize(
    ("limits", "key"),
    [
        (DecodeLimits(max_bytes=100), "max_bytes"),
        (DecodeLimits(max_pixels=80 * 64 - 1), "max_pixels"),
        (DecodeLimits(max_source_frames=8), "max_source_frames"),
        (DecodeLimits(max_total_pixels=9 * 80 * 64 - 1), "max_total_pixels"),
    ],
)
def test_each_limit_is_named(pool: DecoderPool, clip: Path, limits: DecodeLimits, key: str) -> None:
    for ask in (lambda: pool.examine(clip, limits), lambda: pool.decode(clip, 16, WHITE, limits, frames=[0])):
        with pytest.raises(ClipError, match=rf"rdtf.data.{key}") as caught:
            ask()
        assert not caught.value.transient
    exact = DecodeLimits(max_bytes=clip.stat().st_size, max_pixels=80 * 64, max_source_frames=9, max_total_pixels=9 * 80 * 64)
    assert pool.examine(clip, exact).info.num_frames == 9


def test_broken_videos_say_the_same_each_time(pool: DecoderPool, clip: Path, tmp_path: Path) -> None:
    data = clip.read_bytes()
    junk = b"\0\0\0\x20ftypisom" + bytes(range(256)) * 20
    for name, broken in (("junk.mp4", junk), ("cut.webm", data[:60]), ("head.webm", data[: len(data) // 3]), ("empty.mp4", b"")):
        (tmp_path / name).write_bytes(broken)
        reasons = []
        for _ in range(2):
            with pytest.raises(ClipError) as caught:
                pool.examine(tmp_path / name, LIMITS)
            assert not caught.value.transient
            reasons.append(caught.value.reason)
        assert len(set(reasons)) == 1 and "github" not in reasons[0]
    for missing in (tmp_path / "missing.mp4", tmp_path):
        with pytest.raises(ClipError):
            pool.examine(missing, LIMITS)


def test_a_link_is_not_followed(pool: DecoderPool, clip: Path, tmp_path: Path) -> None:
    (tmp_path / "link.webm").symlink_to(clip)
    with pytest.raises(ClipError, match="is a symbolic link"):
        pool.examine(tmp_path / "link.webm", LIMITS)


def test_a_codec_that_decord_is_too_old_for_is_named(tmp_path: Path, pool: DecoderPool) -> None:
    path = encode(tmp_path / "new.webm", pictures(4), "libsvtav1", preset="12")
    with pytest.raises(ClipError, match=r"decord cannot decode AV1.*encode it as VP9 or H.264"):
        pool.examine(path, LIMITS)
    assert [part.info.num_frames for part in pool.examine_windows(path, LIMITS, WHITE, 9.0)] == [4]


def test_real_videos_decode_as_pyav_has_them(real_data: Path, pool: DecoderPool) -> None:
    clips = [path for path in sorted((real_data / "stickers").iterdir()) if path.suffix in (".mp4", ".webm")]
    assert len(clips) >= 16
    for path in clips:
        assert np.array_equal(pool.decode(path, 64, WHITE, LIMITS), letterboxed(all_frames(path), 64)), path.name


def test_decord_is_never_imported_here(clip: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from rdtf_ds.data.clips.decoding import *; "
        f"decode_clip(Path({str(clip)!r}), 16, (0, 0, 0), DecodeLimits()); print({{'decord', 'av', 'torch'}} & set(sys.modules))"
    )
    root = Path(__file__).resolve().parents[3]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=120, check=True)
    assert result.stdout.strip() == "set()"


def test_a_probe_goes_the_same_way(clip: Path, pool: DecoderPool) -> None:
    assert probe_clip(clip, LIMITS) == pool.examine(clip, LIMITS).info
