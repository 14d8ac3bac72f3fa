"""Clips out of long videos: cut by time, and the same pixels whether the frames before them were decoded or not."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rdtf_ds.data.clips import decoder_pool, video_windows
from rdtf_ds.data.clips.clip import ClipError, DecodeLimits, Place, Window, letterbox
from rdtf_ds.data.clips.decoder_pool import DecoderPool
from rdtf_ds.data.clips.frame_features import thumbnail
from rdtf_ds.data.clips.timeline import Timeline
from rdtf_ds.data.clips.writing import write_clip
from tests.data.moving_pictures import all_frames, encode, pictures, with_hidden_packets

LIMITS = DecodeLimits()
WHITE, RED = (255, 255, 255), (255, 0, 0)
_QUIET = {"x265-params": "log-level=error:keyint=30:bframes=3"}
VIDEOS: dict[str, Callable[[Path], Path]] = {
    "b_frames.mp4": lambda path: encode(path, pictures(300, 128, 64), "libx264", g="120", bf="3"),
    "open_groups.mp4": lambda path: encode(path, pictures(150, 128, 64), "libx264", g="40", bf="3", **{"x264-params": "open-gop=1"}),
    "gradual_refresh.mp4": lambda path: encode(path, pictures(120, 128, 64), "libx264", g="30", **{"intra-refresh": "1"}),
    "hevc.mp4": lambda path: encode(path, pictures(90, 128, 64), "libx265", **_QUIET),
    "mpeg4.mp4": lambda path: encode(path, pictures(90, 128, 64), "mpeg4", g="30", bf="2"),
    "edit_list.mp4": lambda path: encode(
        path, pictures(120, 128, 64), "libx264", [512 * (number - 33) for number in range(120)], g="40", bf="2"
    ),
    "vp9.webm": lambda path: encode(path, pictures(300, 128, 64), "libvpx-vp9", g="120", deadline="realtime", **{"cpu-used": "8"}),
    "uneven.webm": lambda path: encode(
        path, pictures(60, 128, 64), "libvpx", [128 * (5 * n + n % 4) for n in range(60)], g="20", deadline="realtime"
    ),
    "hidden.webm": lambda path: with_hidden_packets(
        encode(path.with_stem("plain"), pictures(60, 128, 64), "libvpx", g="20", deadline="realtime"), path, every=7
    ),
    "narrow.mp4": lambda path: encode(path, pictures(60, 48, 64), "libx264", g="20"),
}


@pytest.fixture(scope="module")
def long_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3.96 s at 25 frames a second: keys at 0 and 60."""
    return encode(tmp_path_factory.mktemp("long") / "long.mp4", pictures(99, 128, 64), "libx264", g="60", bf="3", sc_threshold="0")


@pytest.mark.parametrize("name", VIDEOS)
def test_a_window_decodes_as_the_whole_video_does(tmp_path: Path, pool: DecoderPool, name: str) -> None:
    path = VIDEOS[name](tmp_path / name)
    expected = all_frames(path)
    clips = list(pool.examine_windows(path, LIMITS, WHITE, 0.9))
    assert sum(clip.info.num_frames for clip in clips) == len(expected) and len(clips) >= 3
    rng = np.random.default_rng(0)
    for number in rng.permutation(len(clips)):
        window = clips[number].window
        assert window is not None
        stretch = expected[window.first : window.first + window.count]
        thumbnails = np.stack([thumbnail(Image.fromarray(frame)) for frame in stretch])
        assert np.array_equal(clips[number].thumbnails, thumbnails)
        squares = np.stack([letterbox(Image.fromarray(frame), 64, RED) for frame in stretch])
        assert np.array_equal(pool.decode(path, 64, RED, LIMITS, window=window), squares)
        last = [window.count - 1, 0, window.count - 1]
        assert np.array_equal(pool.decode(path, 64, RED, LIMITS, window=window, frames=last), squares[last])


def test_any_window_at_all(pool: DecoderPool, long_video: Path) -> None:
    expected = all_frames(long_video)
    for first in range(0, 99, 7):
        window = Window(first, min(5, 99 - first))
        got = pool.decode(long_video, 128, WHITE, LIMITS, window=window)
        squares = [letterbox(Image.fromarray(frame), 128, WHITE) for frame in expected[first : first + window.count]]
        assert np.array_equal(got, np.stack(squares))


def test_windows_are_cut_by_time_and_say_what_they_are(pool: DecoderPool, long_video: Path) -> None:
    limits = DecodeLimits(max_frames=10)
    clips = list(pool.examine_windows(long_video, limits, RED, 1.0, describe_size=32))
    assert [clip.window for clip in clips] == [Window(0, 25), Window(25, 25), Window(50, 25), Window(75, 24)]
    whole = hashlib.sha256(long_video.read_bytes()).hexdigest()
    for clip in clips:
        assert clip.window is not None and clip.frames is not None
        assert (clip.info.format, clip.info.num_frames, clip.info.width, clip.info.height) == ("mp4", clip.window.count, 128, 64)
        assert clip.info.durations_ms == (40,) * clip.window.count
        assert clip.content == hashlib.sha256(f"{whole} {clip.window.first} {clip.window.count}".encode()).hexdigest()
        assert clip.thumbnails.shape == (10, 192)
        assert np.array_equal(clip.frames, pool.decode(long_video, 32, RED, limits, window=clip.window))


def test_limits_hold_for_each_window_and_bytes_for_none(pool: DecoderPool, long_video: Path) -> None:
    fitting = DecodeLimits(max_bytes=10, max_source_frames=25, max_total_pixels=25 * 128 * 64)
    assert len(list(pool.examine_windows(long_video, fitting, WHITE, 1.0))) == 4
    assert len(pool.decode(long_video, 16, WHITE, fitting, window=Window(0, 25))) == 25
    for limits, key in (
        (DecodeLimits(max_source_frames=24), "max_source_frames"),
        (DecodeLimits(max_total_pixels=25 * 128 * 64 - 1), "max_total_pixels"),
        (DecodeLimits(max_pixels=128 * 64 - 1), "max_pixels"),
    ):
        with pytest.raises(ClipError, match=key):
            list(pool.examine_windows(long_video, limits, WHITE, 1.0))
        with pytest.raises(ClipError, match=key):
            pool.decode(long_video, 16, WHITE, limits, window=Window(0, 25))


def test_a_video_is_not_split_into_too_many(pool: DecoderPool, long_video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_pool, "MAX_WINDOWS", 4)
    assert len(list(pool.examine_windows(long_video, LIMITS, WHITE, 1.0))) == 4
    with pytest.raises(ClipError, match=r"split into 5 clips of rdtf.data.video_clip_s \(0.9 s\), and 4 are the most"):
        list(pool.examine_windows(long_video, LIMITS, WHITE, 0.9))


def test_a_window_beyond_the_end_means_that_the_file_has_changed(pool: DecoderPool, long_video: Path) -> None:
    assert len(pool.decode(long_video, 16, WHITE, LIMITS, window=Window(90, 9))) == 9
    with pytest.raises(ClipError, match="has 99 frames, and 100 are needed: it has changed since it was indexed"):
        pool.decode(long_video, 16, WHITE, LIMITS, window=Window(90, 10))


def test_a_rewritten_video_is_looked_at_anew(pool: DecoderPool, tmp_path: Path) -> None:
    path = encode(tmp_path / "video.mp4", pictures(30, 128, 64), "libx264")
    assert pool.measure(path, LIMITS).frames == 30
    encode(path, pictures(40, 128, 64), "libx264")
    assert pool.measure(path, LIMITS).frames == 40


def test_a_video_of_as_many_frames_is_another_one(pool: DecoderPool, tmp_path: Path) -> None:
    path = encode(tmp_path / "video.mp4", pictures(30, 128, 64), "libx264")
    clips = list(pool.examine_windows(path, LIMITS, WHITE, 0.5))
    for clip in clips:
        assert len(pool.decode(path, 16, WHITE, LIMITS, content=clip.content, window=clip.window)) == clip.info.num_frames
    with pytest.raises(ClipError, match="has changed since it was indexed"):
        pool.decode(path, 16, WHITE, LIMITS, content=clips[1].content, window=clips[0].window)
    encode(path, pictures(30, 128, 64)[::-1].copy(), "libx264")
    for clip in clips:
        with pytest.raises(ClipError, match="has changed since it was indexed") as caught:
            pool.decode(path, 16, WHITE, LIMITS, content=clip.content, window=clip.window)
        assert not caught.value.transient
    again = list(pool.examine_windows(path, LIMITS, WHITE, 0.5))
    assert [clip.window for clip in again] == [clip.window for clip in clips]
    assert len(pool.decode(path, 16, WHITE, LIMITS, content=again[0].content, window=again[0].window)) == again[0].info.num_frames


def test_a_video_is_hashed_once_for_all_its_windows(long_video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "own.mp4"
    path.write_bytes(long_video.read_bytes())
    read = video_windows.LongVideo.read_content
    reads: list[Place] = []
    monkeypatch.setattr(video_windows.LongVideo, "read_content", lambda video: reads.append(video.place) or read(video))
    clips = list(video_windows.examine_windows(Place(path), LIMITS, WHITE, 1.0, 10))
    for clip in clips:
        assert clip.window is not None
        video_windows.decode_window(Place(path), clip.window, 16, WHITE, LIMITS, [0], clip.content)
    assert reads == [Place(path)] and len(clips) == 4


def child_with(*changes: str) -> tuple[str, ...]:
    """Starts a child that runs these lines first."""
    imports = "import os, sys, time\nfrom rdtf_ds.data.clips import decoder_child, video_windows"
    return sys.executable, "-c", "\n".join([imports, *changes, "decoder_child.main(sys.argv[1:])"])


@pytest.mark.parametrize(("call", "how_much"), [("preadv", "what[0]"), ("pread", "range(what)")], ids=["times of frames", "hash"])
def test_there_is_time_to_read_all_of_a_large_video_as_long_as_it_is_being_read(long_video: Path, call: str, how_much: str) -> None:
    """A disk of which each read takes a while, and a deadline that all of them together miss."""
    slow = (
        f"def read(file, what, at, real=os.{call}):\n    time.sleep(1.2 * (len({how_much}) > 100))\n    return real(file, what, at)",
        f"os.{call}, video_windows._CHUNK = read, 8000",
    )
    limits, window = DecodeLimits(timeout_s=2.0), Window(0, 5)
    content = video_windows.window_content(hashlib.sha256(long_video.read_bytes()).hexdigest(), window)
    with DecoderPool(1, child_with(*slow)) as pool, pytest.raises(ClipError, match=r"decode_timeout_s \(2 s\)"):
        pool.decode(long_video, 16, WHITE, limits, content=content, window=window)
    with DecoderPool(1, child_with(*slow, "video_windows.TOLD_BYTES = 8000")) as pool:
        assert len(pool.decode(long_video, 16, WHITE, limits, content=content, window=window)) == 5


def test_a_hang_in_a_window_of_a_huge_video_is_noticed_as_soon_as_any_other(long_video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_pool, "place_size", lambda place: 10 * 2**30)
    limits = DecodeLimits(timeout_s=2.0)
    with DecoderPool(1, child_with("video_windows._upright = lambda frame: time.sleep(600)")) as pool:
        pool.measure(long_video, limits)  # the child is there
        start = time.monotonic()
        with pytest.raises(ClipError, match=r"decode_timeout_s \(2 s\)") as caught:
            pool.decode(long_video, 16, WHITE, limits, window=Window(70, 5))
        assert caught.value.transient and time.monotonic() - start < 10


def test_a_child_may_not_read_without_end(long_video: Path) -> None:
    forever = "def read(video):\n    while True:\n        video_windows._has_read(1000)\nvideo_windows.LongVideo.read_content = read"
    with (
        DecoderPool(1, child_with("video_windows.TOLD_BYTES = 1000", forever)) as pool,
        pytest.raises(ClipError, match="reads without end"),
    ):
        pool.decode(long_video, 16, WHITE, LIMITS, content="", window=Window(0, 5))


def test_a_long_video_inside_a_shard(pool: DecoderPool, long_video: Path, tmp_path: Path) -> None:
    data = long_video.read_bytes()
    shard = tmp_path / "shard.tar"
    shard.write_bytes(b"x" * 1234 + data + data)
    for offset in (1234, 1234 + len(data)):
        place = Place(shard, offset, len(data))
        contents = [clip.content for clip in pool.examine_windows(place, LIMITS, WHITE, 1.0)]
        assert contents == [clip.content for clip in pool.examine_windows(long_video, LIMITS, WHITE, 1.0)]
        own, alone = (pool.decode(where, 32, WHITE, LIMITS, window=Window(70, 10)) for where in (place, long_video))
        assert np.array_equal(own, alone)


def test_what_breaks_off_yields_the_windows_before(pool: DecoderPool, tmp_path: Path) -> None:
    path = encode(tmp_path / "broken.mp4", pictures(99, 128, 64), "libx264", g="25", bf="0", sc_threshold="0")
    data = bytearray(path.read_bytes())
    start, end = data.index(b"mdat"), data.index(b"moov")
    data[(start + end) // 2 : end - 4] = bytes(end - 4 - (start + end) // 2)
    path.write_bytes(data)
    seen = []
    with pytest.raises(ClipError, match="does not decode"):
        for clip in pool.examine_windows(path, LIMITS, WHITE, 0.4):
            seen.append(clip.window)
    assert seen[:2] == [Window(0, 10), Window(10, 10)] and len(seen) < 10


def test_a_pass_that_is_left_early_leaves_nothing_behind(pool: DecoderPool, long_video: Path) -> None:
    for _ in range(3):
        clips = pool.examine_windows(long_video, LIMITS, WHITE, 0.5)
        assert next(clips).window == Window(0, 13)
        clips.close()
    assert len(list(pool.examine_windows(long_video, LIMITS, WHITE, 0.5))) == 8


def test_an_image_is_one_clip_whatever_its_length(pool: DecoderPool, tmp_path: Path) -> None:
    write_clip(pictures(12, 32, 32), tmp_path / "sticker.gif", 500)
    (clip,) = pool.examine_windows(tmp_path / "sticker.gif", LIMITS, WHITE, 1.0)
    assert clip.window is None and clip.info.num_frames == 12


def timeline(*ticks: int, last: int = 10) -> Timeline:
    return Timeline("h264", 8, 8, np.array(ticks), np.array([ticks[0]]), Fraction(1, 100), last)


def test_windows_count_from_the_first_frame_and_empty_ones_are_none() -> None:
    assert timeline(50, 60, 149, 150, 450, 460).windows(1.0) == [(0, 3), (3, 1), (4, 2)]
    assert timeline(0).windows(1.0) == [(0, 1)]
    thirds = Timeline("h264", 8, 8, np.arange(90), np.array([0]), Fraction(1, 30), 1)
    assert thirds.windows(1.0) == [(0, 30), (30, 30), (60, 30)], "a frame on the border begins the next one"
    assert thirds.windows(0.1) == [(3 * number, 3) for number in range(30)]


def test_durations_end_where_the_next_frame_comes() -> None:
    line = timeline(0, 4, 44, 45, last=7)
    assert line.durations_ms() == (40, 400, 10, 70) and line.durations_ms(1, 2) == (400, 10) and line.seconds == 0.52
    assert Timeline("h264", 8, 8, np.arange(3), np.array([0]), Fraction(1, 10000), 1).durations_ms() == (1, 1, 1)
