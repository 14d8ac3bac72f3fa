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
from rdtf_ds.data.step_plan import PlanQueue, SamplePlan, StepPlan, StepPlanner, draw_key
from rdtf_ds.diffusion.masks import Task, level
from rdtf_ds.errors import UserError
from rdtf_ds.seeding import derive_seed, numpy_generator

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


def test_a_draw_is_named_by_number_purpose_and_attempt() -> None:
    assert draw_key(7, "noise", 0) == (7, "noise")
    assert draw_key(7, "noise", 1) == (7, "noise", 1)
    assert draw_key(7, "noise", 2) == (7, "noise", 2)


def test_only_the_samples_passed_over_change() -> None:
    planner, state = make_planner(global_batch=20), state_of(0.0)
    for step in range(10):
        before, passed_over = planner.plan(step, state), {20 * step + 3: 1, 20 * step + 19: 2, 20 * step + 20: 1}
        after = planner.plan(step, state, passed_over)
        assert (after.step, after.k, len(after.samples)) == (before.step, before.k, 20)
        for position, (old, new) in enumerate(zip(before.samples, after.samples, strict=True)):
            assert new.sample_number == old.sample_number
            attempt = {3: 1, 19: 2}.get(position, 0)
            assert (old.attempt, new.attempt) == (0, attempt)
            assert new == old if attempt == 0 else new.clip_id != old.clip_id


@pytest.mark.parametrize("dual_mask", [True, False])
def test_another_clip_is_used_as_far_as_it_goes(dual_mask: bool) -> None:
    """k of the step stays; a shorter clip uses all it has."""
    planner, frame_count = make_planner(global_batch=37, dual_mask=dual_mask), dict(zip(CLIPS.tolist(), FRAMES.tolist(), strict=True))
    plan = planner.plan(1, state_of(0.0), dict.fromkeys(range(37, 74), 1))
    assert {sample.attempt for sample in plan.samples} == {1}
    assert all(sample.k == min(plan.k, frame_count[sample.clip_id]) == len(sample.mask) for sample in plan.samples)
    assert len({sample.k for sample in plan.samples}) > 1


def clip_of(planner: StepPlanner, number: int, attempt: int) -> int:
    step, position = divmod(number, planner.global_batch)
    return planner.plan(step, state_of(0.0), {number: attempt}).samples[position].clip_id


def test_the_other_clip_is_drawn_from_all_but_those_before() -> None:
    """By the hash of seed, number, "passed over" and attempt, among the rows that no earlier attempt had."""
    planner = make_planner(seed=3)
    for number in range(60):
        left = CLIPS.tolist()
        left.remove(clip_of(planner, number, 0))
        for attempt in (1, 2, 3):
            expected = left.pop(derive_seed(3, number, "passed over", attempt) % len(left))
            assert clip_of(planner, number, attempt) == expected
    counts = Counter(clip_of(planner, number, 1) for number in range(37 * 40))
    assert set(counts) == set(CLIPS.tolist()) and max(counts.values()) < 40 + 4 * math.sqrt(40)


@pytest.mark.parametrize("clips", [1, 2, 3])
def test_few_clips_all_have_their_turn(clips: int) -> None:
    """All of them before one comes again, and never the same twice in a row, but for the only one there is."""
    planner = StepPlanner(0, 1, CLIPS[:clips], np.full(clips, 8), make_curriculum())
    for number in range(20):
        ids = [clip_of(planner, number, attempt) for attempt in range(7)]
        assert len(set(ids[:clips])) == clips and set(ids) == set(CLIPS[:clips].tolist())
        assert clips == 1 or all(one != other for one, other in zip(ids, ids[1:], strict=False))


def test_the_task_is_drawn_anew_in_each_attempt() -> None:
    """Of one clip alone, so that nothing but the draw can differ."""
    planner, state, changed = StepPlanner(5, 1, [9], [8], make_curriculum()), state_of(0.0), Counter[int]()
    for number in range(40):
        drawn = [planner.plan(number, state, {number: attempt} if attempt else {}).samples[0] for attempt in range(3)]
        for attempt, sample in enumerate(drawn):
            key = (number, "task", attempt) if attempt else (number, "task")
            expected = planner.curriculum.draw_task(state, sample.k, numpy_generator(5, *key))
            assert (sample.task, sample.mask, sample.text) == (expected.task, expected.mask, expected.text)
        for attempt in (1, 2):
            changed[attempt] += replace(drawn[attempt], attempt=attempt - 1) != drawn[attempt - 1]
    assert min(changed[1], changed[2]) > 20


def test_a_queue_counts_what_it_passes_over() -> None:
    queue, states = filled(2, 6)
    planner, numbers = make_planner(), [6 * 7 + 1, 6 * 8 + 5]
    before = {step: queue.plan(step) for step in (6, 7, 8)}
    assert queue.passed_over == {}
    queue.pass_over(numbers)
    queue.pass_over(iter(numbers[:1]))
    assert queue.passed_over == {43: 2, 53: 1}
    assert queue.plan(6) == before[6]
    assert queue.plan(7) == planner.plan(7, states[5], {43: 2}) != before[7]
    assert queue.plan(8) == planner.plan(8, states[6], {53: 1}) != before[8]

    saved = json.loads(json.dumps(queue.state_dict()))
    assert saved == filled(2, 6)[0].state_dict()  # incidents are kept elsewhere, and outlive a checkpoint
    queue.load_state_dict(saved)
    assert queue.passed_over == {43: 2, 53: 1}

    counts = {53: 3}
    queue.passed_over = counts
    counts[53] = 9
    assert queue.passed_over == {53: 3} and queue.plan(7) == before[7]
    queue.pass_over([53])
    assert queue.passed_over == {53: 4}
    queue.passed_over = {}
    assert queue.plan(8) == before[8]
    with pytest.raises(ValueError, match="sample 4 cannot have been passed over 0 times"):
        queue.passed_over = {3: 1, 4: 0}
    assert queue.passed_over == {}


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
