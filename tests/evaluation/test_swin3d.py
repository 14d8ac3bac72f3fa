"""Video Swin with gated biases: windows counted out one by one, and figures of the FAST-VQA project's own code.

The figures were taken from that code (VQAssessment/FAST-VQA-and-FasterVQA, swin_backbone.py of commit 5ac99f2) with the weights and inputs
that `seeded` makes; it is not part of this project.
"""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rdtf_ds.evaluation.swin3d import Merging, Swin3D, WindowAttention, Windows, table_rows

CPU = torch.device("cpu")
WINDOW = (2, 3, 3)


def seeded(network: nn.Module, spread: float) -> nn.Module:
    """Weights of a normal distribution, name by name; a norm's around 1."""
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, weight in sorted(network.named_parameters()):
            drawn = torch.from_numpy(rng.standard_normal(weight.shape, np.float32) * np.float32(spread))
            weight.copy_(drawn + (1 if "norm" in name and name.endswith("weight") else 0))
    return network.eval().requires_grad_(False)


def seeded_input(*shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).standard_normal(shape, np.float32))


def small_swin() -> Swin3D:
    return Swin3D(channels=12, depths=(2, 2, 2), heads=(3, 3, 6), window=(4, 3, 3), gated=(True, True, False))


def test_names_and_shapes_are_the_weight_files() -> None:
    # Of the project's SwinTransformer3D, but for relative_position_index, which is a constant.
    lines = sorted(f"{name} {tuple(value.shape)}" for name, value in Swin3D().state_dict().items())
    assert len(lines) == 181
    assert "layers.2.blocks.5.attn.fragment_position_bias_table (2535, 12)" in lines
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == "406157be3b78dda781eff663c1eb1df12fbb2b11ae176cf922de2a16aedb7e40"


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        # Whole windows; every axis filled up; one window wide; fewer frames than a window.
        # fmt: off
        ((2, 3, 16, 48, 96), [-0.465203, 0.487834, -0.668924, -0.051370, 0.315775, 0.841835, 0.475229]),
        ((1, 3, 9, 37, 50), [0.036785, 1.360653, -0.082024, 0.384053, -0.700646, 0.189947, -0.051886]),
        ((1, 3, 16, 12, 70), [-0.821258, 1.512289, 1.058481, 1.418833, -2.089061, -0.094177, 0.072163]),
        ((1, 3, 5, 64, 30), [1.394034, -1.050356, -0.378789, 1.378286, -0.697377, 0.218797, -0.027322]),
        # fmt: on
    ],
)
def test_features_are_those_of_the_original(shape: tuple[int, ...], expected: list[float]) -> None:
    features = seeded(small_swin(), 0.15)(seeded_input(*shape))
    frames, height, width = (-(-length // size) for length, size in zip(shape[2:], (2, 16, 16), strict=True))
    assert features.shape == (shape[0], 48, frames, height, width)
    assert features.flatten()[:: features.numel() // 7][:7].tolist() == pytest.approx(expected, abs=1e-4)


def windows_by_hand(windows: Windows) -> list[list[tuple[int, ...]]]:
    """Which tokens, by their places before the shift, stand in each window, counted out."""
    steps = [range(0, whole, size) for whole, size in zip(windows.padded, windows.window, strict=True)]
    return [
        [
            tuple((place + shift) % whole for place, shift, whole in zip(token, windows.shift, windows.padded, strict=True))
            for token in itertools.product(*(range(start, start + size) for start, size in zip(corner, windows.window, strict=True)))
        ]
        for corner in itertools.product(*steps)
    ]


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("grid", [(4, 6, 9), (3, 7, 8), (2, 3, 3), (1, 5, 2), (5, 3, 14)])
def test_windows_hold_what_they_say(grid: tuple[int, int, int], shifted: bool) -> None:
    windows = Windows.fit(grid, WINDOW, shifted)
    by_hand = windows_by_hand(windows)
    tokens = torch.arange(1.0, 1 + np.prod(grid)).reshape(1, *grid, 1)
    split = windows.split(tokens)
    filled = torch.zeros(windows.padded)
    filled[: grid[0], : grid[1], : grid[2]] = tokens[0, ..., 0]
    assert split[0, :, :, 0].tolist() == [[filled[place].item() for place in window] for window in by_hand]
    assert torch.equal(windows.join(split), tokens)

    distance, separated = windows.fragment_distance(CPU), windows.separated(CPU)
    assert (separated is None) == (not any(windows.shift))
    for number, window in enumerate(by_hand):
        for (i, a), (j, b) in itertools.product(enumerate(window), repeat=2):
            cells = [[place[axis] * 7 // windows.padded[axis] for axis in (1, 2)] for place in (a, b)]
            assert distance[number, i, j] == abs(cells[0][0] - cells[1][0]) + abs(cells[0][1] - cells[1][1])
            if separated is not None:
                # Tokens of one window that were further apart than it is long came from opposite ends.
                assert separated[number, i, j] == any(abs(p - q) >= size for p, q, size in zip(a, b, windows.window, strict=True))


def test_windows_shrink_to_the_grid_and_are_not_shifted_there() -> None:
    assert Windows.fit((16, 56, 56), (8, 7, 7), True) == Windows((16, 56, 56), (8, 7, 7), (4, 3, 3))
    assert Windows.fit((16, 7, 5), (8, 7, 7), True) == Windows((16, 7, 5), (8, 7, 5), (4, 0, 0))
    assert Windows.fit((16, 56, 56), (8, 7, 7), False).shift == (0, 0, 0)
    assert Windows.fit((9, 15, 14), (8, 7, 7), True).padded == (16, 21, 14)


def test_rows_number_the_steps_from_key_to_query() -> None:
    rows = table_rows(WINDOW)
    places = list(itertools.product(*map(range, WINDOW)))
    for (i, query), (j, key) in itertools.product(enumerate(places), repeat=2):
        step = [q - k + size - 1 for q, k, size in zip(query, key, WINDOW, strict=True)]
        assert rows[i, j] == np.ravel_multi_index(step, (3, 5, 5))


def test_biases_go_from_one_table_to_the_other_with_the_distance() -> None:
    attention = WindowAttention(4, 2, WINDOW, gated=True).requires_grad_(False)
    attention.relative_position_bias_table.fill_(5.0)
    attention.fragment_position_bias_table.fill_(2.0)
    windows = Windows.fit((4, 9, 9), WINDOW, shifted=True)
    biases, distance, separated = attention.biases(windows), windows.fragment_distance(CPU), windows.separated(CPU)
    assert separated is not None and distance.max() > 1
    expected = 2.0 + 3.0 * distance - 100.0 * separated
    assert torch.allclose(biases, expected[:, None].expand(-1, 2, -1, -1))


def test_tokens_from_opposite_ends_do_not_see_each_other() -> None:
    attention = seeded(WindowAttention(4, 2, WINDOW, gated=False), 0.5)
    windows = Windows.fit((4, 6, 6), WINDOW, shifted=True)
    tokens = seeded_input(1, 4, 6, 6, 4)
    changed = tokens.clone()
    changed[:, 0] += 1  # the first frame shares a window with the last one, shifted by one
    before, after = (windows.join(attention(windows.split(value), windows)) for value in (tokens, changed))
    assert torch.equal(before[:, 3], after[:, 3])
    assert not torch.equal(before[:, 0], after[:, 0])


def test_a_clip_does_not_hang_on_its_batch() -> None:
    network, clips = seeded(small_swin(), 0.15), seeded_input(3, 3, 8, 32, 32)
    assert torch.allclose(network(clips)[1:2], network(clips[1:2]), atol=1e-5)


def test_merging_takes_columns_of_rows() -> None:
    merging = Merging(1).requires_grad_(False)
    merging.norm.weight.copy_(torch.tensor([1.0, 10.0, 100.0, 1000.0]))
    merging.reduction.weight.copy_(torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 0.0, 0.0]]))
    merged = merging(torch.tensor([[0.0, 1.0, 9.0], [2.0, 3.0, 8.0], [4.0, 5.0, 7.0]])[None, None, :, :, None])
    assert merged.shape == (1, 1, 2, 2, 2)
    normed = (torch.tensor([0.0, 2.0, 1.0, 3.0]) - 1.5) / np.sqrt(1.25 + 1e-5)  # rows before columns
    expected = [float(normed @ merging.norm.weight), float(normed[1] * 10)]
    assert merged[0, 0, 0, 0].tolist() == pytest.approx(expected)
