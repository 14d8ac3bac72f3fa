"""Frame extraction by k-means."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdtf_ds.data.clustering import choose_frames, cluster_frames


@given(data=st.data(), num_frames=st.integers(3, 40), kinds=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_k_distinct_frames_in_order_even_if_many_are_equal(data: st.DataObject, num_frames: int, kinds: int, seed: int) -> None:
    k = data.draw(st.integers(1, min(8, num_frames)))
    looks = np.random.default_rng(seed).random((kinds, 6), dtype=np.float32)
    features = looks[np.random.default_rng(seed + 1).integers(kinds, size=num_frames)]
    chosen = choose_frames(features, k, np.random.default_rng(seed))
    assert chosen.dtype == np.int64 and len(chosen) == k
    assert (np.diff(chosen) > 0).all() and chosen[0] >= 0 and chosen[-1] < num_frames
    assert (chosen == choose_frames(features, k, np.random.default_rng(seed))).all()


def test_one_frame_of_each_cluster() -> None:
    groups = np.repeat(np.arange(5), [9, 1, 4, 7, 3])
    features = np.eye(5, dtype=np.float32)[groups] + np.random.default_rng(0).normal(0, 0.01, (24, 5)).astype(np.float32)
    picks = [choose_frames(features, 5, np.random.default_rng(seed)) for seed in range(30)]
    whole = sum(set(groups[chosen]) == set(range(5)) for chosen in picks)
    assert whole >= 24  # k-means may stop at a worse optimum; random picks would hit all five in 2 % of draws (9·1·4·7·3 / C(24, 5))
    assert len({int(chosen[0]) for chosen in picks}) > 4  # a member is drawn, not always the same one


def test_clusters_are_those_that_frames_are_chosen_from() -> None:
    features = np.random.default_rng(1).random((20, 6), dtype=np.float32)
    labels = cluster_frames(features, 5, np.random.default_rng(7))
    chosen = choose_frames(features, 5, np.random.default_rng(7))
    assert labels.shape == (20,) and set(labels.tolist()) == set(range(5)) == set(labels[chosen].tolist())
    assert cluster_frames(features[:5], 5, np.random.default_rng(0)).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="cannot choose 21"):
        cluster_frames(features, 21, np.random.default_rng(0))


def test_equal_frames_are_filled_up_far_from_those_chosen() -> None:
    features = np.zeros((9, 4), np.float32)
    chosen = choose_frames(features, 3, np.random.default_rng(0))
    assert np.diff(chosen).min() >= 2 and chosen[-1] - chosen[0] >= 4


def test_all_frames_and_impossible_numbers() -> None:
    features = np.zeros((4, 3), np.float32)
    assert choose_frames(features, 4, np.random.default_rng(0)).tolist() == [0, 1, 2, 3]
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"cannot choose {k}"):
            choose_frames(features, k, np.random.default_rng(0))


def test_faiss_prints_nothing_and_its_threads_are_given_back() -> None:
    code = (
        "import faiss, numpy as np; from rdtf_ds.data.clustering import choose_frames; faiss.omp_set_num_threads(2); "
        "choose_frames(np.random.default_rng(0).random((9, 192), dtype=np.float32), 8, np.random.default_rng(0)); "
        "assert faiss.omp_get_max_threads() == 2"
    )
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=root, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
