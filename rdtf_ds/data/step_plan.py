"""Which clip, frame count, task and condition mask each sample of each optimizer step has, the same on every rank.

Sample order depends on (seed, step) alone. k, tasks and masks are a pure function of (seed, step, curriculum state ``delay`` steps
earlier), so a loader may work ``delay`` steps ahead, and a checkpoint needs only the last curriculum states.

A sample with which the numbers went bad is passed over: it keeps its number and its step, and takes another clip and other draws.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from rdtf_ds.curriculum.curriculum import Curriculum, CurriculumState
from rdtf_ds.data.epoch_order import EpochOrder
from rdtf_ds.diffusion.masks import MAX_FRAMES, MIN_FRAMES, Mask, Task
from rdtf_ds.errors import UserError
from rdtf_ds.seeding import derive_seed, numpy_generator

_CACHED_EPOCHS = 2  # a global batch may straddle the border of two
_NONE_PASSED_OVER: Mapping[int, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class SamplePlan:
    """One sample: its number over the whole run, its clip, how many frames of it, and how they are masked (len(mask) == k).

    ``attempt`` is how often it was passed over, 0 for nearly all: see `draw_key`.
    """

    sample_number: int
    clip_id: int
    k: int
    task: Task
    mask: Mask
    text: bool
    attempt: int = 0


def draw_key(sample_number: int, purpose: str, attempt: int) -> tuple[int | str, ...]:
    """What names one random draw of a sample, after the run's seed. Never passed over, it draws as if there were no attempts."""
    return (sample_number, purpose, attempt) if attempt else (sample_number, purpose)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One optimizer step: the frame count k of the step (a shorter clip uses all it has) and its global batch, in order."""

    step: int
    k: int
    samples: tuple[SamplePlan, ...]

    def for_rank(self, rank: int, world_size: int, micro_batch: int) -> list[tuple[SamplePlan, ...]]:
        """This rank's micro-batches, first to last. The global batch is ordered by micro-step, then rank, then position.

        Raises:
            ValueError: the global batch is not a whole number of micro-batches per rank, or there is no such rank.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} does not exist among {world_size} ranks")
        if micro_batch < 1 or len(self.samples) % (world_size * micro_batch):
            split = f"micro-batches of {micro_batch} on {world_size} ranks"
            raise ValueError(f"a global batch of {len(self.samples)} cannot be split into {split}")
        starts = range(rank * micro_batch, len(self.samples), world_size * micro_batch)
        return [self.samples[start : start + micro_batch] for start in starts]


class StepPlanner:
    """Draws the plan of any step from the curriculum state it is given; holds no state but a cache of epochs' orders.

    Args:
        seed: of the run.
        global_batch: samples per optimizer step, over all ranks and micro-steps.
        clip_ids: the clips to train on, each shown once per epoch.
        frame_counts: frames of each of ``clip_ids``, aligned with it.
        curriculum: draws k, tasks and masks.
        frames: the most frames a sample has.
        dual_mask: False is Table 3's arm without the dual mask: all ``frames`` frames (or all the clip has), the first one visible,
            with text; the curriculum then draws nothing.

    Raises:
        ValueError: no clips, a clip too short to train on, arrays of unequal length, or a batch below 1.
    """

    def __init__(
        self,
        seed: int,
        global_batch: int,
        clip_ids: npt.ArrayLike,
        frame_counts: npt.ArrayLike,
        curriculum: Curriculum,
        *,
        frames: int = MAX_FRAMES,
        dual_mask: bool = True,
    ) -> None:
        self.seed = seed
        self.global_batch = global_batch
        self.curriculum = curriculum
        self.frames = frames
        self.dual_mask = dual_mask
        self._clip_ids = np.asarray(clip_ids, dtype=np.int64)
        self._frame_counts = np.asarray(frame_counts, dtype=np.int64)
        self._epochs: OrderedDict[int, EpochOrder] = OrderedDict()
        if self._clip_ids.ndim != 1 or self._clip_ids.shape != self._frame_counts.shape:
            raise ValueError(f"clip_ids {self._clip_ids.shape} and frame_counts {self._frame_counts.shape} must be aligned 1-D arrays")
        if self._clip_ids.size == 0:
            raise ValueError("no clips to plan with")
        if self._frame_counts.min() < MIN_FRAMES:
            short = self._clip_ids[self._frame_counts.argmin()]
            raise ValueError(f"clip {short} has {self._frame_counts.min()} frames; training needs at least {MIN_FRAMES}")
        if global_batch < 1:
            raise ValueError(f"global_batch must be at least 1, got {global_batch}")

    def plan(self, step: int, state: CurriculumState, passed_over: Mapping[int, int] = _NONE_PASSED_OVER) -> StepPlan:
        """The plan of attempted step ``step`` (from 0), drawn from ``state``. The same arguments give the same plan everywhere.

        Args:
            passed_over: how often, by sample number; 0 for all others. k of the step does not depend on it.
        """
        if step < 0:
            raise ValueError(f"steps count from 0, got {step}")
        k = self.curriculum.draw_k(state, numpy_generator(self.seed, step, "k")) if self.dual_mask else self.frames
        first = step * self.global_batch
        numbers = range(first, first + self.global_batch)
        return StepPlan(step, k, tuple(self._sample(number, k, state, passed_over.get(number, 0)) for number in numbers))

    def _sample(self, number: int, k: int, state: CurriculumState, attempt: int) -> SamplePlan:
        row = self._row(number, attempt)
        clip_id, own_k = int(self._clip_ids[row]), min(k, int(self._frame_counts[row]))
        if not self.dual_mask:
            first_visible = tuple(frame == 0 for frame in range(own_k))
            return SamplePlan(number, clip_id, own_k, Task.GENERATION, first_visible, text=True, attempt=attempt)
        draw = self.curriculum.draw_task(state, own_k, numpy_generator(self.seed, *draw_key(number, "task", attempt)))
        return SamplePlan(number, clip_id, own_k, draw.task, draw.mask, draw.text, attempt)

    def _row(self, number: int, attempt: int) -> int:
        """Row of ``clip_ids`` of a sample: its place in the epoch, or in a later attempt one that no earlier attempt had.

        Once all clips had their turn, only the last one's row is barred.
        """
        epoch, position = divmod(number, self._clip_ids.size)
        tried = [self._order(epoch)[position]]
        for again in range(1, attempt + 1 if self._clip_ids.size > 1 else 1):
            if len(tried) == self._clip_ids.size:
                tried = tried[-1:]
            row = derive_seed(self.seed, *draw_key(number, "passed over", again)) % (self._clip_ids.size - len(tried))
            for barred in sorted(tried):  # counts the rows that are left: every barred one below moves it up
                row += row >= barred
            tried.append(row)
        return tried[-1]

    def _order(self, epoch: int) -> EpochOrder:
        """Rows of ``clip_ids`` in the order of one epoch, from (seed, epoch) alone."""
        if epoch not in self._epochs:
            self._epochs[epoch] = EpochOrder(self._clip_ids.size, numpy_generator(self.seed, epoch, "order"))
            if len(self._epochs) > _CACHED_EPOCHS:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]


class PlanQueue:
    """Plans up to ``delay`` steps ahead: step s is drawn from the curriculum state as it was before step max(s − delay, 0).

    Holds the last ``delay`` + 1 states, which with the samples passed over is all that pending plans depend on.

    Raises:
        ValueError: delay is negative.
    """

    def __init__(self, planner: StepPlanner, delay: int) -> None:
        if delay < 0:
            raise ValueError(f"delay must not be negative, got {delay}")
        self._planner = planner
        self._delay = delay
        self._next_step = 0
        self._states = {0: planner.curriculum.initial()}  # of step s: the state before it
        self._passed_over: dict[int, int] = {}

    @property
    def delay(self) -> int:
        """How many steps ahead of the last finished one a plan may be drawn."""
        return self._delay

    @property
    def next_step(self) -> int:
        """The first step not yet attempted."""
        return self._next_step

    @property
    def state(self) -> CurriculumState:
        """The newest state: before ``next_step``."""
        return self._states[self._next_step]

    @property
    def passed_over(self) -> Mapping[int, int]:
        """How often each sample was passed over, by sample number; only those that were. May be replaced as a whole.

        Plans drawn before are not told of a change: start their loader anew.

        Raises:
            ValueError: a count below 1.
        """
        return MappingProxyType(self._passed_over)

    @passed_over.setter
    def passed_over(self, passed_over: Mapping[int, int]) -> None:
        """Takes a copy in the place of all counts; with one below 1 (ValueError) nothing changes."""
        for number, times in passed_over.items():
            if times < 1:
                raise ValueError(f"sample {number} cannot have been passed over {times} times; leave it out")
        self._passed_over = dict(passed_over)

    def pass_over(self, sample_numbers: Iterable[int]) -> None:
        """Count each of these samples as passed over once more."""
        for number in sample_numbers:
            self._passed_over[number] = self._passed_over.get(number, 0) + 1

    def push(self, state: CurriculumState) -> None:
        """Takes the state after ``next_step`` was attempted (a skipped step too) and moves on to the step after it."""
        self._next_step += 1
        self._states[self._next_step] = state
        self._states.pop(self._next_step - self._delay - 1, None)

    def plan(self, step: int) -> StepPlan:
        """The plan of ``step``.

        Raises:
            ValueError: the state it is drawn from is not known yet, or no longer.
        """
        needed = max(step - self._delay, 0)
        if needed > self._next_step:
            raise ValueError(
                f"step {step} is too far ahead: with delay {self._delay} its plan waits for the end of step {needed - 1}; "
                f"{self._next_step} is next"
            )
        if needed not in self._states:
            oldest = min(self._states) + self._delay
            raise ValueError(f"step {step} is over: its curriculum state was dropped, the oldest plan left is that of step {oldest}")
        return self._planner.plan(step, self._states[needed], self._passed_over)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds, JSON-able and exact: the next step and the last states, oldest first.

        Samples passed over are left out: they follow from the run's incidents, which a checkpoint must not turn back.
        """
        return {
            "next_step": self._next_step,
            "delay": self._delay,
            "states": [self._states[step].to_json() for step in sorted(self._states)],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the place of the queue that wrote ``state``: the same plans come out, but for samples passed over since.

        Raises:
            UserError: it was written with another delay.
            ValueError: it does not hold the states that its next step needs.
        """
        if state["delay"] != self._delay:
            raise UserError(
                f"rdtf.curriculum.delay is {self._delay}, but the checkpoint was written with {state['delay']}: "
                f"the plans under way cannot be drawn again. Set it back to {state['delay']}, or start a new run."
            )
        next_step, states = int(state["next_step"]), _states_from_json(state["states"])
        expected = min(next_step, self._delay) + 1
        if len(states) != expected:
            needed = f"{expected} are needed at step {next_step} with delay {self._delay}"
            raise ValueError(f"saved plans hold {len(states)} curriculum states; {needed}")
        self._next_step = next_step
        self._states = dict(zip(range(next_step - len(states) + 1, next_step + 1), states, strict=True))


def _states_from_json(states: Sequence[Mapping[str, Any]]) -> list[CurriculumState]:
    return [CurriculumState.from_json(state) for state in states]
