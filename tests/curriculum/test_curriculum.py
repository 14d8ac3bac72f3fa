"""The balance of static and adaptive component: probabilities by hand, draws that follow them, the sign of the response."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rdtf_ds.curriculum.curriculum import Curriculum, CurriculumState
from rdtf_ds.curriculum.loss_signal import TimestepNormaliser
from rdtf_ds.curriculum.pid import PIDController, PIDState
from rdtf_ds.curriculum.static import StaticSchedule
from rdtf_ds.diffusion.masks import Task, level, mask_family
from rdtf_ds.seeding import numpy_generator

IPT, PDT, GRT = Task.INTERPOLATION, Task.PREDICTION, Task.GENERATION
START = {IPT: 0.6, PDT: 0.25, GRT: 0.15}
END = {IPT: 0.2, PDT: 0.3, GRT: 0.5}


def make(mode: str = "difficulty_adaptive", **options: Any) -> Curriculum:
    pid = options.pop("pid", PIDController(fast_horizon=2, slow_horizon=10))
    return Curriculum(mode, StaticSchedule(START, END, 1000), pid, **options)  # type: ignore[arg-type]


def with_error(curriculum: Curriculum, error: float, applied_steps: int = 0) -> CurriculumState:
    """A state past its warm-up whose P* is 5·error."""
    return CurriculumState(applied_steps, replace(PIDState(count=10**4), error=error), curriculum.initial().buckets)


def test_by_hand_on_three_frames() -> None:
    """k = 3: IPT and PDT hide 1 frame, GRT 2 (share 2/3) or 3 (share 1/3). E[N] = 0.85 + 0.15·7/3 = 1.2, P* = −0.5, N* = 1.7."""
    curriculum = make(k_range=(3, 3), sigma=0.8)
    snapshot = curriculum.snapshot(with_error(curriculum, -0.1))
    assert snapshot.static_probability == START
    assert snapshot.static_level == pytest.approx(1.2)
    assert snapshot.pid.total == pytest.approx(-0.5)
    assert snapshot.target_level == pytest.approx(1.7)
    near = {n: math.exp(-((n - 1.7) ** 2) / (2 * 0.8**2)) for n in (1, 2, 3)}
    weights = {(IPT, 1): 0.6 * near[1], (PDT, 1): 0.25 * near[1], (GRT, 2): 0.1 * near[2], (GRT, 3): 0.05 * near[3]}
    total = sum(weights.values())
    for key, probability in snapshot.joint_probability.items():
        assert probability == pytest.approx(weights.get(key, 0.0) / total)
    assert snapshot.task_probability[GRT] == pytest.approx((weights[GRT, 2] + weights[GRT, 3]) / total)
    assert snapshot.level_probability[1] == pytest.approx((weights[IPT, 1] + weights[PDT, 1]) / total)
    assert snapshot.frame_probability == {3: pytest.approx(1.0)}


def test_static_level_by_enumeration() -> None:
    """E_static[N] over the whole range of k, summed here mask by mask."""
    expected = 0.0
    for k in range(3, 9):
        for task in (IPT, PDT):
            family = mask_family(task, k)
            expected += START[task] * sum(map(level, family)) / len(family) / 6
        expected += START[GRT] * (0.25 * k + 0.75 * (k - 1)) / 6
    assert make(text_only_share=0.25).snapshot(make().initial()).static_level == pytest.approx(expected)


@given(st.floats(-3, 3), st.integers(0, 2000), st.floats(0.05, 5), st.sampled_from(["none", "linear", "difficulty_adaptive"]))
@settings(max_examples=60, deadline=None)
def test_snapshots_are_distributions(error: float, applied_steps: int, sigma: float, mode: str) -> None:
    curriculum = make(mode, sigma=sigma)
    snapshot = curriculum.snapshot(with_error(curriculum, error, applied_steps))
    for distribution in (
        snapshot.static_probability,
        snapshot.frame_probability,
        snapshot.task_probability,
        snapshot.level_probability,
        snapshot.joint_probability,
    ):
        assert math.fsum(distribution.values()) == pytest.approx(1)  # type: ignore[attr-defined]
        assert min(distribution.values()) >= 0  # type: ignore[attr-defined]
    assert 1 <= snapshot.target_level <= 8
    assert set(snapshot.joint_probability) == {(task, n) for task in Task for n in range(1, 9)}


def mean_level(curriculum: Curriculum, state: CurriculumState) -> float:
    return sum(n * p for n, p in curriculum.snapshot(state).level_probability.items())


def test_sign_of_the_response() -> None:
    """Harder than it has been: easier samples, fewer hidden frames. And the reverse."""
    curriculum = make()
    easier, same, harder = (with_error(curriculum, error) for error in (0.2, 0.0, -0.2))
    targets = [curriculum.snapshot(state).target_level for state in (easier, same, harder)]
    assert targets == pytest.approx([targets[1] - 1, targets[1], targets[1] + 1])
    assert targets[1] == curriculum.snapshot(same).static_level
    assert mean_level(curriculum, easier) < mean_level(curriculum, same) - 0.2
    assert mean_level(curriculum, harder) > mean_level(curriculum, same) + 0.2


def test_a_rising_loss_lowers_the_level_through_observe() -> None:
    curriculum = make()
    state = curriculum.initial()
    for _ in range(60):
        state = curriculum.observe(state, 0.2)
    before = curriculum.snapshot(state).target_level
    for _ in range(4):
        state = curriculum.observe(state, 0.3)
    assert curriculum.snapshot(state).target_level < before - 0.5


@pytest.mark.parametrize(("error", "target"), [(5.0, 1.0), (-5.0, 8.0)])
def test_target_level_is_clipped(error: float, target: float) -> None:
    curriculum = make()
    assert curriculum.snapshot(with_error(curriculum, error)).target_level == target
    if target > 1:
        assert make(k_range=(3, 5)).snapshot(with_error(curriculum, error)).target_level == 5.0


def test_linear_follows_the_schedule_alone() -> None:
    curriculum = make("linear")
    for applied_steps in (0, 300, 5000):
        expected = curriculum.schedule.probability(applied_steps)
        calm, alarmed = (curriculum.snapshot(with_error(curriculum, error, applied_steps)) for error in (0.0, 0.5))
        assert calm.task_probability == pytest.approx(expected)
        assert calm.frame_probability == pytest.approx({k: 1 / 6 for k in range(3, 9)})
        assert alarmed.joint_probability == calm.joint_probability


def test_none_is_constant() -> None:
    curriculum = make("none")
    first, last = curriculum.snapshot(with_error(curriculum, 0.0)), curriculum.snapshot(with_error(curriculum, 0.5, 900))
    assert first.joint_probability == last.joint_probability
    assert first.task_probability == pytest.approx({IPT: 0.4, PDT: 0.275, GRT: 0.325})


@pytest.mark.parametrize("mode", ["linear", "difficulty_adaptive"])
def test_draws_follow_the_snapshot(mode: str) -> None:
    curriculum = make(mode)
    state = with_error(curriculum, -0.1, 500)
    snapshot, rng, count = curriculum.snapshot(state), numpy_generator(0), 8000
    frames: Counter[int] = Counter()
    joint: Counter[tuple[Task, int]] = Counter()
    for _ in range(count):
        k = curriculum.draw_k(state, rng)
        draw = curriculum.draw_task(state, k, rng)
        assert draw.mask in mask_family(draw.task, k)
        frames[k] += 1
        joint[draw.task, level(draw.mask)] += 1
    for drawn, probability in ((frames, snapshot.frame_probability), (joint, snapshot.joint_probability)):
        for key, p in probability.items():  # type: ignore[attr-defined]
            assert drawn[key] / count == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / count) + 1e-9)


def test_shares_of_generation() -> None:
    """Of generation, a fifth by text alone, always with text; of the rest a quarter without text; other tasks keep theirs."""
    curriculum = make("linear", text_only_share=0.2, no_text_share=0.25)
    state, rng = with_error(curriculum, 0.0, 10**6), numpy_generator(1)
    draws = [curriculum.draw_task(state, 6, rng) for _ in range(8000)]
    generation = [draw for draw in draws if draw.task is GRT]
    one_frame = [draw for draw in generation if any(draw.mask)]
    assert len(generation) / len(draws) == pytest.approx(0.5, abs=0.03)
    assert 1 - len(one_frame) / len(generation) == pytest.approx(0.2, abs=0.03)
    assert sum(not draw.text for draw in one_frame) / len(one_frame) == pytest.approx(0.25, abs=0.03)
    assert all(draw.text for draw in draws if draw.task is not GRT or not any(draw.mask))
    shown = Counter(draw.mask for draw in one_frame)
    assert len(shown) == 6 and min(shown.values()) > 0.7 * len(one_frame) / 6


@pytest.mark.parametrize(("text_only_share", "visible"), [(1.0, 0), (0.0, 1)])
def test_extreme_shares(text_only_share: float, visible: int) -> None:
    curriculum = make("linear", text_only_share=text_only_share, no_text_share=1.0)
    state, rng = with_error(curriculum, 0.0, 10**6), numpy_generator(2)
    generation = [draw for draw in (curriculum.draw_task(state, 4, rng) for _ in range(200)) if draw.task is GRT]
    assert generation and all(sum(draw.mask) == visible and draw.text == (visible == 0) for draw in generation)


def test_a_short_clip_draws_with_its_own_k() -> None:
    """Below the range of the step's k, and with N* far out of its reach and a narrow σ: nothing underflows."""
    curriculum = make(k_range=(6, 8), sigma=0.05)
    state = with_error(curriculum, -5.0)
    assert curriculum.snapshot(state).target_level == 8.0
    draws = [curriculum.draw_task(state, 3, numpy_generator(3, number)) for number in range(50)]
    assert {draw.mask for draw in draws} == {(False, False, False)}, "the level nearest to 8 that three frames have"
    assert {curriculum.draw_k(state, numpy_generator(4, number)) for number in range(50)} == {8}
    for k in (2, 9):
        with pytest.raises(ValueError, match="k must be in"):
            curriculum.draw_task(state, k, numpy_generator(0))


class _Always(np.random.Generator):
    """A generator whose uniform draws are one given number."""

    def __init__(self, value: float) -> None:
        super().__init__(np.random.PCG64(0))
        self._value = value

    def random(self, *args: Any, **kwargs: Any) -> Any:
        return self._value


@pytest.mark.parametrize("value", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_draw_nothing_impossible(value: float) -> None:
    schedule = StaticSchedule({IPT: 0.0, PDT: 1.0, GRT: 0.0}, {IPT: 0.0, PDT: 1.0, GRT: 0.0}, 10)
    curriculum = Curriculum("linear", schedule, PIDController(), k_range=(4, 7))
    state = curriculum.initial()
    assert curriculum.draw_k(state, _Always(value)) == (4 if value == 0 else 7)
    assert curriculum.draw_task(state, 5, _Always(value)).task is PDT


def test_observe_counts_applied_steps_only() -> None:
    curriculum = make()
    state = curriculum.observe(curriculum.initial(), 0.5)
    assert (state.applied_steps, state.pid.count) == (1, 1)
    assert curriculum.observe(state, None) is state
    for loss in (math.nan, math.inf, 0.0):
        with pytest.raises(ValueError, match="finite, positive loss"):
            curriculum.observe(state, loss)


def test_normalised_signal_feeds_the_pid() -> None:
    """The mean loss swings with the timesteps drawn, which alone would move P*; the normalised signal settles."""
    plain, normalised = make(), make(normaliser=TimestepNormaliser(buckets=2, diffusion_steps=10, horizon=5))
    states = [plain.initial(), normalised.initial()]
    for step in range(200):
        loss, losses, timesteps = (1.0, [1.0, 1.0], [0, 1]) if step % 2 else (0.1, [0.1, 0.1], [8, 9])
        states = [curriculum.observe(state, loss, losses, timesteps) for curriculum, state in zip((plain, normalised), states, strict=True)]
    assert abs(states[0].pid.error) > 0.1
    assert abs(states[1].pid.error) < 1e-6
    assert states[1].buckets is not None and states[1].buckets.counts == (100, 100)
    with pytest.raises(ValueError, match="needs sample_losses and timesteps"):
        normalised.observe(states[1], 0.5)


@pytest.mark.parametrize("normaliser", [None, TimestepNormaliser(buckets=3, diffusion_steps=9, horizon=4)])
def test_json_is_exact(normaliser: TimestepNormaliser | None) -> None:
    curriculum = make(normaliser=normaliser)
    state = curriculum.initial()
    for step in range(50):
        state = curriculum.observe(state, 0.1 + 0.01 * (step % 7), [0.1 + 0.07 * (step % 3)], [step % 9])
    restored = CurriculumState.from_json(json.loads(json.dumps(state.to_json())))
    assert restored == state
    assert curriculum.observe(restored, 0.3, [0.3], [2]) == curriculum.observe(state, 0.3, [0.3], [2])
    with pytest.raises(ValueError, match="curriculum state must hold"):
        CurriculumState.from_json({"applied_steps": 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "lcl"}, "'none', 'linear' or 'difficulty_adaptive'"),
        ({"sigma": 0.0}, "sigma must be positive"),
        ({"k_range": (2, 8)}, "k_range"),
        ({"k_range": (5, 4)}, "k_range"),
        ({"k_range": (3, 9)}, "k_range"),
        ({"text_only_share": 1.5}, "text_only_share"),
        ({"no_text_share": -0.1}, "no_text_share"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)
