"""The loader: the same batches for any number of workers, never ahead of its plans, and no process left behind."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from rdtf_ds.curriculum.curriculum import Curriculum
from rdtf_ds.curriculum.pid import PIDController
from rdtf_ds.curriculum.static import StaticSchedule
from rdtf_ds.data.batch import Batch
from rdtf_ds.data.dataset import DropRates, NoUsableClip
from rdtf_ds.data.loader import MicroBatch, PlannedLoader, _Messenger
from rdtf_ds.data.quarantine import Quarantine
from rdtf_ds.data.step_plan import PlanQueue, StepPlanner
from rdtf_ds.diffusion.masks import Task
from tests.data.folders import dataset, numbered_clips

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores, on purpose

START = {Task.INTERPOLATION: 0.6, Task.PREDICTION: 0.25, Task.GENERATION: 0.15}
END = {Task.INTERPOLATION: 0.2, Task.PREDICTION: 0.3, Task.GENERATION: 0.5}
GLOBAL_BATCH, STEPS = 12, 7


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return numbered_clips(tmp_path_factory.mktemp("numbered"), [20, 3, 12, 5, 8, 9, 4])


def make(
    root: Path, workers: int, delay: int = 2, rank: int = 0, world: int = 1, micro_batch: int = 3, **options: Any
) -> tuple[PlannedLoader, PlanQueue]:
    data = dataset(root, drops=DropRates(0.3, 0.1, 0.1, 0.1), **options)
    curriculum = Curriculum("difficulty_adaptive", StaticSchedule(START, END, 5), PIDController(fast_horizon=1, slow_horizon=2))
    queue = PlanQueue(StepPlanner(5, GLOBAL_BATCH, data.index.trainable, data.index.frame_counts, curriculum), delay)
    accumulation = GLOBAL_BATCH // (world * micro_batch)
    return PlannedLoader(data, queue, rank, world, micro_batch, accumulation, workers), queue


def run(root: Path, workers: int, steps: int = STEPS, **options: Any) -> list[list[Batch]]:
    """All steps, with a loss that moves the curriculum."""
    loader, queue = make(root, workers, **options)
    taken = []
    for step, batches in loader.steps(0, steps):
        assert step == len(taken) == queue.next_step
        taken.append(batches)
        queue.push(observed(queue, step))
    return taken


def observed(queue: PlanQueue, step: int) -> Any:
    curriculum = queue._planner.curriculum
    return curriculum.observe(queue.state, 1.0 + 0.5 * (step % 3))


def flat(steps: list[list[Batch]]) -> list[tuple[Any, ...]]:
    """One entry for each sample, without its padding."""
    entries = []
    for batch in (batch for step in steps for batch in step):
        for row, number in enumerate(batch.sample_numbers):
            real = batch.frame_mask[row]
            tensors = (batch.frames[row][:, real], batch.noise[row][:, real], batch.condition_mask[row][real], batch.timestep[row])
            entries.append((number, batch.clip_ids[row], batch.captions[row], batch.tasks[row], *(tensor.tolist() for tensor in tensors)))
    return entries


@pytest.fixture(scope="module")
def reference(root: Path) -> list[tuple[Any, ...]]:
    entries = flat(run(root, workers=0))
    assert [entry[0] for entry in entries] == list(range(GLOBAL_BATCH * STEPS))
    assert len({len(entry[6]) for entry in entries}) > 2  # several k
    return entries


@pytest.mark.parametrize(("workers", "micro_batch"), [(1, 3), (3, 3), (2, 12), (2, 1), (0, 4)])
def test_any_workers_and_any_split_make_the_same_samples(root: Path, reference: list[Any], workers: int, micro_batch: int) -> None:
    assert flat(run(root, workers, micro_batch=micro_batch)) == reference


def test_two_ranks_make_what_one_makes(root: Path, reference: list[Any]) -> None:
    parts = [flat(run(root, workers=2, rank=rank, world=2)) for rank in (0, 1)]
    assert len(parts[0]) == len(parts[1])
    assert sorted(parts[0] + parts[1]) == sorted(reference)


def test_a_run_goes_on_from_any_step(root: Path, reference: list[Any]) -> None:
    loader, queue = make(root, workers=2)
    for step, _ in loader.steps(0):
        queue.push(observed(queue, step))
        if step == 3:
            break
    resumed, restored = make(root, workers=1)
    restored.load_state_dict(queue.state_dict())
    taken = []
    for step, batches in resumed.steps(4, STEPS):
        taken.append(batches)
        restored.push(observed(restored, step))
    assert flat(taken) == reference[4 * GLOBAL_BATCH :]
    with pytest.raises(ValueError, match="loading from step 2, but the plans are at step 7"):
        next(resumed.steps(2))


@pytest.mark.parametrize(
    ("workers", "delay", "micro_batch", "started", "prefetch"),
    [(2, 4, 12, 2, 2), (3, 4, 12, 3, 1), (8, 2, 12, 2, 1), (8, 2, 3, 8, 1), (4, 2, 3, 4, 2), (2, 0, 12, 0, 0), (0, 4, 12, 0, 0)],
)
def test_plans_are_never_drawn_further_ahead_than_the_delay(
    root: Path, caplog: pytest.LogCaptureFixture, workers: int, delay: int, micro_batch: int, started: int, prefetch: int
) -> None:
    loader, queue = make(root, workers, delay, micro_batch=micro_batch)
    assert (loader.workers, loader.prefetch) == (started, prefetch)
    assert loader.workers * loader.prefetch <= delay * (GLOBAL_BATCH // micro_batch)
    assert ("rdtf.data.workers" in caplog.text) == (started < workers)
    furthest, plan = [0], queue.plan

    def watched(step: int) -> Any:
        furthest[0] = max(furthest[0], step - queue.next_step)
        return plan(step)

    queue.plan = watched  # type: ignore[method-assign]
    for step, _ in loader.steps(0, 3):
        queue.push(observed(queue, step))
    assert furthest[0] <= delay
    assert furthest[0] >= min(1, started)


def children() -> set[int]:
    found: set[int] = set()
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        with suppress(FileNotFoundError):  # a thread that has ended since
            found |= {int(child) for child in (task / "children").read_text().split()}
    return found


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def steps(root: Path) -> Iterator[tuple[Iterator[Any], PlanQueue, set[int]]]:
    before = children()
    loader, queue = make(root, workers=2)
    iterator = loader.steps(0)
    next(iterator)
    yield iterator, queue, {child for child in children() - before if alive(child)}
    iterator.close()


def test_closing_ends_the_workers(steps: tuple[Any, PlanQueue, set[int]]) -> None:
    iterator, _, started = steps
    assert len(started) >= 2
    iterator.close()
    deadline = time.monotonic() + 10
    while any(map(alive, started)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, started))


def test_workers_ignore_what_ends_a_run(steps: tuple[Any, PlanQueue, set[int]]) -> None:
    iterator, queue, started = steps
    for child in started:
        os.kill(child, signal.SIGTERM)
        os.kill(child, signal.SIGINT)
    for _ in range(4):
        queue.push(observed(queue, 0))
        next(iterator)
    assert all(map(alive, started))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_users_error_arrives_as_it_was_raised(tmp_path: Path, workers: int) -> None:
    numbered_clips(tmp_path, [4, 4])
    loader, _ = make(tmp_path, workers)
    for path in tmp_path.glob("*.png"):
        path.unlink()
    with pytest.raises(NoUsableClip) as caught:
        next(loader.steps(0))
    assert "Traceback" not in str(caught.value)


def test_the_runs_own_generator_is_left_alone(root: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    run(root, workers=1, steps=2)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_clip_is_barred_from_a_step_on_whatever_works_ahead(root: Path, workers: int) -> None:
    """Two samples of a clip that vanished fail, and delay + 1 steps after the second nothing tries it any more."""
    delay, copy = 2, root.parent / f"copy{workers}"
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns(".index"))
    data = dataset(copy)
    (copy / "0.png").unlink()
    quarantine = Quarantine(copy / ".quarantine.jsonl", 1.0, total=7, delay=delay)
    loader, queue = make(root, workers, delay)
    loader._dataset, loader._barred = data, quarantine.barred_since
    failing, clips = [], []
    for step, batches in loader.steps(0, STEPS):
        queue.push(observed(queue, step))
        problems = [problem for batch in batches for problem in batch.problems]
        quarantine.merge(problems, step)
        failing.append(sorted({problem.sample_number for problem in problems}))
        clips.append([clip_id for batch in batches for clip_id in batch.clip_ids])
    struck = next(step for step in range(STEPS) if len({number for numbers in failing[: step + 1] for number in numbers}) > 1)
    assert any(failing[struck + 1 : struck + delay + 1]), "these steps may have been handed out"
    assert struck + delay + 1 < STEPS - 1 and not any(failing[struck + delay + 1 :]) and not any(0 in step for step in clips)
    expected = flat(run(root, 0))
    assert sum(entry[1] == 0 for entry in expected) > STEPS, "the clip is planned all the time"


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_barred_is_sent_to_each_worker_once(root: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    contents = [f"{number:02d}" for number in range(STEPS)]  # one more with each step
    handed: list[MicroBatch] = []

    loader, queue = make(root, workers)
    planned = loader.micro_batches

    def watched(*arguments: Any) -> Iterator[MicroBatch]:
        for micro_batch in planned(*arguments):
            handed.append(micro_batch)
            yield micro_batch

    monkeypatch.setattr(loader, "micro_batches", watched)
    loader._barred = lambda step, known: contents[known : step + 1]
    for step, _ in loader.steps(0, STEPS):  # a worker that knows other contents than it should raises
        queue.push(observed(queue, step))
    for worker in range(max(workers, 1)):
        mine = handed[worker :: max(workers, 1)]
        assert [content for one in mine for content in one.barred] == contents
    assert len(handed) == 4 * STEPS


def test_a_worker_that_missed_something_barred_says_so(root: Path) -> None:
    messenger = _Messenger(dataset(root))
    with pytest.raises(RuntimeError, match="knows 0 barred contents, not 1"):
        messenger[MicroBatch((), 1, ("aa",))]


def test_a_batch_that_does_not_split_is_refused(root: Path) -> None:
    loader, _ = make(root, 0)
    loader._accumulation = 5
    with pytest.raises(ValueError, match="4 micro-batches for rank 0, not 5"):
        next(loader.steps(0))
