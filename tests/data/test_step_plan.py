"""Plans: one order for everyone, the same on any number of ranks, exactly ``delay`` states behind, exact after a restart."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rdtf_ds.curriculum.curriculum import Curriculum, CurriculumState
from rdtf_ds.curriculum.pid import PIDController, PIDState
from rdtf_ds.curriculum.static import StaticSchedule
from rdtf_ds.data.step_plan import PlanQueue, SamplePlan, StepPlan, StepPlanner
from rdtf_ds.diffusion.masks import Task, level
from rdtf_ds.errors import UserError

START = {Task.INTERPOLATION: 0.6, Task.PREDICTION: 0.25, Task.GENERATION: 0.15}
END = {Task.INTERPOLATION: 0.2, Task.PREDICTION: 0.3, Task.GENERATION: 0.5}
CLIPS = np.arange(100, 137)
FRAMES = np.array([3, 4, 5, 6, 7, 8, 20] * 6)[: len(CLIPS)]


def make_curriculum() -> Curriculum:
    return Curriculum("difficulty_adaptive", StaticSchedule(START, END, 50), PIDController(fast_horizon=1, slow_horizon=2))


def make_planner(seed: int = 0, global_batch: int = 6, **options: Any) -> StepPlanner:
    return StepPlanner(seed, global_batch, CLIPS, FRAMES, make_curriculum(), **options)


def state_of(error: float, applied_steps: int = 0) -> CurriculumState:
    return CurriculumState(applied_steps, replace(PIDState(count=1000), error=error))


def test_plans_hold_what_they_promise() -> None:
    planner, frame_count = make_planner(), dict(zip(CLIPS.tolist(), FRAMES.tolist(), strict=True))
    for step in range(30):
        plan = planner.plan(step, state_of(0.0))
        assert plan.step == step and 3 <= plan.k <= 8
        assert [sample.sample_number for sample in plan.samples] == list(range(6 * step, 6 * step + 6))
        for sample in plan.samples:
            assert sample.k == min(plan.k, frame_count[sample.clip_id]) == len(sample.mask)
            assert 1 <= level(sample.mask) <= sample.k


def test_every_clip_once_an_epoch_in_another_order_each_time() -> None:
    planner = make_planner(global_batch=5)
    order = [sample.clip_id for step in range(30) for sample in planner.plan(step, state_of(0.0)).samples]
    first, second = order[: len(CLIPS)], order[len(CLIPS) : 2 * len(CLIPS)]
    assert sorted(first) == sorted(second) == CLIPS.tolist()
    assert first != second and first != CLIPS.tolist()


def test_order_depends_on_the_seed_and_the_step_alone() -> None:
    """Not on curriculum states, nor on which steps were planned before."""

    def ids(planner: StepPlanner, step: int, error: float) -> list[int]:
        return [sample.clip_id for sample in planner.plan(step, state_of(error)).samples]

    forwards, backwards = make_planner(), make_planner()
    first = [ids(forwards, step, 0.0) for step in range(40)]
    assert first == [ids(backwards, step, 0.3) for step in reversed(range(40))][::-1]
    assert first != [ids(make_planner(seed=1), step, 0.0) for step in range(40)]


def test_k_and_masks_depend_on_the_state() -> None:
    planner = make_planner(global_batch=40)
    easy, hard = planner.plan(3, state_of(0.5)), planner.plan(3, state_of(-0.5))
    assert np.mean([level(sample.mask) for sample in easy.samples]) < np.mean([level(sample.mask) for sample in hard.samples])
    ks = Counter(planner.plan(step, state_of(0.0)).k for step in range(60))
    assert len(ks) >= 4


def test_samples_draw_by_their_own_number() -> None:
    """The masks of a batch are not copies of one draw, and a sample draws the same whatever batch it is in."""
    state = state_of(0.0)
    plan = make_planner(global_batch=37).plan(0, state)
    full = [sample for sample in plan.samples if sample.k == plan.k]
    assert len({(sample.task, sample.mask) for sample in full}) > 3
    one_by_one = make_planner(global_batch=1)
    matching = [(sample, one_by_one.plan(sample.sample_number, state).samples[0]) for sample in plan.samples]
    same_k = [(one, other) for one, other in matching if one.k == other.k]
    assert len(same_k) >= 5 and all(one == other for one, other in same_k)


def test_without_the_dual_mask() -> None:
    plan = make_planner(global_batch=37, dual_mask=False).plan(2, state_of(0.5))
    assert plan.k == 8
    for sample in plan.samples:
        assert sample.k == min(8, FRAMES[sample.clip_id - 100])
        assert sample.mask == (True,) + (False,) * (sample.k - 1)
        assert sample.task is Task.GENERATION and sample.text
    shorter = make_planner(dual_mask=False, frames=5).plan(0, state_of(0.0))
    assert shorter.k == 5 and max(sample.k for sample in shorter.samples) == 5


def numbered(count: int) -> StepPlan:
    return StepPlan(0, 3, tuple(SamplePlan(i, i, 3, Task.PREDICTION, (True, True, False), True) for i in range(count)))


def test_ranks_take_slices_in_global_batch_order() -> None:
    """Micro-step major, then rank, then position: 12 samples, 2 ranks, micro-batches of 2."""
    plan = numbered(12)
    numbers = [[[sample.sample_number for sample in micro] for micro in plan.for_rank(rank, 2, 2)] for rank in (0, 1)]
    assert numbers == [[[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [10, 11]]]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_union_over_ranks_is_the_global_batch(world_size: int, micro_batch: int) -> None:
    plan = numbered(24)
    by_rank = [plan.for_rank(rank, world_size, micro_batch) for rank in range(world_size)]
    joined = [sample for micro_step in zip(*by_rank, strict=True) for micro in micro_step for sample in micro]
    assert tuple(joined) == plan.samples


@pytest.mark.parametrize(("rank", "world_size", "micro_batch"), [(2, 2, 1), (-1, 2, 1), (0, 5, 1), (0, 2, 4), (0, 1, 0)])
def test_impossible_slices_are_refused(rank: int, world_size: int, micro_batch: int) -> None:
    with pytest.raises(ValueError, match="rank"):
        numbered(12).for_rank(rank, world_size, micro_batch)


def sample_loss(sample: SamplePlan) -> float:
    """A loss that depends on everything a plan says, so that a different plan changes the curriculum."""
    return 0.1 + 0.05 * level(sample.mask) + 0.013 * (sample.clip_id % 7) + (0.02 if sample.text else 0.0)


def run(world_size: int, steps: int) -> list[StepPlan]:
    """Training of ``world_size`` ranks, each with its own queue; the loss is the mean over all ranks."""
    curriculum = make_curriculum()
    queues = [PlanQueue(make_planner(), delay=2) for _ in range(world_size)]
    plans = []
    for step in range(steps):
        of_ranks = [queue.plan(step) for queue in queues]
        assert all(plan == of_ranks[0] for plan in of_ranks)
        losses = [sample_loss(s) for r, plan in enumerate(of_ranks) for micro in plan.for_rank(r, world_size, 1) for s in micro]
        mean = math.fsum(losses) / len(losses)
        for queue in queues:
            queue.push(curriculum.observe(queue.state, mean if step % 11 else None))  # some steps are skipped
        plans.append(of_ranks[0])
    return plans


def test_plans_are_equal_on_one_two_and_three_ranks() -> None:
    one, two, three = (run(world_size, 40) for world_size in (1, 2, 3))
    assert one == two == three
    assert len({plan.k for plan in one}) >= 3


def filled(delay: int, steps: int) -> tuple[PlanQueue, list[CurriculumState]]:
    """A queue after ``steps`` steps with states that ask for very different levels, and all the states, by step."""
    queue = PlanQueue(make_planner(), delay)
    states = [queue.state]
    for step in range(1, steps + 1):
        states.append(state_of(0.5 if step % 2 else -0.5, step))
        queue.push(states[-1])
    return queue, states


@pytest.mark.parametrize("delay", [0, 1, 4])
def test_delay_is_exact(delay: int) -> None:
    """Plan s is drawn from the state before s − delay, and from no neighbour of it."""
    planner, neighbours_differ = make_planner(), Counter[int]()
    for next_step in range(10, 20):
        queue, states = filled(delay, next_step)
        assert queue.plan(next_step + delay) == planner.plan(next_step + delay, states[next_step])
        for step in range(next_step, next_step + delay + 1):
            assert queue.plan(step) == planner.plan(step, states[step - delay])
        for neighbour in (-1, 1):  # a draw may fall the same by chance, most do not
            state = states[next_step - delay + neighbour] if next_step - delay + neighbour <= next_step else state_of(-states[-1].pid.error)
            neighbours_differ[neighbour] += queue.plan(next_step) != planner.plan(next_step, state)
    assert min(neighbours_differ[-1], neighbours_differ[1]) >= 8


def test_newer_states_do_not_change_a_plan() -> None:
    queue, _ = filled(4, 10)
    pending = {step: queue.plan(step) for step in range(10, 15)}
    queue.push(state_of(3.0, 11))
    queue.push(state_of(-3.0, 12))
    assert {step: queue.plan(step) for step in range(12, 15)} == {step: pending[step] for step in range(12, 15)}


def test_the_first_steps_use_the_first_state() -> None:
    queue, planner = PlanQueue(make_planner(), 4), make_planner()
    first = planner.curriculum.initial()
    assert [queue.plan(step) for step in range(5)] == [planner.plan(step, first) for step in range(5)]
    queue.push(state_of(0.5))
    assert queue.plan(4) == planner.plan(4, first)
    assert queue.plan(5) == planner.plan(5, state_of(0.5))


def test_plans_too_far_ahead_or_over_are_refused() -> None:
    queue, _ = filled(4, 10)
    with pytest.raises(ValueError, match="step 15 is too far ahead: with delay 4 .* the end of step 10; 10 is next"):
        queue.plan(15)
    with pytest.raises(ValueError, match="step 9 is over: .* step 10"):
        queue.plan(9)
    with pytest.raises(ValueError, match="too far ahead"):
        PlanQueue(make_planner(), 0).plan(1)
    with pytest.raises(ValueError, match="steps count from 0"):
        PlanQueue(make_planner(), 4).plan(-1)
    with pytest.raises(ValueError, match="delay must not be negative"):
        PlanQueue(make_planner(), -1)


@pytest.mark.parametrize("steps", [0, 2, 4, 13])
def test_a_restored_queue_gives_the_same_plans(steps: int) -> None:
    queue, _ = filled(4, steps)
    saved = json.loads(json.dumps(queue.state_dict()))
    assert len(saved["states"]) == min(steps, 4) + 1
    restored = PlanQueue(make_planner(), 4)
    restored.load_state_dict(saved)
    assert (restored.next_step, restored.state, restored.delay) == (steps, queue.state, 4)
    for more in range(6):
        ahead = range(steps + more, steps + more + 5)
        assert [restored.plan(step) for step in ahead] == [queue.plan(step) for step in ahead]
        for each in (queue, restored):
            each.push(state_of(0.1 * more, steps + more))
    assert restored.state_dict() == queue.state_dict()


def test_what_cannot_be_restored_is_refused() -> None:
    saved = filled(4, 10)[0].state_dict()
    with pytest.raises(UserError, match=r"rdtf.curriculum.delay is 3, .* written with 4"):
        PlanQueue(make_planner(), 3).load_state_dict(saved)
    with pytest.raises(ValueError, match="hold 4 curriculum states; 5 are needed at step 10"):
        PlanQueue(make_planner(), 4).load_state_dict({**saved, "states": saved["states"][1:]})


def test_a_large_dataset_plans_fast_and_keeps_two_epochs() -> None:
    count = 1_800_000
    planner = StepPlanner(0, 16, np.arange(count), np.full(count, 12), make_curriculum())
    planner.plan(0, state_of(0.0))
    start = time.process_time()
    for step in range(100):
        planner.plan(step, state_of(0.001 * step))
    assert (time.process_time() - start) / 100 < 0.01, "2 ms wanted; five times that is a fault on any machine"
    for epoch in range(4):
        planner.plan(epoch * count // 16, state_of(0.0))
    assert len(planner._epochs) == 2


@pytest.mark.parametrize(
    ("clip_ids", "frame_counts", "batch", "message"),
    [
        ([1, 2], [5], 1, "aligned"),
        ([], [], 1, "no clips"),
        ([4, 5], [8, 2], 1, "clip 5 has 2 frames"),
        ([4], [8], 0, "global_batch"),
    ],
)
def test_bad_arguments_are_refused(clip_ids: list[int], frame_counts: list[int], batch: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepPlanner(0, batch, clip_ids, frame_counts, make_curriculum())
