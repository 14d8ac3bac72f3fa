"""The Fréchet distance against closed forms, scipy's matrix root, and what is known of its bias."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rdtf_ds.evaluation.frechet import Normal, extrapolate, frechet_distance


def covariance(rng: np.random.Generator, dim: int, rank: int) -> np.ndarray:
    factor = rng.normal(size=(rank, dim))
    return factor.T @ factor


def test_one_dimension_by_hand() -> None:
    # (μ₁ − μ₂)² + (σ₁ − σ₂)²
    a, b = Normal.of_moments(np.array([1.0]), np.array([[4.0]])), Normal.of_moments(np.array([4.0]), np.array([[25.0]]))
    assert frechet_distance(a, b) == pytest.approx(9 + 9, rel=1e-12)


@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_covariances_that_commute(seed: int, dim: int) -> None:
    # With one set of eigenvectors the root is that of the eigenvalues: Σ (√λ − √μ)².
    rng = np.random.default_rng(seed)
    vectors = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    first, second = rng.uniform(0.1, 9, dim), rng.uniform(0.1, 9, dim)
    means = rng.normal(size=(2, dim))
    a, b = (Normal.of_moments(mean, vectors * values @ vectors.T) for mean, values in zip(means, (first, second), strict=True))
    expected = ((means[0] - means[1]) ** 2).sum() + ((np.sqrt(first) - np.sqrt(second)) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("dim", "rank"), [(6, 6), (6, 3), (20, 30)])
def test_any_covariances_against_the_roots_of_the_product(dim: int, rank: int) -> None:
    # The eigenvalues of AB are real and not negative, and tr √(AB) is the sum of their roots.
    rng = np.random.default_rng(dim + rank)
    first, second, means = covariance(rng, dim, rank), covariance(rng, dim, dim), rng.normal(size=(2, dim))
    root = np.sqrt(np.linalg.eigvals(first @ second).real.clip(min=0)).sum()
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * root
    found = frechet_distance(Normal.of_moments(means[0], first), Normal.of_moments(means[1], second))
    assert found == pytest.approx(expected, rel=1e-6)


def test_samples_and_their_moments_agree() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 8)), rng.normal(1, 2, size=(40, 8))
    moments = [Normal.of_moments(part.mean(axis=0), np.cov(part, rowvar=False)) for part in (x, y)]
    assert frechet_distance(Normal.of_samples(x), Normal.of_samples(y)) == pytest.approx(frechet_distance(*moments), rel=1e-9)


def test_more_samples_than_dimensions_are_kept_as_no_more_rows_than_these() -> None:
    rng = np.random.default_rng(5)
    x, y = rng.normal(3, 2, size=(500, 40)) @ rng.normal(size=(40, 40)), rng.normal(size=(41, 40))
    for samples in (x, y):
        found = Normal.of_samples(samples)
        expected = np.cov(samples, rowvar=False)
        assert found.factor.shape == (40, 40) and np.allclose(found.mean, samples.mean(axis=0), rtol=1e-12)
        assert np.abs(found.factor.T @ found.factor - expected).max() <= 1e-9 * np.abs(expected).max()
    thin = (x - x.mean(axis=0)) / np.sqrt(499)
    distance = frechet_distance(Normal.of_samples(x), Normal.of_samples(y))
    assert distance == pytest.approx(frechet_distance(Normal(x.mean(axis=0), thin), Normal.of_samples(y)), rel=1e-9)
    assert Normal.of_samples(x[:40]).factor.shape == (40, 40) and Normal.of_samples(x[:7]).factor.shape == (7, 40)


def test_nothing_between_equal_sets_even_with_fewer_samples_than_dimensions() -> None:
    x = np.random.default_rng(1).normal(size=(10, 400)) * 30
    same = Normal.of_samples(x)
    assert abs(frechet_distance(same, Normal.of_samples(x[::-1].copy()))) < 1e-8 * (same.factor**2).sum()


def test_it_is_symmetric_and_grows_with_the_distance() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(60, 5)), rng.normal(size=(60, 5))
    near, far = Normal.of_samples(y + 0.5), Normal.of_samples(y + 3)
    a = Normal.of_samples(x)
    assert frechet_distance(a, near) == pytest.approx(frechet_distance(near, a), rel=1e-9)
    assert frechet_distance(a, near) < frechet_distance(a, far)


@pytest.mark.parametrize("bad", [np.zeros((1, 4)), np.zeros(4), np.full((3, 4), np.nan)])
def test_features_that_do_not_do(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="features must be"):
        Normal.of_samples(bad)


def test_few_samples_show_too_much_and_the_line_finds_what_many_show() -> None:
    # Both sides are one distribution: the true distance is 0, and what is measured is bias alone.
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(1200, 20)), rng.normal(size=(1200, 20))
    line = extrapolate(x, y, rng)
    assert line.counts == (300, 450, 600, 900, 1200)
    assert list(line.means) == sorted(line.means, reverse=True)
    assert line.means[0] == pytest.approx(4 * line.means[-1], rel=0.25)  # the bias goes with 1/N
    assert abs(line.limit) < 0.2 * line.means[-1]
    assert line.deviations[-1] == 0  # all there is can be drawn in one way


@pytest.mark.parametrize("counts", [[50], [1, 50], [50, 101]])
def test_counts_that_do_not_do(counts: list[int]) -> None:
    x = np.random.default_rng(4).normal(size=(100, 3))
    with pytest.raises(ValueError, match="between 2 and 100"):
        extrapolate(x, x, np.random.default_rng(0), counts)
