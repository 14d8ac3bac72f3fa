"""Sheets: every clip is on them, in its place, at its time, with what tells it from the others."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rdtf_ds.data.clips.writing import PAPER, wrap, write_clip
from rdtf_ds.errors import UserError
from rdtf_ds.generation.jobs import Job
from rdtf_ds.generation.sheets import MOST_CLIPS, Shown, labels, playing_sheet, write_sheets


def flat(*colours: tuple[int, int, int], side: int = 96) -> np.ndarray:
    return np.stack([np.full((side, side, 3), colour, np.uint8) for colour in colours])


def play(data: bytes) -> tuple[list[np.ndarray], list[int]]:
    frames, durations = [], []
    with Image.open(BytesIO(data)) as image:
        for number in range(image.n_frames):
            image.seek(number)
            image.load()
            frames.append(np.array(image.convert("RGB")))
            durations.append(int(image.info["duration"]))
    return frames, durations


def at(frame: np.ndarray, number: int, columns: int) -> tuple[int, ...]:
    """The colour in the middle of a clip's place: 96 pixels a side, 6 between, three lines of 15 below."""
    return tuple(int(value) for value in frame[6 + number // columns * 147 + 48, 6 + number % columns * 102 + 48])


def near(found: tuple[int, ...], colour: tuple[int, int, int]) -> bool:
    return max(abs(a - b) for a, b in zip(found, colour, strict=True)) < 12  # the sheet is lossy


RED, GREEN, BLUE, BLACK = (200, 30, 30), (30, 160, 30), (30, 30, 200), (10, 10, 10)


def test_clips_play_at_their_own_times_and_the_shorter_waits() -> None:
    clips = [Shown(flat(RED, GREEN), [100, 100], "a"), Shown(flat(BLUE, BLACK, RED), [50, 100, 250], "b"), Shown(flat(GREEN), [10], "c")]
    frames, durations = play(playing_sheet(clips, 2))
    assert durations == [50, 50, 50, 250]  # changes at 0, 50, 100, 150, until 400
    assert frames[0].shape == (2 * 147 + 6, 2 * 102 + 6, 3)
    shown = [(RED, BLUE), (RED, BLACK), (GREEN, BLACK), (GREEN, RED)]
    for frame, (first, second) in zip(frames, shown, strict=True):
        assert near(at(frame, 0, 2), first) and near(at(frame, 1, 2), second) and near(at(frame, 2, 2), GREEN)
        assert near(at(frame, 3, 2), PAPER)
        assert (frame[105:145, 6:102] < 100).any()  # the caption


def test_a_wide_sheet_has_smaller_clips_and_never_tiny_ones() -> None:
    large = Shown(flat(RED, side=256), [100], "a")
    assert play(playing_sheet([large], 1))[0][0].shape == (256 + 45 + 6 + 6, 256 + 12, 3)
    assert play(playing_sheet([large] * 8, 8))[0][0].shape[1] == 8 * (194 + 6) + 6
    assert play(playing_sheet([large] * 40, 40))[0][0].shape[1] == 40 * 102 + 6


@pytest.mark.parametrize(
    ("count", "side", "columns", "shown", "across"),
    [
        (170, 96, 170, 96, 160),  # 160 * (96 + 6) + 6 = 16326
        (170, 96, 1, 45, 1),  # 170 * (45 + 51) + 6 = 16326
        (64, 256, 1, 204, 1),  # 64 * (204 + 51) + 6 = 16326
        (64, 256, 64, 96, 64),
        (3, 96, 170, 96, 3),
    ],
)
def test_no_sheet_is_larger_than_webp_can_be(count: int, side: int, columns: int, shown: int, across: int) -> None:
    (sheet,), _ = play(playing_sheet([Shown(flat(RED, side=side), [100], "")] * count, columns))
    assert sheet.shape == (-(-count // across) * (shown + 51) + 6, across * (shown + 6) + 6, 3) and max(sheet.shape) <= 16383
    reds = (np.abs(sheet.astype(np.int16) - np.array(RED, np.int16)).max(axis=2) < 40).sum()
    assert abs(reds / (count * shown**2) - 1) < 0.1  # all of the clips are on it


@pytest.mark.parametrize("missing", [False, True])
def test_sheets_that_cannot_be_written_are_told(tmp_path: Path, missing: bool) -> None:
    write_clip(flat(RED, side=4), tmp_path / "a.png", 100)
    (tmp_path / "file").write_bytes(b"")
    files = [tmp_path / ("absent.png" if missing else "a.png")]
    with pytest.raises(UserError, match="cannot be written: .* The clips that were made stay"):
        write_sheets([Job("a")], files, tmp_path / ("s" if missing else "file/s"))


def test_labels_tell_what_is_not_the_same() -> None:
    a = Job("a", "star", seed=0, steps=5, text_scale=1.0)
    assert labels([a]) == ["star"]
    assert labels([a, Job("b", None, seed=1, steps=5)]) == ["seed 0; text 1; star", "seed 1; text default; no caption"]
    assert labels([a, Job("a", "star", steps=5, text_scale=1.0, sampler="dpm++")]) == ["default sampler; star", "dpm++; star"]


@pytest.mark.parametrize("suffix", [".gif", ".mp4", ".webm"])
def test_files_become_two_sheets(tmp_path: Path, suffix: str) -> None:
    jobs = [Job(name, f"a {name} thing", seed=seed) for seed, name in enumerate(("red", "green", "blue"))]
    for job, colour in zip(jobs, (RED, GREEN, BLUE), strict=True):
        write_clip(flat(colour, BLACK, side=16), tmp_path / f"{job.name}{suffix}", [100, 300])
    files = [tmp_path / f"{job.name}{suffix}" for job in jobs]
    assert write_sheets(jobs, files, tmp_path / "sheet") == [tmp_path / "sheet.png", tmp_path / "sheet.webp"]
    stills = np.array(Image.open(tmp_path / "sheet.png"))
    assert stills.shape == (3 * 98, 200 + 2 * 98, 3)
    for row, colour in enumerate((RED, GREEN, BLUE)):
        assert near(tuple(map(int, stills[98 * row + 48, 248])), colour) and near(tuple(map(int, stills[98 * row + 48, 346])), BLACK)
    frames, durations = play((tmp_path / "sheet.webp").read_bytes())
    assert durations == [100, 300]
    assert [near(at(frames[0], number, 2), colour) for number, colour in enumerate((RED, GREEN, BLUE))] == [True] * 3


def test_only_so_many_clips_are_on_a_sheet(tmp_path: Path) -> None:
    write_clip(flat(RED, side=4), tmp_path / "a.png", 100)
    count = MOST_CLIPS + 5
    write_sheets([Job(str(number)) for number in range(count)], [tmp_path / "a.png"] * count, tmp_path / "s", columns=8)
    assert Image.open(tmp_path / "s.png").size[1] == MOST_CLIPS * 98 and Image.open(tmp_path / "s.webp").size[1] == 8 * 147 + 6


def test_text_is_wrapped_between_words_within_long_ones_and_cut() -> None:
    assert wrap("a bb  ccc\ndddd", 6, 9, len) == "a bb\nccc\ndddd"
    assert wrap("漢字漢字漢字漢", 3, 9, len) == "漢字漢\n字漢字\n漢"
    assert wrap("aa bb cc dd", 2, 2, len) == "aa\nb…"
    assert wrap("aa bb", 2, 2, len) == "aa\nbb" and wrap("", 5, 3, len) == ""
