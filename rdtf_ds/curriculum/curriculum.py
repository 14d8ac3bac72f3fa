"""Which frame counts, tasks and condition masks come next: static schedule × PID on the loss (paper, Algorithm 1).

Legend: T task, k frames of a sample, N masked frame length or level, P̄ static probability, P* output of the PID, N* target level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from rdtf_ds.curriculum.loss_signal import BucketMeans, TimestepNormaliser
from rdtf_ds.curriculum.pid import PIDController, PIDState, PIDTerms
from rdtf_ds.curriculum.static import StaticSchedule
from rdtf_ds.diffusion.masks import MAX_FRAMES, MIN_FRAMES, Mask, Task, level, mask_family

_Array = npt.NDArray[np.float64]
_TASKS = tuple(Task)


@dataclass(frozen=True, slots=True)
class CurriculumState:
    """Everything the curriculum remembers: one position in the schedule, the PID, the bucket means if they are used."""

    applied_steps: int
    pid: PIDState
    buckets: BucketMeans | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values that survive JSON exactly."""
        return {
            "applied_steps": self.applied_steps,
            "pid": self.pid.to_json(),
            "buckets": None if self.buckets is None else self.buckets.to_json(),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> CurriculumState:
        """The state :meth:`to_json` wrote.

        Raises:
            ValueError: a part is missing, unknown or not finite.
        """
        if set(values) != {"applied_steps", "pid", "buckets"}:
            raise ValueError(f"curriculum state must hold applied_steps, pid, buckets; got {', '.join(values)}")
        buckets = None if values["buckets"] is None else BucketMeans.from_json(values["buckets"])
        return cls(int(values["applied_steps"]), PIDState.from_json(values["pid"]), buckets)


@dataclass(frozen=True, slots=True)
class CurriculumSnapshot:
    """What the next draw follows, for the log. Modes without the adaptive part report P* and N* too, but do not follow them."""

    static_probability: dict[Task, float]  # P̄(T)
    static_level: float  # E_static[N]
    pid: PIDTerms  # P* is pid.total
    target_level: float  # N*
    frame_probability: dict[int, float]  # P(k)
    task_probability: dict[Task, float]  # P(T)
    level_probability: dict[int, float]  # P(N), N = 1..8
    joint_probability: dict[tuple[Task, int], float]  # P(T, N)


class Draw(NamedTuple):
    """How one sample is masked; ``text``: False hides every word of its caption."""

    task: Task
    mask: Mask
    text: bool


class _Outcomes(NamedTuple):
    """All (T, mask) on every k, side by side: one entry per outcome."""

    tasks: npt.NDArray[np.int64]  # index into _TASKS
    masks: tuple[Mask, ...]
    frames: npt.NDArray[np.int64]  # k
    levels: npt.NDArray[np.int64]  # N
    share: _Array  # P(mask | T, k)


class Curriculum:
    """P(T, mask, k) ∝ P̄(T) · P(k) · P(mask | T, k) · exp(−(N − N*)² / 2σ²), with N* = clip(E_static[N] − P*, 1, most frames).

    P(k) is uniform, P(mask | T, k) uniform in the family, but for generation: ``text_only_share`` of it is the empty mask.

    Args:
        mode: ``none``: P̄ is the schedule's mean throughout and the last factor is 1; ``linear``: P̄ follows the schedule;
            ``difficulty_adaptive``: all of it (Table 4's arms).
        schedule: P̄_t(T), Eq. 2.
        pid: P*, Eq. 3-4.
        sigma: σ, in levels: how far draws stray from N*.
        k_range: least and most k, both included.
        text_only_share: of generation: no visible frame, text alone.
        no_text_share: of generation with one visible frame: without text.
        normaliser: of the loss signal; None: the mean loss as it is.

    Raises:
        ValueError: unknown mode, or a value out of its range.
    """

    def __init__(
        self,
        mode: Literal["none", "linear", "difficulty_adaptive"],
        schedule: StaticSchedule,
        pid: PIDController,
        *,
        sigma: float = 1.0,
        k_range: tuple[int, int] = (MIN_FRAMES, MAX_FRAMES),
        text_only_share: float = 1 / 3,
        no_text_share: float = 0.5,
        normaliser: TimestepNormaliser | None = None,
    ) -> None:
        if mode not in ("none", "linear", "difficulty_adaptive"):
            raise ValueError(f"unknown curriculum mode {mode!r}: use 'none', 'linear' or 'difficulty_adaptive'")
        if not sigma > 0:
            raise ValueError(f"curriculum sigma must be positive, got {sigma}")
        if not MIN_FRAMES <= k_range[0] <= k_range[1] <= MAX_FRAMES:
            raise ValueError(f"k_range must satisfy {MIN_FRAMES} <= least <= most <= {MAX_FRAMES}, got {k_range}")
        for name, share in (("text_only_share", text_only_share), ("no_text_share", no_text_share)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be in 0..1, got {share}")
        self.mode = mode
        self.schedule = schedule
        self.pid = pid
        self.sigma = sigma
        self.k_range = k_range
        self.no_text_share = no_text_share
        self.normaliser = normaliser
        self._outcomes = _enumerate_outcomes(text_only_share)
        self._memo: tuple[CurriculumState, _Array] | None = None  # a step draws many samples from one state

    def initial(self) -> CurriculumState:
        """Before the first step."""
        return CurriculumState(0, self.pid.initial(), None if self.normaliser is None else self.normaliser.initial())

    def observe(
        self,
        state: CurriculumState,
        loss: float | None,
        sample_losses: Sequence[float] | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> CurriculumState:
        """The state after one attempted step.

        Args:
            state: before it.
            loss: mean over the global batch; None: fp16 overflow skipped the step, and nothing changes.
            sample_losses: of the whole global batch, only needed (with ``timesteps``) for a normalised signal.
            timesteps: t of each sample.

        Raises:
            ValueError: the loss is not finite and positive, or a normalised signal lacks its samples.
        """
        if loss is None:
            return state
        buckets, signal = state.buckets, loss
        if self.normaliser is not None:
            if sample_losses is None or timesteps is None or buckets is None:
                raise ValueError("a timestep-normalised curriculum needs sample_losses and timesteps, and a state that was started with it")
            buckets, signal = self.normaliser.update(buckets, sample_losses, timesteps)
        return CurriculumState(state.applied_steps + 1, self.pid.update(state.pid, signal), buckets)

    def draw_k(self, state: CurriculumState, rng: np.random.Generator) -> int:
        """The step's frame count, from its marginal P(k)."""
        least, most = self.k_range
        weights = self._weights(state)
        marginal = np.array([weights[self._outcomes.frames == k].sum() for k in range(least, most + 1)])
        return least + _draw_index(marginal, rng)

    def draw_task(self, state: CurriculumState, k: int, rng: np.random.Generator) -> Draw:
        """Task, condition mask and text of one sample from P(T, mask | k); ``k`` is its own, below the step's for a short clip.

        Raises:
            ValueError: k is outside 3..8.
        """
        if not MIN_FRAMES <= k <= MAX_FRAMES:
            raise ValueError(f"k must be in {MIN_FRAMES}..{MAX_FRAMES}, got {k}")
        candidates = np.flatnonzero(self._outcomes.frames == k)
        log_weights = self._log_weights(state)[candidates]
        chosen = candidates[_draw_index(np.exp(log_weights - log_weights.max()), rng)]
        task, mask = _TASKS[self._outcomes.tasks[chosen]], self._outcomes.masks[chosen]
        hides_text = rng.random() < self.no_text_share  # drawn for every sample, so that one draw does not shift another
        return Draw(task, mask, text=not (hides_text and task is Task.GENERATION and any(mask)))

    def snapshot(self, state: CurriculumState) -> CurriculumSnapshot:
        """The distribution the next draw from ``state`` follows, and what it was made of."""
        static = self._static_probability(state)
        terms = self.pid.output(state.pid)
        weights, outcomes = self._weights(state), self._outcomes
        joint = {
            (task, n): float(weights[(outcomes.tasks == index) & (outcomes.levels == n)].sum())
            for index, task in enumerate(_TASKS)
            for n in range(1, MAX_FRAMES + 1)
        }
        return CurriculumSnapshot(
            static_probability=static,
            static_level=self._static_level(static),
            pid=terms,
            target_level=self._target_level(static, terms),
            frame_probability={k: float(weights[outcomes.frames == k].sum()) for k in range(self.k_range[0], self.k_range[1] + 1)},
            task_probability={task: math.fsum(joint[task, n] for n in range(1, MAX_FRAMES + 1)) for task in _TASKS},
            level_probability={n: math.fsum(joint[task, n] for task in _TASKS) for n in range(1, MAX_FRAMES + 1)},
            joint_probability=joint,
        )

    def _static_probability(self, state: CurriculumState) -> dict[Task, float]:
        return self.schedule.mean() if self.mode == "none" else self.schedule.probability(state.applied_steps)

    def _static_level(self, static: Mapping[Task, float]) -> float:
        """E_static[N] = Σ_T P̄(T) · E[N | T], k uniform over its range."""
        least, most = self.k_range
        in_range = (self._outcomes.frames >= least) & (self._outcomes.frames <= most)
        base = _by_task(static)[self._outcomes.tasks] * self._outcomes.share * in_range / (most - least + 1)
        return float((base * self._outcomes.levels).sum())

    def _target_level(self, static: Mapping[Task, float], terms: PIDTerms) -> float:
        """N*: P* > 0, training is harder than it has been, moves it down."""
        return min(max(self._static_level(static) - terms.total, 1.0), float(self.k_range[1]))

    def _log_weights(self, state: CurriculumState) -> _Array:
        """log of P̄(T) · P(mask | T, k) · exp(−(N − N*)² / 2σ²) for every outcome: summed, as the entropies are (paper, Eq. 2-4)."""
        if self._memo is None or self._memo[0] != state:
            static = self._static_probability(state)
            with np.errstate(divide="ignore"):  # a task of probability 0 is never drawn
                log_weights = np.log(_by_task(static)[self._outcomes.tasks]) + np.log(self._outcomes.share)
            if self.mode == "difficulty_adaptive":
                distance = self._outcomes.levels - self._target_level(static, self.pid.output(state.pid))
                log_weights = log_weights - distance**2 / (2 * self.sigma**2)
            self._memo = (state, log_weights)
        return self._memo[1]

    def _weights(self, state: CurriculumState) -> _Array:
        """P(T, mask, k) over ``k_range``, normalised; relative to the largest, so that a narrow σ cannot underflow all."""
        least, most = self.k_range
        in_range = (self._outcomes.frames >= least) & (self._outcomes.frames <= most)
        log_weights = np.where(in_range, self._log_weights(state), -np.inf)
        weights = np.exp(log_weights - log_weights.max())
        normalised: _Array = weights / weights.sum()
        return normalised


def _by_task(probability: Mapping[Task, float]) -> _Array:
    return np.array([probability[task] for task in _TASKS])


def _enumerate_outcomes(text_only_share: float) -> _Outcomes:
    tasks, masks, frames, share = [], [], [], []
    for k in range(MIN_FRAMES, MAX_FRAMES + 1):
        for index, task in enumerate(_TASKS):
            family = mask_family(task, k)
            for mask in family:
                tasks.append(index)
                masks.append(mask)
                frames.append(k)
                if task is not Task.GENERATION:
                    share.append(1 / len(family))
                else:
                    share.append((1 - text_only_share) / k if any(mask) else text_only_share)
    levels = np.array([level(mask) for mask in masks])
    return _Outcomes(np.array(tasks), tuple(masks), np.array(frames), levels, np.array(share))


def _draw_index(weights: _Array, rng: np.random.Generator) -> int:
    """An index with probability proportional to its weight, from one uniform number; never one of weight 0."""
    cumulative = np.cumsum(weights)
    index = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
    return min(index, int(np.flatnonzero(weights)[-1]))
