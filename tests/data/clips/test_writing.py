"""Writing: what is read back, by Pillow and by FFmpeg, is what was written, equal neighbouring frames included."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rdtf_ds.data.clips.clip import DecodeLimits
from rdtf_ds.data.clips.decoding import decode_clip, probe_clip
from rdtf_ds.data.clips.writing import PAPER, contact_sheet, write_atomically, write_clip
from rdtf_ds.errors import UserError
from tests.data.players import ffmpeg_frames, libwebp_frames, need

DURATIONS = [50, 50, 120, 50, 90, 50]
EXACT = [".gif", ".webp", ".png", ".apng"]


def moving_square(channels: int) -> np.ndarray:
    """Six frames of 32×48, the 1st equal to the 2nd and the 5th to the 6th; each other one in a colour of its own."""
    frames = np.zeros((6, 32, 48, 4), np.uint8)
    frames[..., 3] = 0
    for number, step in enumerate((0, 0, 1, 2, 3, 3)):
        frames[number, 4:16, 4 + 6 * step : 16 + 6 * step] = (250 - 60 * step, 40 * step, 90, 255)
    if channels == 3:
        frames[frames[..., 3] == 0, :3] = 200
    return frames[..., :channels].copy()


def read_by_pillow(path: Path) -> tuple[np.ndarray, list[int]]:
    frames, durations = [], []
    with Image.open(path) as image:
        for number in range(image.n_frames):
            image.seek(number)
            frames.append(np.array(image.convert("RGBA")))
            durations.append(int(image.info["duration"]))
    return np.stack(frames), durations


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("suffix", EXACT)
def test_still_formats_come_back_exactly(tmp_path: Path, suffix: str, channels: int) -> None:
    frames, path = moving_square(channels), tmp_path / "new" / f"a{suffix}"
    write_clip(frames, path, DURATIONS)
    read, durations = read_by_pillow(path)
    assert durations == DURATIONS
    assert probe_clip(path, DecodeLimits()).durations_ms == tuple(DURATIONS)
    assert (read[..., :3][read[..., 3] > 0] == frames[..., :3][read[..., 3] > 0]).all()
    assert (read[..., 3] == (frames[..., 3] if channels == 4 else 255)).all()
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("suffix", [".gif", ".png"])
def test_ffmpeg_reads_the_same(tmp_path: Path, suffix: str, channels: int) -> None:
    need("ffmpeg")
    frames, path = moving_square(channels), tmp_path / f"a{suffix}"
    write_clip(frames, path, DURATIONS)
    read = ffmpeg_frames(path, 48, 32)
    assert len(read) == 6
    shown = read[..., 3] > 0
    assert (shown == (frames[..., 3] > 0 if channels == 4 else True)).all()
    assert (read[shown][:, :3] == frames[shown][:, :3]).all()


def test_libwebp_reads_the_same(tmp_path: Path) -> None:
    write_clip(moving_square(4), tmp_path / "a.webp", DURATIONS)
    frames, durations = libwebp_frames(tmp_path / "a.webp")
    assert durations == DURATIONS and (frames == moving_square(4)).all()


@pytest.mark.parametrize(("suffix", "channels"), [(".mp4", 3), (".webm", 3), (".webm", 4)])
def test_videos_keep_frames_times_and_alpha(tmp_path: Path, suffix: str, channels: int) -> None:
    need("ffprobe")
    path = tmp_path / f"a{suffix}"
    write_clip(moving_square(channels), path, DURATIONS)
    entries = "frame=pts_time:stream=pix_fmt:stream_tags=alpha_mode"
    command = ["ffprobe", "-v", "error", "-show_entries", entries, "-of", "csv", str(path)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    starts = [float(line.split(",")[1]) for line in output.splitlines() if line.startswith("frame")]
    assert np.abs(np.array(starts) - np.concatenate([[0], np.cumsum(DURATIONS)[:-1]]) / 1000).max() < 0.002
    assert (",1" in output.splitlines()[-1]) == (channels == 4)  # Matroska's AlphaMode
    ours = decode_clip(path, 48, (0, 0, 0), DecodeLimits())
    assert len(ours) == 6
    if channels == 3:
        assert np.abs(ours[:, 8:40].astype(int) - moving_square(3)).mean() < 4


def test_gif_palettes_are_each_frames_own(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)  # 256 colours each, 1280 in all
    write_clip(frames, tmp_path / "a.gif")
    assert (read_by_pillow(tmp_path / "a.gif")[0][..., :3] == frames).all()
    rich = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 4), dtype=np.uint8)
    write_clip(rich, tmp_path / "b.gif")
    read, _ = read_by_pillow(tmp_path / "b.gif")
    assert ((read[..., 3] == 255) == (rich[..., 3] >= 128)).all()
    opaque = read[..., 3] == 255
    assert np.abs(read[opaque][:, :3].astype(int) - rich[opaque][:, :3]).mean() < 25


@pytest.mark.parametrize("suffix", EXACT)
def test_the_longest_duration_comes_back(tmp_path: Path, suffix: str) -> None:
    write_clip(moving_square(3), tmp_path / f"a{suffix}", 65535)
    assert set(read_by_pillow(tmp_path / f"a{suffix}")[1]) == {65540 if suffix == ".gif" else 65535}  # GIF counts in 10 ms


def test_one_frame_and_one_colour(tmp_path: Path) -> None:
    for suffix in EXACT:
        write_clip(np.full((1, 1, 1, 4), 0, np.uint8), tmp_path / f"a{suffix}")
        assert probe_clip(tmp_path / f"a{suffix}", DecodeLimits()).num_frames == 1


def test_odd_sides_become_even_in_video(tmp_path: Path) -> None:
    write_clip(np.full((3, 65, 67, 3), 99, np.uint8), tmp_path / "a.mp4")
    info = probe_clip(tmp_path / "a.mp4", DecodeLimits())
    assert (info.width, info.height, info.num_frames) == (68, 66, 3)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    frames = moving_square(3)
    with pytest.raises(UserError, match=r"'.avi'.*\.gif"):
        write_clip(frames, tmp_path / "a.avi")
    for bad in (frames.astype(np.float32), frames[0], frames[..., :2], frames[:0]):
        with pytest.raises(ValueError, match="uint8"):
            write_clip(bad, tmp_path / "a.gif")
    for durations in ([100] * 5, 0, [100, 100, 100, 100, 100, -1], [100, 100, 100, 100, 100, 65536]):
        with pytest.raises(ValueError, match="durations_ms"):
            write_clip(frames, tmp_path / "a.gif", durations)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.gif"
    path.write_bytes(b"old")

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_clip(moving_square(3), path)
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and [entry.name for entry in tmp_path.iterdir()] == ["a.gif"]


def test_two_processes_of_one_number_do_not_write_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In two containers that share a folder they have the same number, and here this process has it twice."""
    path = tmp_path / "a.bin"

    def interrupted(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:2])
            file.flush()
            if data == b"first":
                write_atomically(path, b"other")
                assert path.read_bytes() == b"other"
            return 2 + file.write(data[2:])

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    write_atomically(path, b"first")
    assert path.read_bytes() == b"first" and [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]


def test_contact_sheet_has_a_row_for_each_clip_and_a_label(tmp_path: Path) -> None:
    red, blue = np.full((4, 50, 60, 3), (255, 0, 0), np.uint8), np.full((2, 50, 60, 4), (0, 0, 255, 255), np.uint8)
    contact_sheet([red, blue], ["a red thing that has quite a long name to wrap", ""], tmp_path / "s.png")
    sheet = np.array(Image.open(tmp_path / "s.png"))
    assert sheet.shape == (104, 200 + 4 * 62, 3)
    for column in range(4):
        assert (sheet[25, 200 + 62 * column + 30] == (255, 0, 0)).all()
        assert (sheet[77, 200 + 62 * column + 30] == ((0, 0, 255) if column < 2 else PAPER)).all()
    assert (sheet[:52, :200] < 100).any() and (sheet[52:, :200] == PAPER).all()
    assert (sheet[:52, 196:200] == PAPER).all()  # the label was wrapped before it reached the frames
    with pytest.raises(ValueError, match="2 clips"):
        contact_sheet([red, blue], ["one"], tmp_path / "s.png")
