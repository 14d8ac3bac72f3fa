"""The feedback loop of the adaptive component: from the loss to the joint perplexity P* (Eq. 3-4).

Pure arithmetic on Python floats: every rank gets the same bits, and a state survives JSON exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple


@dataclass(frozen=True, slots=True)
class PIDGains:
    """K_p, K_i and K_d of Eq. 4 (Table 6)."""

    proportional: float = 5.0
    integral: float = 3.0
    derivative: float = 1.3


@dataclass(frozen=True, slots=True)
class PIDState:
    """All the loop remembers. The two means are raw sums of weights × losses, before bias correction."""

    count: int = 0  # losses seen, one per applied step
    fast_mean: float = 0.0
    slow_mean: float = 0.0
    error: float = 0.0
    integral: float = 0.0
    derivative: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; JSON writes a float with every digit it needs, so the way back is exact."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> PIDState:
        """The state :meth:`to_json` wrote.

        Raises:
            ValueError: a value is missing, unknown or not a finite number.
        """
        names = [field.name for field in fields(cls)]
        if set(values) != set(names):
            raise ValueError(f"PID state must hold {', '.join(names)}, got {', '.join(values)}")
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in values.values()):
            raise ValueError(f"PID state must hold finite numbers, got {dict(values)}")
        return cls(count=int(values["count"]), **{name: float(values[name]) for name in names[1:]})


class PIDTerms(NamedTuple):
    """Output of the loop: the error and its weighted terms, whose sum ``total`` is P*, in levels. All 0 while warming up."""

    error: float
    proportional: float
    integral: float
    derivative: float
    total: float


class PIDController:
    """P* = K_p·e + K_i·∫e dt + K_d·de/dt (Eq. 4); P* > 0: training is harder than it has been.

    ``error="log_ema"`` (our reading of Eq. 3): e = log F − log S, with F and S the bias-corrected exponential means of the loss over
    ``fast_horizon`` and τ = ``slow_horizon`` applied steps; e counts from step 3τ + 1 on, when S has settled. Time is measured in τ:
    dt = 1/τ. The integral leaks at rate 1 and is clamped to ±``integral_limit``; the derivative passes a low-pass of time constant 1.

    ``error="paper"`` (Eq. 3-4 to the letter): e = L − the time average of L, dt = 1; no warm-up, leak, clamp or filter.

    Args:
        gains: K_p, K_i, K_d.
        error: the reading of Eq. 3.
        fast_horizon: of F, in applied steps.
        slow_horizon: τ, of S.
        integral_limit: bound of ∫e dt, either side (anti-windup).

    Raises:
        ValueError: unknown error, a horizon below 1, fast not below slow, or a limit that is not positive.
    """

    def __init__(
        self,
        gains: PIDGains | None = None,
        *,
        error: Literal["log_ema", "paper"] = "log_ema",
        fast_horizon: int = 20,
        slow_horizon: int = 200,
        integral_limit: float = 1.0,
    ) -> None:
        if error not in ("log_ema", "paper"):
            raise ValueError(f"unknown PID error {error!r}: use 'log_ema' or 'paper'")
        if not 1 <= fast_horizon < slow_horizon:
            raise ValueError(f"PID needs 1 <= fast_horizon < slow_horizon, got {fast_horizon} and {slow_horizon}")
        if not integral_limit > 0:
            raise ValueError(f"PID integral_limit must be positive, got {integral_limit}")
        self.gains = gains if gains is not None else PIDGains()
        self.error = error
        self.fast_horizon = fast_horizon
        self.slow_horizon = slow_horizon
        self.integral_limit = integral_limit

    @property
    def warm_up(self) -> int:
        """Losses to see before the loop answers."""
        return 3 * self.slow_horizon if self.error == "log_ema" else 0

    def initial(self) -> PIDState:
        """Before the first loss."""
        return PIDState()

    def update(self, state: PIDState, loss: float) -> PIDState:
        """The state after one more applied step with this loss, the mean over the global batch.

        Raises:
            ValueError: the loss is not a finite positive number (a step with such a loss is never applied).
        """
        if not (math.isfinite(loss) and loss > 0):
            raise ValueError(f"the curriculum needs a finite, positive loss, got {loss!r} after {state.count} applied steps")
        return self._update_paper(state, float(loss)) if self.error == "paper" else self._update_log_ema(state, float(loss))

    def output(self, state: PIDState) -> PIDTerms:
        """P* and its terms for the next step."""
        if state.count <= self.warm_up:
            return PIDTerms(0.0, 0.0, 0.0, 0.0, 0.0)
        proportional = self.gains.proportional * state.error
        integral = self.gains.integral * state.integral
        derivative = self.gains.derivative * state.derivative
        return PIDTerms(state.error, proportional, integral, derivative, proportional + integral + derivative)  # Eq. 4

    def _update_log_ema(self, state: PIDState, loss: float) -> PIDState:
        count = state.count + 1
        fast_mean, fast = _exponential_mean(state.fast_mean, loss, self.fast_horizon, count)
        slow_mean, slow = _exponential_mean(state.slow_mean, loss, self.slow_horizon, count)
        error = math.log(fast) - math.log(slow)  # Eq. 3
        integral, derivative = 0.0, 0.0
        if count > self.warm_up:
            dt = 1 / self.slow_horizon
            integral = state.integral + (error - state.integral) * dt
            integral = min(max(integral, -self.integral_limit), self.integral_limit)
            slope = (error - state.error) / dt
            derivative = state.derivative + (slope - state.derivative) * dt
        return PIDState(count, fast_mean, slow_mean, error, integral, derivative)

    def _update_paper(self, state: PIDState, loss: float) -> PIDState:
        count = state.count + 1
        average = state.slow_mean + (loss - state.slow_mean) / count
        error = loss - average  # Eq. 3
        return PIDState(count, loss, average, error, state.integral + error, error - state.error)


def _exponential_mean(raw: float, value: float, horizon: int, count: int) -> tuple[float, float]:
    """The raw mean after ``count`` values, and the same freed of its bias towards the initial 0."""
    keep = 1 - 1 / horizon
    raw = keep * raw + (1 - keep) * value
    return raw, raw / (1 - keep**count)
