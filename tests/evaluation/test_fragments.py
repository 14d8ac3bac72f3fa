"""Fragments: frames and places as the FAST-VQA project's samplers take them, and draws that are the same twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rdtf_ds.evaluation.fragments import PATCH, cut_patches, cut_views, draw_corners, enlarge, frames_of_views


def test_short_clips_are_played_again_and_again() -> None:
    assert (frames_of_views(8) == list(range(8)) * 4).all() and frames_of_views(8).shape == (4, 32)
    assert (frames_of_views(8, interval=2) == [0, 2, 4, 6] * 8).all()
    assert (frames_of_views(5)[3][:7] == [0, 1, 2, 3, 4, 0, 1]).all()
    assert (frames_of_views(1) == 0).all()


@pytest.mark.parametrize(
    ("frames", "interval", "starts"),
    # Of the project's SampleFrames(32, interval, 4); one frame less than a view, exactly one, a little and much more.
    [
        (31, 1, [0, 0, 0, 0]),
        (32, 1, [0, 0, 0, 0]),
        (39, 1, [1, 3, 5, 7]),
        (100, 1, [8, 25, 43, 60]),
        (63, 2, [0, 0, 0, 0]),
        (66, 2, [0, 1, 1, 2]),
        (301, 2, [29, 89, 148, 208]),
    ],
)
def test_views_of_long_clips_lie_evenly(frames: int, interval: int, starts: list[int]) -> None:
    views = frames_of_views(frames, interval)
    assert views[:, 0].tolist() == starts
    assert ((views - views[:, :1]) % frames == np.arange(32) * interval % frames).all()


def test_no_frames_and_no_step_are_refused() -> None:
    for arguments in ((0, 1), (8, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            frames_of_views(*arguments)


@given(height=st.integers(224, 600), width=st.integers(224, 600), seed=st.integers(0, 99))
def test_patches_stay_in_their_cells(height: int, width: int, seed: int) -> None:
    corners = draw_corners(height, width, np.random.default_rng(seed))
    assert corners.shape == (4, 7, 7, 2)
    for axis, length in enumerate((height, width)):
        cell = length // 7
        starts = np.arange(7)[:, None] * cell if axis == 0 else np.arange(7) * cell
        places = corners[..., axis] - starts
        # The last place that a cell has room for is never drawn, nor is it in the original.
        assert (places >= 0).all() and (places <= max(cell - PATCH - 1, 0)).all()


def test_places_are_drawn_for_each_view_cell_and_axis() -> None:
    corners = draw_corners(7 * 40, 7 * 34, np.random.default_rng(0))
    down, across = corners[..., 0] - np.arange(7)[:, None] * 40, corners[..., 1] - np.arange(7) * 34
    assert set(down.flatten()) == set(range(8)) and set(across.flatten()) == {0, 1}
    assert len({places.tobytes() for places in corners}) == 4
    square = draw_corners(280, 280, np.random.default_rng(0))
    assert not np.array_equal(square[..., 0] - np.arange(7)[:, None] * 40, square[..., 1] - np.arange(7) * 40)


def test_patches_are_cut_at_their_corners_and_laid_side_by_side() -> None:
    height, width = 300, 260
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    frames = torch.stack([rows, columns, rows * 0])[:, None] + torch.arange(2)[None, :, None, None] * 1000
    corners = draw_corners(height, width, np.random.default_rng(3))[1]
    patches = cut_patches(frames, corners)
    assert patches.shape == (3, 2, 224, 224)
    for i, j, y, x in [(0, 0, 0, 0), (6, 6, 31, 31), (2, 5, 7, 30), (5, 2, 30, 7)]:
        place = patches[:, :, i * 32 + y, j * 32 + x].tolist()
        row, column = (corners[i, j] + (y, x)).tolist()
        assert place == [[row, row + 1000], [column, column + 1000], [0, 1000]]


def test_a_clip_of_224_px_is_its_own_only_view() -> None:
    clip = np.random.default_rng(0).integers(0, 256, (8, 224, 224, 3), dtype=np.uint8)
    views = cut_views(clip, seed=0)
    assert views.shape == (1, 3, 32, 224, 224) and views.dtype == torch.float32
    # ImageNet's mean and deviation of red, green and blue.
    pixels = views[0, :, 13] * torch.tensor([58.395, 57.12, 57.375])[:, None, None] + torch.tensor([123.675, 116.28, 103.53])[:, None, None]
    assert torch.allclose(pixels, torch.from_numpy(clip[5]).permute(2, 0, 1).float(), atol=1e-3)


def test_larger_and_longer_clips_have_four_views() -> None:
    rng = np.random.default_rng(0)
    large = cut_views(rng.integers(0, 256, (2, 300, 300, 3), dtype=np.uint8), seed=0)
    assert large.shape[0] == 4 and not any(torch.equal(large[0], view) for view in large[1:])
    assert torch.equal(large[:, :, 0], large[:, :, 2]) and not torch.equal(large[:, :, 0], large[:, :, 1])
    long = cut_views(rng.integers(0, 256, (35, 24, 24, 3), dtype=np.uint8), seed=0)
    assert long.shape[0] == 4 and torch.equal(long[0, :, 1], long[1, :, 0])  # views start at 0, 1, 2 and 3


def test_the_same_seed_cuts_the_same_and_another_does_not() -> None:
    clip = np.random.default_rng(0).integers(0, 256, (1, 260, 290, 3), dtype=np.uint8)
    assert torch.equal(cut_views(clip, seed=5), cut_views(clip, seed=5))
    assert not torch.equal(cut_views(clip, seed=5), cut_views(clip, seed=6))


def test_small_clips_are_enlarged_without_other_ways_of_distortion() -> None:
    ramp = torch.arange(24, dtype=torch.uint8).mul(10).expand(3, 2, 24, 24).contiguous()
    large = enlarge(ramp)
    assert large.shape == (3, 2, 224, 224) and large.dtype == torch.uint8
    # Bilinear, pixels' centres on each other; rounded down.
    exact = (((np.arange(224) + 0.5) * 24 / 224 - 0.5).clip(0, 23) * 10).astype(np.float64)
    assert (np.abs(large[0, 0, 100].numpy() - np.floor(exact + 1e-6)) <= 1).all()
    assert (large[0, 0, 100].numpy() == np.floor(exact + 1e-6)).mean() > 0.9
    assert torch.equal(enlarge(ramp.transpose(2, 3)), large.transpose(2, 3))


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(55, 55, (224, 224)), (71, 71, (224, 224)), (100, 170, (224, 380)), (150, 101, (332, 224)), (223, 300, (224, 301))],
)
def test_the_shorter_side_becomes_224_px(height: int, width: int, expected: tuple[int, int]) -> None:
    assert enlarge(torch.zeros(3, 1, height, width, dtype=torch.uint8)).shape[2:] == expected
    as_they_are = torch.zeros(3, 1, 224, width + 224, dtype=torch.uint8)
    assert enlarge(as_they_are) is as_they_are


@pytest.mark.parametrize(
    "clip",
    [np.zeros((8, 24, 24, 3)), np.zeros((8, 24, 24, 4), np.uint8), np.zeros((24, 24, 3), np.uint8), np.zeros((0, 24, 24, 3), np.uint8)],
)
def test_what_is_no_clip_is_refused(clip: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"uint8 \(F, H, W, 3\)"):
        cut_views(clip, seed=0)
