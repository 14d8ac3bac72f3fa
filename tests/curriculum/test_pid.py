"""Eq. 3-4: hand computations, the sign and recovery of the response, anti-windup, exact states."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdtf_ds.curriculum.pid import PIDController, PIDGains, PIDState


def after(pid: PIDController, losses: Iterable[float]) -> PIDState:
    state = pid.initial()
    for loss in losses:
        state = pid.update(state, loss)
    return state


def simulate(pid: PIDController, steps: int, loss_at: Callable[[int, float], float]) -> list[float]:
    """P* after every step of a loop in which the loss may depend on the last P*."""
    state, path = pid.initial(), [0.0]
    for step in range(steps):
        state = pid.update(state, loss_at(step, path[-1]))
        path.append(pid.output(state).total)
    return path


def test_log_ema_by_hand() -> None:
    """τ = 2, fast horizon 1 (F = L). Six losses of 1 fill the warm-up, then 2 and 1.

    S keeps 1/2: raw 63/64, then 191/128, then 319/256; corrected 1, then 191/127, then 319/255.
    dt = 1/2: ∫ goes half-way to e; the derivative half-way to 2·(e − e before).
    """
    pid = PIDController(PIDGains(5.0, 3.0, 1.3), fast_horizon=1, slow_horizon=2)
    first = math.log(2) - math.log(191 / 127)
    state = after(pid, [1, 1, 1, 1, 1, 1, 2])
    terms = pid.output(state)
    assert terms == pytest.approx((first, 5 * first, 3 * first / 2, 1.3 * first, (5 + 1.5 + 1.3) * first))

    second = math.log(1) - math.log(319 / 255)
    terms = pid.output(pid.update(state, 1.0))
    integral, derivative = (first / 2 + second) / 2, second - first / 2
    total = 5 * second + 3 * integral + 1.3 * derivative
    assert terms == pytest.approx((second, 5 * second, 3 * integral, 1.3 * derivative, total))


def test_paper_by_hand() -> None:
    """Losses 1, 3, 2: averages 1, 2, 2; e = 0, 1, 0; ∫ = 0, 1, 1; de = 0, 1, −1; dt = 1."""
    pid = PIDController(PIDGains(5.0, 3.0, 1.3), error="paper")
    assert pid.output(after(pid, [1])) == (0, 0, 0, 0, 0)
    assert pid.output(after(pid, [1, 3])) == pytest.approx((1, 5, 3, 1.3, 9.3))
    assert pid.output(after(pid, [1, 3, 2])) == pytest.approx((0, 0, 3, -1.3, 1.7))


def test_defaults_are_table_6() -> None:
    assert PIDController().gains == PIDGains(proportional=5.0, integral=3.0, derivative=1.3)


def test_silent_for_three_slow_horizons() -> None:
    pid = PIDController(fast_horizon=2, slow_horizon=5)
    state = pid.initial()
    for step in range(1, 17):
        state = pid.update(state, 1.0 + step)
        output = pid.output(state)
        assert (output == (0, 0, 0, 0, 0)) == (step <= 15)
        assert (state.integral == 0) == (step <= 15)


def test_constant_loss_gives_no_error() -> None:
    """Bias correction: without it, F and S would differ for hundreds of steps."""
    pid = PIDController(fast_horizon=20, slow_horizon=30)
    for step in (1, 2, 95, 400):
        assert after(pid, [0.25] * step).error == pytest.approx(0, abs=1e-12)


def test_scale_of_the_loss_does_not_matter() -> None:
    pid = PIDController(fast_horizon=3, slow_horizon=10)
    losses = [1 + 0.3 * math.sin(step) for step in range(60)]
    scaled = pid.output(after(pid, [7.5 * loss for loss in losses]))
    assert scaled == pytest.approx(pid.output(after(pid, losses)))


@pytest.mark.parametrize(("factor", "sign"), [(1.3, 1), (0.7, -1)])
def test_sign_of_every_term(factor: float, sign: int) -> None:
    """A loss above what it has been: P* > 0, in all three terms; below: P* < 0."""
    pid = PIDController(fast_horizon=3, slow_horizon=20)
    terms = pid.output(after(pid, [1.0] * 100 + [factor] * 5))
    assert all(term * sign > 0 for term in terms)


def falling(step: int) -> float:
    return float(0.12 + 0.28 * (1 + step / 150) ** -0.7)


def test_simulated_rise_moves_p_and_recovers() -> None:
    """docs/method.md: a falling loss that easier samples lower by 12 % a level; +30 % at step 3000."""
    pid = PIDController()

    def loss(step: int, total: float) -> float:
        return falling(step) * math.exp(-0.12 * total) * (1.3 if step >= 3000 else 1.0)

    path = simulate(pid, 4500, loss)
    assert path[:601] == [0.0] * 601
    assert -0.6 < path[601] < 0, "a falling loss asks for slightly harder samples"
    rise = [total - path[3000] for total in path[3001:]]
    assert 0.7 < max(rise) < 0.9
    assert 20 < rise.index(max(rise)) < 80
    assert all(abs(total) < 0.2 for total in rise[1000:]), "recovers within five slow horizons"


def test_simulated_noise_stays_within_a_level() -> None:
    rng = np.random.default_rng(0)
    noise = rng.lognormal(-0.5 * math.log(1.16), math.sqrt(math.log(1.16)), 3000)  # mean 1, spread 0.4
    pid = PIDController()
    path = simulate(pid, 3000, lambda step, total: falling(step) * float(noise[step]) * math.exp(-0.12 * total))
    assert 0.15 < np.std(path[1500:]) < 0.7
    assert abs(np.mean(path[1500:])) < 0.5


def test_literal_reading_sits_on_a_rail() -> None:
    """Why it is not the default: as losses fall, e stays below 0 and its integral grows without bound."""
    path = simulate(PIDController(error="paper"), 3000, lambda step, total: falling(step))
    assert sum(total < -8 for total in path) > 0.9 * len(path)


@pytest.mark.parametrize("sign", [1, -1])
def test_anti_windup(sign: int) -> None:
    """A loss rising (falling) for long: the integral stops at its limit, and leaves it with the first error of the other sign."""
    limit = 0.05
    pid = PIDController(fast_horizon=2, slow_horizon=10, integral_limit=limit)
    state = after(pid, [math.exp(sign * 0.02 * step) for step in range(500)])
    assert state.error * sign > 2 * limit, "the leak alone would let it grow past the limit"
    assert state.integral == sign * limit
    assert pid.output(state).integral == pytest.approx(sign * 3 * limit)
    back = state
    while back.error * sign > 0:
        back = pid.update(back, math.exp(sign * 0.02 * 500 - sign * 3))
    assert back.integral * sign < limit


def test_integral_leaks_towards_the_error() -> None:
    """With dt = 1/τ and leak rate 1, a step of e = 0 keeps 1 − 1/τ of it."""
    pid = PIDController(fast_horizon=1, slow_horizon=10)
    state = PIDState(count=10**4, fast_mean=1.0, slow_mean=1.0, error=0.0, integral=0.5, derivative=0.2)
    state = pid.update(state, 1.0)
    assert (state.integral, state.derivative) == pytest.approx((0.45, 0.18))


@given(st.lists(st.floats(1e-6, 1e6), max_size=40), st.sampled_from(["log_ema", "paper"]))
def test_json_is_exact_and_finite(losses: list[float], error: str) -> None:
    pid = PIDController(error=error, fast_horizon=2, slow_horizon=5)  # type: ignore[arg-type]
    state = after(pid, losses)
    assert all(math.isfinite(value) for value in state.to_json().values())
    assert PIDState.from_json(json.loads(json.dumps(state.to_json()))) == state
    assert state.count == len(losses)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf"), 0.0, -1.0])
@pytest.mark.parametrize("error", ["log_ema", "paper"])
def test_impossible_losses_are_refused(loss: float, error: str) -> None:
    with pytest.raises(ValueError, match="finite, positive loss"):
        PIDController(error=error).update(PIDState(), loss)  # type: ignore[arg-type]


def test_bad_states_are_refused() -> None:
    good = PIDState().to_json()
    for bad in ({**good, "error": math.nan}, {**good, "more": 1.0}, {name: good[name] for name in itertools.islice(good, 5)}):
        with pytest.raises(ValueError, match="PID state must hold"):
            PIDState.from_json(bad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"error": "log"}, "'log_ema' or 'paper'"),
        ({"fast_horizon": 0}, "fast_horizon < slow_horizon"),
        ({"fast_horizon": 200}, "got 200 and 200"),
        ({"integral_limit": 0.0}, "integral_limit must be positive"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PIDController(**options)  # type: ignore[arg-type]
