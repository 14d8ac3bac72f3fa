"""Metadata: what is written is read back from every format, by our reader and by others', and changes nothing else of the clip."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rdtf_ds.data.clips.clip import DecodeLimits
from rdtf_ds.data.clips.decoding import decode_clip, probe_clip
from rdtf_ds.data.clips.metadata import gif_block, png_block, read_metadata, to_comment, webp_block
from rdtf_ds.data.clips.writing import write_clip
from rdtf_ds.errors import UserError
from tests.data.players import ffmpeg_frames, libwebp_frames, need

SUFFIXES = (".gif", ".webp", ".png", ".apng", ".mp4", ".webm")
DURATIONS = [80, 120, 90, 200]
HARD = {
    "short": "a star",
    "empty": "",
    "lines": "one\ntwo\r\nthree\ttabbed \x00\x0b\x7f",
    "scripts": "赤い星が左へ 😀👩‍👩‍👧 עברית \u2028\ufffe \ud800",
    "markup": "</rdf:li>]]> & &amp; &lt; <!-- \"'\\ ; -- %s {} =",
    "long": "漢字 and 😀 " * 20_000,
}


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    """Four frames of few colours, which every format but video keeps exactly."""
    made = np.full((4, 32, 32, 3), 250, np.uint8)
    for number in range(4):
        made[number, 4:16, 4 * number : 4 * number + 12] = (40 * number, 90, 200)
    return made


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("prompt", HARD.values(), ids=HARD)
def test_any_text_comes_back_from_any_format(tmp_path: Path, frames: np.ndarray, suffix: str, prompt: str) -> None:
    metadata = {"prompt": prompt, "seed": 2**62, "eta": None, "text_scale": 7.5, "visible": {"0": "ab"}, "durations_ms": DURATIONS}
    write_clip(frames, tmp_path / f"a{suffix}", DURATIONS, metadata)
    assert read_metadata(tmp_path / f"a{suffix}") == metadata


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nothing_else_of_the_clip_changes(tmp_path: Path, frames: np.ndarray, suffix: str) -> None:
    bare, told = tmp_path / f"bare{suffix}", tmp_path / f"told{suffix}"
    write_clip(frames, bare, DURATIONS)
    write_clip(frames, told, DURATIONS, {"prompt": HARD["long"]})
    limits = DecodeLimits()
    assert probe_clip(told, limits).durations_ms == probe_clip(bare, limits).durations_ms
    assert np.array_equal(decode_clip(told, 32, (0, 0, 0), limits), decode_clip(bare, 32, (0, 0, 0), limits))
    if suffix != ".webp":  # which PyAV's FFmpeg does not play
        with av.open(told) as one, av.open(bare) as other:
            pairs = list(zip(one.decode(video=0), other.decode(video=0), strict=True))
        assert len(pairs) == 4
        assert all(a.time == b.time and np.array_equal(a.to_ndarray(format="rgb24"), b.to_ndarray(format="rgb24")) for a, b in pairs)


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp"])
def test_pillow_plays_it_and_finds_the_comment(tmp_path: Path, frames: np.ndarray, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    write_clip(frames, path, DURATIONS, {"prompt": HARD["markup"]})
    with Image.open(path) as image:
        assert image.n_frames == 4
        shown = []
        for number in range(4):
            image.seek(number)
            shown.append(np.array(image.convert("RGB")))
        image.seek(0)
        image.load()
        if suffix == ".gif":
            comment = image.info["comment"].decode("ascii")
        elif suffix == ".png":
            comment = image.text["Comment"]
        else:
            packet = ElementTree.fromstring(image.info["xmp"])
            comment = "".join(node.text or "" for node in packet.iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}li"))
    assert np.array_equal(np.stack(shown), frames)
    assert json.loads(comment) == {"rdtf_ds": {"prompt": HARD["markup"]}}


@pytest.mark.parametrize("suffix", [".gif", ".png"])
def test_ffmpeg_plays_it(tmp_path: Path, frames: np.ndarray, suffix: str) -> None:
    need("ffmpeg")
    write_clip(frames, tmp_path / f"a{suffix}", DURATIONS, {"prompt": HARD["long"]})
    assert np.array_equal(ffmpeg_frames(tmp_path / f"a{suffix}", 32, 32)[..., :3], frames)


def test_libwebp_plays_it(tmp_path: Path, frames: np.ndarray) -> None:
    write_clip(frames, tmp_path / "a.webp", DURATIONS, {"prompt": "odd"})
    shown, durations = libwebp_frames(tmp_path / "a.webp")
    assert durations == DURATIONS and np.array_equal(shown[..., :3], frames)


def test_webpmux_sees_the_xmp(tmp_path: Path, frames: np.ndarray) -> None:
    need("webpmux")
    write_clip(frames, tmp_path / "a.webp", DURATIONS, {"prompt": "a star"})
    told = subprocess.run(["webpmux", "-info", str(tmp_path / "a.webp")], capture_output=True, text=True, timeout=60, check=True).stdout
    assert "XMP metadata" in told and "Number of frames: 4" in told


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_ffprobe_finds_the_comment(tmp_path: Path, frames: np.ndarray, suffix: str) -> None:
    need("ffprobe")
    write_clip(frames, tmp_path / f"a{suffix}", DURATIONS, {"prompt": "a\nstar 😀"})
    command = ["ffprobe", "-v", "error", "-show_entries", "format_tags", "-of", "json", str(tmp_path / f"a{suffix}")]
    tags = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)["format"]["tags"]
    (comment,) = [value for name, value in tags.items() if name.lower() == "comment"]
    assert json.loads(comment) == {"rdtf_ds": {"prompt": "a\nstar 😀"}}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_same_clip_is_the_same_bytes(tmp_path: Path, frames: np.ndarray, suffix: str) -> None:
    for name, metadata in (("a", {"x": 1, "y": "2"}), ("b", {"y": "2", "x": 1})):
        write_clip(frames, tmp_path / f"{name}{suffix}", DURATIONS, metadata)
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_clip_without_has_none(tmp_path: Path, frames: np.ndarray, suffix: str) -> None:
    write_clip(frames, tmp_path / f"a{suffix}", DURATIONS)
    assert read_metadata(tmp_path / f"a{suffix}") is None


@pytest.mark.parametrize("comment", ["made by hand", '{"prompt": "theirs"}', "[1]", '{"rdtf_ds": 3}', "[" * 100_000])
def test_others_comments_are_not_taken_for_ours(tmp_path: Path, comment: str) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "a.gif", comment=comment)
    assert read_metadata(tmp_path / "a.gif") is None


def test_a_comment_of_others_before_ours_does_not_hide_it(tmp_path: Path, frames: np.ndarray) -> None:
    write_clip(frames, tmp_path / "a.gif", DURATIONS, {"seed": 1})
    data = (tmp_path / "a.gif").read_bytes()
    theirs = gif_block("by hand")
    (tmp_path / "a.gif").write_bytes(data[:13] + theirs + data[13:])  # after the screen descriptor, which has no palette
    assert read_metadata(tmp_path / "a.gif") == {"seed": 1}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_cannot_be_read_is_said(tmp_path: Path, frames: np.ndarray, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    with pytest.raises(UserError, match="no such file"):
        read_metadata(path)
    path.write_bytes(b"something else entirely")
    with pytest.raises(UserError, match="no GIF, WebP"):
        read_metadata(path)
    write_clip(frames, path, DURATIONS, {"prompt": "a" * 5000})
    whole = path.read_bytes()
    # However much is missing, though the last byte that is left be the one that ends a GIF.
    ends = [at + 1 for at, byte in enumerate(whole[:-1]) if byte == 0x3B][:20] if suffix == ".gif" else []
    for kept in (12, 40, len(whole) // 2, *ends, *range(len(whole) - 400, len(whole), 21), len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(UserError, match="cannot be read"):
            read_metadata(path)


def test_a_stream_without_a_size_is_read(tmp_path: Path, frames: np.ndarray) -> None:
    path = tmp_path / "a.webm"
    write_clip(frames, path, DURATIONS, {"seed": 1})
    data = path.read_bytes()
    at = data.index(b"\x18\x53\x80\x67") + 4
    assert data[at] == 1  # a size of eight bytes
    path.write_bytes(data[:at] + b"\x01" + b"\xff" * 7 + data[at + 8 :])
    assert read_metadata(path) == {"seed": 1}
    path.write_bytes(data + b"more")
    assert read_metadata(path) == {"seed": 1}


def test_boxes_of_an_mp4_may_have_long_sizes_or_none(tmp_path: Path, frames: np.ndarray) -> None:
    path = tmp_path / "a.mp4"
    write_clip(frames, path, DURATIONS, {"seed": 1})
    whole = path.read_bytes()
    for last in (b"\x00\x00\x00\x01free" + (20).to_bytes(8, "big") + b"four", b"\x00\x00\x00\x00free" + b"x" * 9):
        path.write_bytes(whole + last)
        assert read_metadata(path) == {"seed": 1}
    path.write_bytes(whole + b"\x00\x00\x00\x01free" + (21).to_bytes(8, "big") + b"four")
    with pytest.raises(UserError, match="cut short"):
        read_metadata(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, np.float32(1)])
def test_what_json_has_no_form_for_is_refused_and_nothing_written(tmp_path: Path, frames: np.ndarray, value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        write_clip(frames, tmp_path / "a.gif", DURATIONS, {"x": value})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("length", [0, 1, 254, 255, 256, 510, 511])
def test_gif_sub_blocks_hold_at_most_255_bytes(length: int) -> None:
    block = gif_block("x" * length)
    if not length:
        assert block == b""
        return
    assert block[:2] == b"\x21\xfe" and block[-1] == 0
    at, sizes = 2, []
    while block[at]:
        sizes.append(block[at])
        at += block[at] + 1
    assert at == len(block) - 1 and sizes == [255] * (length // 255) + [length % 255] * bool(length % 255)


def test_no_comment_is_no_chunk() -> None:
    assert png_block("") == webp_block("") == b""


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(max_size=5), st.text(max_size=400) | st.integers() | st.none() | st.lists(st.integers()), max_size=4))
def test_any_metadata_is_ascii_and_comes_back(metadata: dict[str, Any]) -> None:
    comment = to_comment(metadata)
    assert comment.isascii() and json.loads(comment) == {"rdtf_ds": metadata}
    assert not any(ord(letter) < 32 for letter in comment)  # what XML and C strings refuse
