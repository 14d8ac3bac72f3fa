"""The static component: how often each task is trained on, from easy to hard as training goes on (Eq. 2)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rdtf_ds.diffusion.masks import Task

_SUM_TOLERANCE = 1e-6


class StaticSchedule:
    """P̄_t(T): linear from ``start`` to ``end`` over ``steps`` applied steps, constant afterwards.

    Eq. 2: P̄(IPT) never rises, P̄(PDT) and P̄(GRT) never fall. Always a distribution.

    Args:
        start: probability of every task at step 0.
        end: probability of every task from ``steps`` on.
        steps: length of the way between, at least 1.

    Raises:
        ValueError: not two distributions over the three tasks, or they break Eq. 2.
    """

    def __init__(self, start: Mapping[Task, float], end: Mapping[Task, float], steps: int) -> None:
        self.start = _distribution("start", start)
        self.end = _distribution("end", end)
        self.steps = steps
        if steps < 1:
            raise ValueError(f"static schedule: steps must be at least 1, got {steps}")
        if self.end[Task.INTERPOLATION] > self.start[Task.INTERPOLATION]:
            raise ValueError(f"static schedule: IPT must not rise (Eq. 2), but goes {self._way(Task.INTERPOLATION)}")
        for task in (Task.PREDICTION, Task.GENERATION):
            if self.end[task] < self.start[task]:
                raise ValueError(f"static schedule: {task} must not fall (Eq. 2), but goes {self._way(task)}")

    def probability(self, applied_step: int) -> dict[Task, float]:
        """P̄_t(T) after ``applied_step`` applied optimizer steps (those fp16 overflow skipped do not count)."""
        if applied_step < 0:
            raise ValueError(f"applied steps count from 0, got {applied_step}")
        progress = min(applied_step / self.steps, 1.0)
        return {task: self.start[task] + progress * (self.end[task] - self.start[task]) for task in Task}

    def mean(self) -> dict[Task, float]:
        """Halfway between start and end: the constant mixture of training without a curriculum (Table 4)."""
        return {task: (self.start[task] + self.end[task]) / 2 for task in Task}

    def _way(self, task: Task) -> str:
        return f"from {self.start[task]} to {self.end[task]}"


def _distribution(name: str, probabilities: Mapping[Task, float]) -> dict[Task, float]:
    if set(probabilities) != set(Task):
        raise ValueError(f"static schedule: {name} must name {', '.join(Task)}, got {', '.join(map(str, probabilities))}")
    if not all(math.isfinite(value) and 0 <= value <= 1 for value in probabilities.values()):
        raise ValueError(f"static schedule: {name} must hold probabilities in 0..1, got {dict(probabilities)}")
    if abs(math.fsum(probabilities.values()) - 1) > _SUM_TOLERANCE:
        raise ValueError(f"static schedule: {name} must sum to 1, sums to {math.fsum(probabilities.values())}")
    return {task: float(probabilities[task]) for task in Task}
