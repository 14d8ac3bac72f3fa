"""Eq. 2: tasks only get harder, always as a distribution."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdtf_ds.curriculum.static import StaticSchedule
from rdtf_ds.diffusion.masks import Task

START = {Task.INTERPOLATION: 0.6, Task.PREDICTION: 0.25, Task.GENERATION: 0.15}
END = {Task.INTERPOLATION: 0.2, Task.PREDICTION: 0.3, Task.GENERATION: 0.5}


@st.composite
def schedules(draw: st.DrawFn) -> StaticSchedule:
    start_ipt = draw(st.floats(0, 1))
    end_ipt = draw(st.floats(0, start_ipt))
    start_pdt = draw(st.floats(0, 1)) * (1 - start_ipt)
    end_pdt = start_pdt + draw(st.floats(0, 1)) * (start_ipt - end_ipt)
    start = {Task.INTERPOLATION: start_ipt, Task.PREDICTION: start_pdt, Task.GENERATION: max(1 - start_ipt - start_pdt, 0.0)}
    end = {Task.INTERPOLATION: end_ipt, Task.PREDICTION: end_pdt, Task.GENERATION: max(1 - end_ipt - end_pdt, start[Task.GENERATION])}
    return StaticSchedule(start, end, draw(st.integers(1, 10**6)))


@given(schedules(), st.lists(st.integers(0, 2 * 10**6), min_size=2, max_size=8))
def test_monotonic_and_normalised(schedule: StaticSchedule, steps: list[int]) -> None:
    path = [schedule.probability(step) for step in sorted(steps)]
    for before, after in zip(path, path[1:], strict=False):
        assert after[Task.INTERPOLATION] <= before[Task.INTERPOLATION]
        assert after[Task.PREDICTION] >= before[Task.PREDICTION]
        assert after[Task.GENERATION] >= before[Task.GENERATION]
    for probability in path:
        assert math.isclose(math.fsum(probability.values()), 1, abs_tol=1e-6)
        assert all(0 <= value <= 1 for value in probability.values())


def test_linear_between_and_constant_after() -> None:
    schedule = StaticSchedule(START, END, 100)
    assert schedule.probability(0) == START
    assert schedule.probability(25) == pytest.approx({"IPT": 0.5, "PDT": 0.2625, "GRT": 0.2375})
    assert schedule.probability(100) == pytest.approx(END)
    assert schedule.probability(10**9) == schedule.probability(100)
    assert schedule.mean() == pytest.approx({"IPT": 0.4, "PDT": 0.275, "GRT": 0.325})


def test_takes_the_names_of_a_config() -> None:
    schedule = StaticSchedule({"IPT": 0.6, "PDT": 0.25, "GRT": 0.15}, END, 100)  # type: ignore[dict-item]
    assert all(isinstance(task, Task) for task in schedule.probability(3))


@pytest.mark.parametrize(
    ("start", "end", "steps", "message"),
    [
        (END, START, 10, "IPT must not rise .* from 0.2 to 0.6"),
        ({"IPT": 0.5, "PDT": 0.4, "GRT": 0.1}, {"IPT": 0.4, "PDT": 0.3, "GRT": 0.3}, 10, "PDT must not fall .* from 0.4 to 0.3"),
        ({"IPT": 0.5, "PDT": 0.1, "GRT": 0.4}, {"IPT": 0.4, "PDT": 0.3, "GRT": 0.3}, 10, "GRT must not fall .* from 0.4 to 0.3"),
        ({"IPT": 0.7, "PDT": 0.25, "GRT": 0.15}, END, 10, "start must sum to 1"),
        (START, {"IPT": 0.2, "PDT": 0.3, "GRT": 0.4}, 10, "end must sum to 1"),
        ({"IPT": 1.2, "PDT": -0.35, "GRT": 0.15}, END, 10, "start must hold probabilities"),
        (START, {"IPT": float("nan"), "PDT": 0.3, "GRT": 0.5}, 10, "end must hold probabilities"),
        ({"IPT": 0.6, "PDT": 0.4}, END, 10, "start must name IPT, PDT, GRT"),
        (START, END, 0, "steps must be at least 1"),
    ],
)
def test_schedules_that_break_eq_2_are_refused(start: dict[Task, float], end: dict[Task, float], steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StaticSchedule(start, end, steps)


def test_negative_step_is_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        StaticSchedule(START, END, 10).probability(-1)
