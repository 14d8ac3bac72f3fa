"""Frame extraction: k frames that differ, one of each cluster of a clip's frames (paper, dual-mask strategy).

Legend: F frames of a clip, k frames of a sample, D features of a frame.
"""

from __future__ import annotations

import faiss
import numpy as np

_ITERATIONS = 20
_RESTARTS = 5  # the best of these is kept: one start often merges two clusters
_LARGEST_SEED = 2**31 - 1  # faiss seeds are C ints


def choose_frames(features: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """Choose k distinct frames in time order: one drawn from each of k k-means clusters of the frames' features.

    Where equal frames leave clusters empty, the frames farthest in time from those chosen fill up.

    Args:
        features: float32 (F, D), F ≥ k.
        rng: seeds k-means and draws the members.
    Returns:
        int64 (k,), strictly rising.
    Raises:
        ValueError: k is not in 1..F.
    """
    num_frames = len(features)
    labels = cluster_frames(features, k, rng)
    if k == num_frames:
        return np.arange(k, dtype=np.int64)
    chosen = [int(rng.choice(np.flatnonzero(labels == label))) for label in np.unique(labels)]
    while len(chosen) < k:
        gaps = np.abs(np.arange(num_frames)[:, None] - np.array(chosen)).min(axis=1)
        chosen.append(int(gaps.argmax()))  # the first of the farthest; never one already chosen, whose gap is 0
    return np.array(sorted(chosen), dtype=np.int64)


def cluster_frames(features: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """The cluster of each frame, int64 (F,) in 0..k-1, as `choose_frames` takes them with the same arguments; k = F: each its own."""
    if not 1 <= k <= len(features):
        raise ValueError(f"cannot choose {k} distinct frames out of {len(features)}")
    if k == len(features):
        return np.arange(k, dtype=np.int64)
    return _kmeans(features, k, int(rng.integers(_LARGEST_SEED)))


def _kmeans(features: np.ndarray, k: int, seed: int) -> np.ndarray:
    """The cluster of each frame, on one thread: results must not depend on the machine's cores or on other workers."""
    features = np.ascontiguousarray(features, dtype=np.float32)
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        parameters = faiss.ClusteringParameters()
        parameters.niter, parameters.nredo, parameters.seed = _ITERATIONS, _RESTARTS, seed
        parameters.init_method = faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS  # finds in half the starts what random frames do
        # a few dozen frames are fewer than faiss likes to train on, and all there are: it must neither warn nor sample
        parameters.min_points_per_centroid, parameters.max_points_per_centroid = 1, len(features)
        index = faiss.IndexFlatL2(features.shape[1])
        # faiss.Kmeans does the same, and then spends a quarter of the time on statistics in Python
        faiss.Clustering(features.shape[1], k, parameters).train(features, index)
        _, labels = index.search(features, 1)
    finally:
        faiss.omp_set_num_threads(threads)
    return labels[:, 0]
