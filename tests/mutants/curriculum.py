"""Wrongs of the static schedule, the PID controller and what is drawn from them."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

CURRICULUM = (
    Mutant(
        name="static schedule goes past its end",
        file="rdtf_ds/curriculum/static.py",
        old="min(applied_step / self.steps, 1.0)",
        new="applied_step / self.steps",
        tests=("tests/curriculum/test_static.py",),
    ),
    Mutant(
        name="PID sign flipped",
        file="rdtf_ds/curriculum/curriculum.py",
        old="self._static_level(static) - terms.total",
        new="self._static_level(static) + terms.total",
        tests=("tests/curriculum/test_curriculum.py",),
    ),
    Mutant(
        name="integral unclamped",
        file="rdtf_ds/curriculum/pid.py",
        old="integral = min(max(integral, -self.integral_limit), self.integral_limit)",
        new="integral = float(integral)",
        tests=("tests/curriculum/test_pid.py",),
    ),
    Mutant(
        name="derivative unfiltered",
        file="rdtf_ds/curriculum/pid.py",
        old="derivative = state.derivative + (slope - state.derivative) * dt",
        new="derivative = slope",
        tests=("tests/curriculum/test_pid.py",),
    ),
    Mutant(
        name="levels drawn twice as narrow",
        file="rdtf_ds/curriculum/curriculum.py",
        old="distance**2 / (2 * self.sigma**2)",
        new="distance**2 / self.sigma**2",
        tests=("tests/curriculum/test_curriculum.py",),
    ),
    Mutant(
        name="a skipped step moves the schedule",
        file="rdtf_ds/curriculum/curriculum.py",
        old="        if loss is None:\n            return state\n",
        new="        if loss is None:\n            return CurriculumState(state.applied_steps + 1, state.pid, state.buckets)\n",
        tests=("tests/curriculum/test_curriculum.py",),
    ),
)
