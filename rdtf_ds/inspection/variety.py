"""How varied the k frames of a sample are: one of each cluster against evenly spaced ones (paper, dual mask: information density).

Legend: F frames of a clip, k frames of a sample, D features of a frame.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rdtf_ds.data.clustering import choose_frames
from rdtf_ds.data.step_plan import draw_key
from rdtf_ds.diffusion.masks import MAX_FRAMES, MIN_FRAMES, evenly_spaced
from rdtf_ds.seeding import numpy_generator

ALL_K = range(MIN_FRAMES, MAX_FRAMES + 1)


@dataclass(frozen=True, slots=True)
class Variety:
    """Mean over clips of the mean pairwise distance of their k frames' features.

    Attributes:
        k: Frames chosen of each clip.
        clips: Clips measured: those with more than k frames, as with k there is no choice.
        clustered: One frame of each cluster, as training chooses them.
        even: Evenly spaced frames, the first and the last among them.
        wins: Clips whose clustered frames are the more varied ones.
    """

    k: int
    clips: int
    clustered: float
    even: float
    wins: int

    @property
    def ratio(self) -> float | None:
        """Clustered over even; None where there is nothing to compare."""
        return self.clustered / self.even if self.even > 0 else None


def mean_pairwise_distance(features: np.ndarray) -> float:
    """Mean Euclidean distance over all pairs of rows of (n, D).

    Raises:
        ValueError: n < 2.
    """
    count = len(features)
    if count < 2:
        raise ValueError(f"{count} frames have no pairs")
    rows = features.astype(np.float64)
    first, second = np.triu_indices(count, 1)
    return float(np.linalg.norm(rows[first] - rows[second], axis=1).mean())


def frames_drawn(features: np.ndarray, k: int, seed: int, sample_number: int) -> np.ndarray:
    """The frames that sample ``sample_number`` of a run with this seed takes of a clip: int64 (k,), rising."""
    return choose_frames(features, k, numpy_generator(seed, *draw_key(sample_number, "frames", 0)))


def measure_variety(clips: Iterable[tuple[int, np.ndarray]], seed: int, ks: Sequence[int] = ALL_K) -> list[Variety]:
    """Choose k frames of every clip in both ways and compare.

    Args:
        clips: (sample number the draws are named by, float (F, D)) each; read once, one at a time.
        ks: Every k to measure.
    Returns:
        One for each k, in order; zeros where no clip has more than k frames.
    """
    found: dict[int, list[tuple[float, float]]] = {k: [] for k in ks}
    for sample_number, features in clips:
        for k in ks:
            if len(features) > k:
                clustered = mean_pairwise_distance(features[frames_drawn(features, k, seed, sample_number)])
                found[k].append((clustered, mean_pairwise_distance(features[evenly_spaced(len(features), k)])))
    return [_summary(k, np.array(pairs).reshape(-1, 2)) for k, pairs in found.items()]


def _summary(k: int, pairs: np.ndarray) -> Variety:
    """Of (clips, 2) distances, clustered and even."""
    if not len(pairs):
        return Variety(k, 0, 0.0, 0.0, 0)
    clustered, even = pairs.mean(axis=0).tolist()
    return Variety(k, len(pairs), clustered, even, int((pairs[:, 0] > pairs[:, 1]).sum()))
