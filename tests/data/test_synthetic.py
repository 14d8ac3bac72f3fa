"""Synthetic stickers: what is drawn, what is held out, how often each frame count comes, and the same bytes every time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rdtf_ds.data.synthetic import (
    COLOURS,
    HELD_OUT,
    MOTIONS,
    SHAPES,
    Sticker,
    all_stickers,
    draw_frame_count,
    on_white,
    render,
    write_stickers,
)
from rdtf_ds.seeding import numpy_generator


def draw(motion: str, shape: str = "circle", frames: int = 6, size: int = 64, seed: int = 0) -> np.ndarray:
    return render(Sticker("red", shape, motion), frames, size, numpy_generator(seed, "test"))


def centres(frames: np.ndarray) -> np.ndarray:
    """(F, 2): mean x, y of the alpha."""
    alpha = frames[..., 3].astype(float)
    y, x = np.mgrid[: alpha.shape[1], : alpha.shape[2]]
    return np.stack([(alpha * x).sum((1, 2)), (alpha * y).sum((1, 2))], axis=1) / alpha.sum((1, 2))[:, None]


@pytest.mark.parametrize(("motion", "axis", "sign"), [("slides right", 0, 1), ("slides left", 0, -1), ("falls", 1, 1), ("rises", 1, -1)])
def test_slides_go_the_way_they_are_called_across_the_whole_clip(motion: str, axis: int, sign: int):
    for seed in range(5):
        steps = np.diff(centres(draw(motion, seed=seed)), axis=0)
        assert (sign * steps[:, axis] > 64 * 0.44 / 5 - 0.5).all()
        assert np.abs(steps[:, 1 - axis]).max() < 0.1


@pytest.mark.parametrize(("motion", "larger"), [("grows", -1), ("shrinks", 0)])
def test_growth_changes_the_area_eight_times_and_stays_in_place(motion: str, larger: int):
    frames = draw(motion, size=128)
    area = frames[..., 3].astype(float).sum((1, 2))
    assert area[larger] / area[-1 - larger] == pytest.approx(1 / 0.35**2, rel=0.08)
    assert np.ptp(centres(frames), axis=0).max() < 0.5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("motion", MOTIONS)
def test_shape_never_leaves_the_picture_and_its_edge_is_smooth(shape: str, motion: str):
    for seed in range(4):
        alpha = draw(motion, shape, seed=seed)[..., 3]
        border = np.concatenate([alpha[:, 0], alpha[:, -1], alpha[:, :, 0], alpha[:, :, -1]], axis=1)
        assert border.mean() < 3  # a tip may touch
        assert ((alpha > 20) & (alpha < 235)).any() and alpha.max() == 255


def test_shapes_are_told_apart_by_their_outlines():
    silhouettes = [draw("grows", shape)[-1, ..., 3] > 127 for shape in SHAPES]
    for i, one in enumerate(silhouettes):
        for other in silhouettes[:i]:
            assert (one & other).sum() / (one | other).sum() < 0.86
    star, heart, triangle = (silhouettes[SHAPES.index(name)] for name in ("star", "heart", "triangle"))
    for symmetric in (star, heart, triangle):
        columns = np.flatnonzero(symmetric.any(axis=0))
        middle = (columns[0] + columns[-1]) // 2
        assert symmetric[:, columns[0] : middle].sum() == pytest.approx(symmetric[:, middle + 1 : columns[-1] + 1].sum(), rel=0.12)
    widths = triangle.sum(axis=1)[triangle.any(axis=1)]
    assert widths[-2] > 5 * widths[1]  # point up
    widths = heart.sum(axis=1)[heart.any(axis=1)]
    assert widths[len(widths) // 6] > 2 * widths[-1 - len(widths) // 6]  # lobes up, point down


def test_white_shows_where_the_sticker_is_transparent():
    pixel = np.array([[[[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 51]]]], np.uint8)
    assert on_white(pixel).tolist() == [[[[200, 100, 0], [255, 255, 255], [244, 224, 204]]]]


def test_held_out_pairs_leave_every_colour_and_shape_to_training():
    assert len(HELD_OUT) == 9
    training = {(sticker.colour, sticker.shape) for sticker in all_stickers(held_out=False)}
    assert len(training) == 27 and not training & HELD_OUT
    assert {colour for colour, _ in HELD_OUT} == {colour for colour, _ in training} == set(COLOURS)
    assert {shape for _, shape in HELD_OUT} == {shape for _, shape in training} == set(SHAPES)
    assert min(Counter(colour for colour, _ in training).values()) >= 4 and min(Counter(shape for _, shape in training).values()) >= 4
    assert all(sticker.held_out for sticker in all_stickers(held_out=True))
    assert {(sticker.colour, sticker.shape) for sticker in all_stickers(held_out=True)} == HELD_OUT


def test_frame_counts_have_a_long_tail():
    counts = [draw_frame_count(numpy_generator("tail", i)) for i in range(4000)]
    assert min(counts) == 3 and max(counts) == 48
    histogram = [sum(low <= count < 2 * low for count in counts) for low in (3, 6, 12, 24)]
    assert histogram == sorted(histogram, reverse=True)
    # P(F) ~ F^-1.5: by hand, sum F^(-0.5) / sum F^(-1.5) over 3..48
    mean = sum(f**-0.5 for f in range(3, 49)) / sum(f**-1.5 for f in range(3, 49))
    assert np.mean(counts) == pytest.approx(mean, rel=0.05)


def test_folder_holds_what_its_metadata_says(tmp_path: Path):
    write_stickers(tmp_path, 60, seed=3, size=32)
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert sorted(row["file_name"] for row in rows) == sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".jsonl")
    assert {row["text"] for row in rows} <= {sticker.caption for sticker in all_stickers(held_out=False)}
    assert len({row["text"] for row in rows}) == 60  # no caption twice before each came once
    assert len({Path(row["file_name"]).suffix for row in rows}) >= 3
    for row in rows:
        if row["file_name"].endswith((".gif", ".webp", ".png")):
            with Image.open(tmp_path / row["file_name"]) as clip:
                assert clip.size == (32, 32) and 3 <= clip.n_frames <= 48
                clip.seek(clip.n_frames - 1)
                assert clip.convert("RGBA").getchannel("A").getextrema() == (0, 255)


def test_same_seed_same_bytes_and_the_count_changes_nothing(tmp_path: Path):
    for name, count, seed in (("a", 12, 5), ("b", 12, 5), ("short", 6, 5), ("other", 12, 6)):
        write_stickers(tmp_path / name, count, seed, size=32, suffixes=(".gif", ".webp", ".png"))
    contents = {
        folder: {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} for folder in ("a", "b", "short", "other")
    }
    assert contents["a"] == contents["b"]
    clips = {name: data for name, data in contents["short"].items() if name != "metadata.jsonl"}
    assert len(clips) == 6 and clips.items() <= contents["a"].items()
    assert contents["a"]["metadata.jsonl"].startswith(contents["short"]["metadata.jsonl"])
    assert contents["a"] != contents["other"]


def test_held_out_folder_and_chosen_formats(tmp_path: Path):
    write_stickers(tmp_path, 10, seed=0, size=32, held_out=True, suffixes=(".gif",))
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert {row["text"] for row in rows} <= {sticker.caption for sticker in all_stickers(held_out=True)}
    assert all(row["file_name"].endswith(".gif") for row in rows)


def test_every_process_writes_the_same_mp4(tmp_path: Path):
    """x264's vector code does not, for frames this small: about every second process made other pixels."""
    code = "import sys; from rdtf_ds.data.synthetic import write_stickers; write_stickers(sys.argv[1], 60, 0, 24, suffixes=('.mp4',))"
    seen = set()
    for number in range(4):
        folder = tmp_path / str(number)
        subprocess.run([sys.executable, "-c", code, str(folder)], check=True, timeout=120)
        seen.add(b"".join(path.read_bytes() for path in sorted(folder.glob("*.mp4"))))
    assert len(seen) == 1
