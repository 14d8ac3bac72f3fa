"""Variety: distances by hand, and the comparison with evenly spaced frames on clips where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from rdtf_ds.data.clustering import choose_frames
from rdtf_ds.diffusion.masks import evenly_spaced
from rdtf_ds.inspection.variety import frames_drawn, mean_pairwise_distance, measure_variety
from rdtf_ds.seeding import numpy_generator


def mostly_still() -> np.ndarray:
    """26 frames of one picture but for two, of which even spacing at k = 3 (frames 0, 13 and 25) meets one."""
    features = np.zeros((26, 2), np.float32)
    features[13], features[20] = (4, 0), (0, 4)
    return features


def test_mean_pairwise_distance_by_hand():
    assert mean_pairwise_distance(np.array([[0.0, 0.0], [3.0, 4.0]])) == 5.0
    # a right triangle with sides 3, 4, 5
    assert mean_pairwise_distance(np.array([[0, 0], [3, 0], [0, 4]], np.uint8)) == 4.0, "differences of bytes must not wrap"
    with pytest.raises(ValueError, match="1 frames have no pairs"):
        mean_pairwise_distance(np.zeros((1, 4)))


def test_clusters_are_more_varied_where_little_moves():
    (row,) = measure_variety([(7, mostly_still())], seed=0, ks=[3])
    assert row.clustered == pytest.approx((4 + 4 + 32**0.5) / 3), "both of the other pictures"
    assert row.even == pytest.approx((4 + 0 + 4) / 3)
    assert row.ratio == pytest.approx((8 + 32**0.5) / 8) and (row.clips, row.wins, row.k) == (1, 1, 3)


def test_the_mean_is_over_clips_with_a_choice():
    rng = np.random.default_rng(0)
    clips = [(number, rng.random((frames, 6), np.float32)) for number, frames in enumerate((3, 5, 12, 30))]
    rows = {row.k: row for row in measure_variety(clips, seed=4)}
    assert [rows[k].clips for k in range(3, 9)] == [3, 3, 2, 2, 2, 2]
    expected = []
    for number, features in clips[2:]:
        chosen = choose_frames(features, 5, numpy_generator(4, number, "frames"))
        expected.append((mean_pairwise_distance(features[chosen]), mean_pairwise_distance(features[evenly_spaced(len(features), 5)])))
    clustered, even = np.mean(expected, axis=0)
    assert (rows[5].clustered, rows[5].even) == (pytest.approx(clustered), pytest.approx(even))
    assert rows[5].ratio == pytest.approx(clustered / even)
    assert rows[5].wins == sum(a > b for a, b in expected)


def test_draws_are_named_by_seed_and_sample_number():
    features = np.random.default_rng(1).random((40, 6), np.float32)
    drawn = [frames_drawn(features, 4, seed, number).tolist() for seed, number in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert drawn[0] == drawn[1] and len({tuple(frames) for frames in drawn}) == 3


def test_nothing_to_compare():
    (row,) = measure_variety([(0, np.zeros((3, 2), np.float32))], seed=0, ks=[3])
    assert (row.clips, row.ratio, row.wins) == (0, None, 0)
    (row,) = measure_variety([(0, np.zeros((9, 2), np.float32))], seed=0, ks=[3])
    assert (row.clips, row.ratio, row.wins) == (1, None, 0), "equal frames have no distance"
