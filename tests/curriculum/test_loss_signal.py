"""The normalised signal does not see which timesteps were drawn, and still sees the loss rise."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdtf_ds.curriculum.loss_signal import BucketMeans, TimestepNormaliser


def test_by_hand() -> None:
    """Two buckets of t < 500 and t >= 500, horizon 2: a raw mean keeps 1/2."""
    normaliser = TimestepNormaliser(buckets=2, diffusion_steps=1000, horizon=2)
    state, signal = normaliser.update(normaliser.initial(), [4.0, 2.0], [0, 499])
    assert state == BucketMeans((1.5, 0.0), (1, 0))
    assert signal == pytest.approx(3.0)  # bucket mean 3; ratios 4/3 and 2/3; overall 3

    state, signal = normaliser.update(state, [6.0, 1.0], [100, 500])
    # Bucket 0: raw 1.5/2 + 3 = 3.75, corrected by 3/4: 5. Bucket 1: raw 0.5, corrected by 1/2: 1.
    assert state == BucketMeans((3.75, 0.5), (2, 1))
    assert signal == pytest.approx((6 / 5 + 1 / 1) / 2 * (5 + 1) / 2)


def test_timesteps_drawn_do_not_move_it_but_difficulty_does() -> None:
    normaliser = TimestepNormaliser(buckets=4, diffusion_steps=8, horizon=50)
    loss_of = [1.0, 1.0, 0.5, 0.5, 0.2, 0.2, 0.1, 0.1]
    state = normaliser.initial()
    for _ in range(20):
        state, signal = normaliser.update(state, loss_of, range(8))
    assert signal == pytest.approx(0.45)
    _, only_early = normaliser.update(state, [1.0, 1.0], [0, 1])
    _, only_late = normaliser.update(state, [0.1, 0.1], [6, 7])
    assert only_early == pytest.approx(0.45) and only_late == pytest.approx(0.45)
    _, harder = normaliser.update(state, [0.13, 0.13], [6, 7])
    assert 1.2 < harder / 0.45 < 1.32


@given(st.permutations(list(range(6))))
def test_order_of_the_samples_does_not_matter(order: list[int]) -> None:
    normaliser = TimestepNormaliser(buckets=3, diffusion_steps=30, horizon=5)
    losses, timesteps = [0.1, 0.7, 0.3, 1.1, 0.05, 0.9], [0, 29, 14, 3, 19, 7]
    shuffled = normaliser.update(normaliser.initial(), [losses[i] for i in order], [timesteps[i] for i in order])
    assert shuffled == normaliser.update(normaliser.initial(), losses, timesteps)


def test_json_is_exact() -> None:
    means = BucketMeans((1 / 3, 0.1 + 0.2), (4, 7))
    assert BucketMeans.from_json(json.loads(json.dumps(means.to_json()))) == means
    for bad in ({"means": [1.0], "counts": [1, 2]}, {"means": [float("nan")], "counts": [1]}):
        with pytest.raises(ValueError, match="bucket means"):
            BucketMeans.from_json(bad)


@pytest.mark.parametrize(
    ("losses", "timesteps", "message"),
    [
        ([], [], "0 losses"),
        ([1.0], [1, 2], "1 losses and 2 timesteps"),
        ([float("nan")], [1], "finite, positive"),
        ([0.0], [1], "finite, positive"),
        ([1.0], [10], r"0\.\.9"),
        ([1.0], [-1], r"0\.\.9"),
    ],
)
def test_bad_samples_are_refused(losses: list[float], timesteps: list[int], message: str) -> None:
    normaliser = TimestepNormaliser(buckets=2, diffusion_steps=10, horizon=5)
    with pytest.raises(ValueError, match=message):
        normaliser.update(normaliser.initial(), losses, timesteps)


@pytest.mark.parametrize("options", [(0, 10, 5), (11, 10, 5), (2, 10, 0)])
def test_bad_options_are_refused(options: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        TimestepNormaliser(*options)
