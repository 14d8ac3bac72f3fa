"""The Fréchet distance between two sets of features, in float64, and what few samples do to it.

Covariances are never formed: with centred features X (n, D) and Y (m, D), each divided by the root of its count less one, tr √(AB) of the
covariances A = XᵀX and B = YᵀY is the sum of the singular values of XYᵀ. So nothing is squared, no root of a matrix is iterated, and
fewer samples than dimensions are no special case.

Legend: n m samples, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Normal:
    """A normal distribution: its mean (D,), and a factor (r, D) with covariance factorᵀ · factor."""

    mean: Floats
    factor: Floats

    @classmethod
    def of_samples(cls, features: NDArray[np.floating]) -> Normal:
        """Fitted to features (n, D), the covariance without bias.

        Raises:
            ValueError: fewer than two samples, or a value that is not finite.
        """
        samples = np.asarray(features, np.float64)
        if samples.ndim != 2 or len(samples) < 2:
            raise ValueError(f"features must be (n, D) with n at least 2, not {samples.shape}")
        if not np.isfinite(samples).all():
            raise ValueError("features must be finite")
        mean = samples.mean(axis=0)
        factor = (samples - mean) / np.sqrt(len(samples) - 1)
        if len(factor) > factor.shape[1]:  # R of QR has the same covariance, and no more rows than there are dimensions
            factor = np.asarray(np.linalg.qr(factor, mode="r"), np.float64)
        return cls(mean, factor)

    @classmethod
    def of_moments(cls, mean: NDArray[np.floating], covariance: NDArray[np.floating]) -> Normal:
        """From its mean (D,) and covariance (D, D), symmetric and not negative."""
        values, vectors = np.linalg.eigh(np.asarray(covariance, np.float64))
        return cls(np.asarray(mean, np.float64), np.sqrt(values.clip(min=0))[:, None] * vectors.T)


def frechet_distance(a: Normal, b: Normal) -> float:
    """|μ_a − μ_b|² + tr(A + B − 2 √(AB)), not negative but for rounding."""
    shared = np.linalg.svd(a.factor @ b.factor.T, compute_uv=False).sum()
    return float(((a.mean - b.mean) ** 2).sum() + (a.factor**2).sum() + (b.factor**2).sum() - 2 * shared)


@dataclass(frozen=True)
class Extrapolation:
    """Distances at several sample counts, and the line through them over 1/N.

    Attributes:
        counts: N, rising.
        means, deviations: Of the distance over draws of N samples from each side.
        limit: Where the line meets 1/N = 0: the distance that endlessly many samples would show, as far as these tell.
    """

    counts: tuple[int, ...]
    means: tuple[float, ...]
    deviations: tuple[float, ...]
    limit: float


def extrapolate(
    real: NDArray[np.floating],
    generated: NDArray[np.floating],
    rng: np.random.Generator,
    counts: Sequence[int] | None = None,
    draws: int = 8,
) -> Extrapolation:
    """How the distance falls with the number of samples: its bias goes with 1/N (Chong and Forsyth 2020, for FID).

    Args:
        real, generated: (n, D) and (m, D).
        counts: N to measure at; None: a quarter, three eighths, half, three quarters and all of the smaller set.
        draws: Sets drawn at each N without replacement; one is enough where N is all there is.

    Raises:
        ValueError: fewer than two counts, or one that is not between 2 and the smaller set.
    """
    most = min(len(real), len(generated))
    chosen = sorted(set(counts if counts is not None else (most // 4, most * 3 // 8, most // 2, most * 3 // 4, most)))
    if len(chosen) < 2 or chosen[0] < 2 or chosen[-1] > most:
        raise ValueError(f"counts must be two or more numbers between 2 and {most}, got {chosen}")
    means, deviations = [], []
    for count in chosen:
        distances = [
            frechet_distance(Normal.of_samples(_some(real, count, rng)), Normal.of_samples(_some(generated, count, rng)))
            for _ in range(1 if count == len(real) == len(generated) else draws)
        ]
        means.append(float(np.mean(distances)))
        deviations.append(float(np.std(distances)))
    _, limit = np.polyfit(1 / np.array(chosen), means, 1)
    return Extrapolation(tuple(chosen), tuple(means), tuple(deviations), float(limit))


def _some(features: NDArray[np.floating], count: int, rng: np.random.Generator) -> NDArray[np.floating]:
    return features[rng.permutation(len(features))[:count]]
