"""Frame extraction: k frames that differ, one of each cluster of a clip's frames (paper, dual-mask strategy).

Legend: F frames of a clip, k frames of a sample, D features of a frame.
"""

from __future__ import annotations

import faiss
import numpy as np
from PIL import Image

THUMBNAIL = 8
_ITERATIONS = 20
_RESTARTS = 8  # the best of these is kept: one start in random frames often merges two clusters
_LARGEST_SEED = 2**31 - 1  # faiss seeds are C ints


def frame_features(frames: np.ndarray) -> np.ndarray:
    """Describe each frame by its area-averaged 8×8 RGB thumbnail: uint8 (F, H, W, 3) -> float32 (F, 192) in [0, 1]."""
    thumbnails = [Image.fromarray(frame).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX) for frame in frames]
    return np.stack([np.asarray(thumbnail, np.float32).ravel() for thumbnail in thumbnails]) / 255


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
    if not 1 <= k <= num_frames:
        raise ValueError(f"cannot choose {k} distinct frames out of {num_frames}")
    if k == num_frames:
        return np.arange(k, dtype=np.int64)
    labels = _kmeans(features, k, int(rng.integers(_LARGEST_SEED)))
    chosen = [int(rng.choice(np.flatnonzero(labels == label))) for label in np.unique(labels)]
    while len(chosen) < k:
        gaps = np.abs(np.arange(num_frames)[:, None] - np.array(chosen)).min(axis=1)
        chosen.append(int(gaps.argmax()))  # the first of the farthest; never one already chosen, whose gap is 0
    return np.array(sorted(chosen), dtype=np.int64)


def _kmeans(features: np.ndarray, k: int, seed: int) -> np.ndarray:
    """The cluster of each frame, on one thread: results must not depend on the machine's cores or on other workers."""
    features = np.ascontiguousarray(features, dtype=np.float32)
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        # a few dozen frames are fewer than faiss likes to train on, and all there are: it must neither warn nor sample
        kmeans = faiss.Kmeans(
            features.shape[1],
            k,
            niter=_ITERATIONS,
            nredo=_RESTARTS,
            seed=seed,
            min_points_per_centroid=1,
            max_points_per_centroid=len(features),
        )
        kmeans.train(features)
        _, labels = kmeans.index.search(features, 1)
    finally:
        faiss.omp_set_num_threads(threads)
    return labels[:, 0]
