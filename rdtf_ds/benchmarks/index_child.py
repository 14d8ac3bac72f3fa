"""A process that opens an index and plans from it, and says what that took: started fresh by `rdtf_ds.benchmarks.index`.

``python -m rdtf_ds.benchmarks.index_child mapped FOLDER IDENTITY STEPS``, or ``objects FILE - STEPS`` for the peer; one JSON object on the
last line of standard output. The process is bare once everything is imported; memory is counted above that.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter, thread_time
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from rdtf_ds.config import CurriculumSection
from rdtf_ds.curriculum.curriculum import Curriculum, CurriculumState
from rdtf_ds.curriculum.pid import PIDController
from rdtf_ds.curriculum.static import StaticSchedule
from rdtf_ds.data.clips.clip import DecodeLimits
from rdtf_ds.data.indexing.index import ClipIndex, open_index
from rdtf_ds.data.step_plan import StepPlan, StepPlanner
from rdtf_ds.diffusion.masks import Task
from rdtf_ds.seeding import numpy_generator

GLOBAL_BATCH = 16
SEED = 0
_MEMORY_EVERY = 100  # steps


@dataclass(frozen=True, slots=True)
class ObjectRow:
    """The peer's clip: one of these for each row."""

    clip_id: int
    path: str
    caption: str
    format: str
    num_frames: int
    width: int
    height: int
    status: str
    reason: str


OBJECT_COLUMNS = tuple(ObjectRow.__dataclass_fields__)


class ListedOrder(StepPlanner):
    """The peer's planner: the order of an epoch is a shuffled list."""

    def _order(self, epoch: int) -> Any:
        if epoch not in self._epochs:
            self._epochs[epoch] = numpy_generator(self.seed, epoch, "order").permutation(self._clip_ids.size)  # type: ignore[assignment]
        return self._epochs[epoch]


def resident_mb(key: str = "VmRSS") -> float:
    """Of this process, in MB: now, at most since it was restarted (VmHWM), or now without pages of mapped files (RssAnon)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1]) / 1e6


def open_mapped(folder: Path, identity: str) -> tuple[ClipIndex, StepPlanner]:
    """What a rank does at its start."""
    index = open_index(folder, identity)
    return index, StepPlanner(SEED, GLOBAL_BATCH, index.trainable, index.frame_counts, make_curriculum())


def open_objects(file: Path) -> tuple[tuple[ObjectRow, ...], StepPlanner]:
    """What a rank did before."""
    rows = tuple(ObjectRow(number, **values) for number, values in enumerate(pq.read_table(file).to_pylist()))
    trainable = np.array([row.clip_id for row in rows if row.status == "trainable"], np.int64)
    most = DecodeLimits().max_frames
    counts = np.array([min(rows[clip_id].num_frames, most) for clip_id in trainable], np.int64)
    return rows, ListedOrder(SEED, GLOBAL_BATCH, trainable, counts, make_curriculum())


def make_curriculum() -> Curriculum:
    """The default one."""
    section = CurriculumSection()
    start, end = ({Task(name): share for name, share in shares.items()} for shares in (section.static_start, section.static_end))
    return Curriculum(section.mode, StaticSchedule(start, end, 50_000), PIDController())


def plan_steps(
    planner: StepPlanner, clips: int, steps: int, read: Callable[[StepPlan], object], memory: Callable[[], float]
) -> dict[str, float]:
    """Plan steps half of which lie before the border of an epoch, and read what each step's samples need.

    Args:
        clips: of an epoch.
    Returns:
        Milliseconds of the median, the slowest and the border's plan. Of a processor, as waiting for one is no planning: those of the
        slowest in a thousand, and the most that any of these steps takes when planned again, at the best of three times: what was the
        machine's pause is gone then, and what is the plan's own is not. ``memory`` in the second, sixth and last tenth of the steps.
    """
    border = -(-clips // GLOBAL_BATCH) - 1  # holds the first sample of the second epoch, or the last one of the first
    first = max(border - steps // 2, 0)
    state: CurriculumState = planner.curriculum.initial()
    planner.plan(first, state)
    taken, worked = np.full((2, steps), np.nan)  # all written to now: lists would grow by 64 bytes a step, which is not the planner's
    grown = []

    def work_ms(step: int) -> tuple[StepPlan, float]:
        """The step's plan, and the milliseconds of a processor that it took."""
        start = thread_time()
        return planner.plan(step, state), 1e3 * (thread_time() - start)

    for number in range(steps):
        start = perf_counter()
        plan, worked[number] = work_ms(first + number)
        taken[number] = 1e3 * (perf_counter() - start)
        read(plan)
        if (number + 1) % max(steps // _MEMORY_EVERY, 1) == 0:
            grown.append(memory())
    slow = np.argsort(worked)[-max(steps // 1000, 1) :]
    tenth = len(grown) // 10
    at_border = taken[border - first : border - first + 2]
    return {
        "plan_ms": float(np.median(taken)),
        "slowest_ms": float(taken.max()),
        "border_ms": float(at_border.max()),
        "thousandth_ms": float(np.quantile(worked, 0.999)),
        "again_ms": max(min(work_ms(first + int(number))[1] for _ in range(3)) for number in slow),
        "early_mb": median(grown[tenth : 2 * tenth]),
        "half_mb": median(grown[5 * tenth : 6 * tenth]),
        "late_mb": median(grown[-tenth:]),
    }


def microseconds(call: Callable[[int], object], clip_ids: Sequence[int]) -> float:
    """Median of the calls."""
    taken = []
    for clip_id in clip_ids:
        start = perf_counter()
        call(clip_id)
        taken.append(1e6 * (perf_counter() - start))
    return median(taken)


def main(kind: str, where: str, identity: str, steps: str) -> None:
    """Measure, and print."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # of proc(5): the peak becomes what is resident now
    bare = resident_mb()
    start = perf_counter()
    index, planner = open_mapped(Path(where), identity) if kind == "mapped" else open_objects(Path(where))
    result: dict[str, float] = {"open_s": perf_counter() - start, "opened_mb": resident_mb() - bare}
    clips = len(planner._clip_ids)

    def read(plan: StepPlan) -> None:
        """What loader workers read of the index for a step's samples; the peer's rows are in memory as they are."""
        if isinstance(index, ClipIndex):
            for sample in plan.samples:
                index.caption(sample.clip_id), index.place(sample.clip_id), index.frame_features(sample.clip_id)

    # Pages of the index come and go: they are given back every so many reads, which is a saw's tooth, and no growth.
    result |= plan_steps(planner, clips, int(steps), read, lambda: resident_mb("RssAnon"))
    result["peak_mb"] = resident_mb("VmHWM") - bare
    if isinstance(index, ClipIndex):
        some = np.random.default_rng(2).choice(index.trainable, 2000).tolist()
        for name in ("caption", "place", "frame_features"):
            result[f"{name}_us"] = microseconds(getattr(index, name), some)
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
