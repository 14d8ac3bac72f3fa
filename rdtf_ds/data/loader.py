"""Feeds planned steps to the training loop through worker processes, never further ahead than the plans may look.

The main process draws the plans and hands micro-batches to workers; results come back in order. A DataLoader holds
workers × prefetch micro-batches beyond the one it returns, so with A micro-batches in a step, plans up to
ceil(workers × prefetch / A) steps ahead are drawn: that must stay within the queue's delay.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from types import TracebackType
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Sampler

from rdtf_ds.data.batch import Batch
from rdtf_ds.data.clips.decoder_pool import close_process_pool
from rdtf_ds.data.dataset import StickerDataset
from rdtf_ds.data.step_plan import PlanQueue, SamplePlan
from rdtf_ds.errors import UserError
from rdtf_ds.processes import die_with_parent

_PREFETCH = 2
_log = logging.getLogger(__name__)


class MicroBatch(NamedTuple):
    """What a worker is handed: planned samples, and what it does not know yet of the contents that their step does without.

    Attributes:
        known: contents barred that the same worker was handed before.
        barred: those that follow them.
    """

    plans: tuple[SamplePlan, ...]
    known: int
    barred: tuple[str, ...]


def _none_barred(step: int, known: int) -> tuple[str, ...]:
    return ()


class PlannedLoader:
    """Makes the batches of planned steps, the same for any number of workers.

    Args:
        dataset: makes a batch of a planned micro-batch.
        queue: draws plans; the training loop pushes a curriculum state into it after every step.
        rank, world: which slice of the global batch.
        micro_batch: samples at once.
        accumulation: micro-batches of one optimizer step on this rank.
        workers: processes; 0 makes batches in this one. At most ``delay`` × ``accumulation`` are started, more could not be kept busy.
        pin_memory: page-locked tensors, for copies to a GPU.
        barred: contents that a step does without, beyond the first so many, in an order that never changes (`Quarantine.barred_since`);
            asked in this process when a micro-batch of the step is handed out. Each worker keeps them, so each is sent to it once.
    """

    def __init__(
        self,
        dataset: StickerDataset,
        queue: PlanQueue,
        rank: int,
        world: int,
        micro_batch: int,
        accumulation: int,
        workers: int,
        pin_memory: bool = False,
        barred: Callable[[int, int], Sequence[str]] = _none_barred,
    ) -> None:
        self._dataset, self._queue = dataset, queue
        self._rank, self._world, self._micro_batch, self._accumulation = rank, world, micro_batch, accumulation
        self._pin_memory, self._barred = pin_memory, barred
        look_ahead = queue.delay * accumulation  # micro-batches
        self.workers = min(workers, look_ahead)
        if self.workers < workers:
            _log.warning(
                "rdtf.data.workers is %d, but rdtf.curriculum.delay (%d) × accumulation (%d) lets only %d work ahead: starting %d",
                workers, queue.delay, accumulation, look_ahead, self.workers,
            )  # fmt: skip
        self.prefetch = min(_PREFETCH, look_ahead // self.workers) if self.workers else 0

    def steps(self, first: int, stop: int | None = None) -> Iterator[tuple[int, list[Batch]]]:
        """Yield (step, its micro-batches in order) from step ``first`` up to ``stop``, exclusive (None: without end).

        Between two steps the caller pushes the curriculum state into the queue. Closing the iterator ends the workers.

        Raises:
            ValueError: ``first`` is not the queue's next step.
            UserError: a sample could not be made, as the dataset says.
        """
        if first != self._queue.next_step:
            raise ValueError(f"loading from step {first}, but the plans are at step {self._queue.next_step}")
        close_process_pool()  # a worker must not inherit this process's decoder
        loader: DataLoader[Batch | UserError] = DataLoader(
            _Messenger(self._dataset),  # type: ignore[arg-type]
            batch_size=None,
            sampler=_PlannedMicroBatches(self, first, stop),
            num_workers=self.workers,
            prefetch_factor=self.prefetch or None,
            worker_init_fn=_start_worker if self.workers else None,
            generator=torch.Generator(),  # seeds workers; nothing of the run's is drawn from it
            pin_memory=self._pin_memory,
        )
        batches = iter(loader)
        try:
            for step in count(first) if stop is None else range(first, stop):
                yield step, [_unwrap(next(batches)) for _ in range(self._accumulation)]
        finally:
            del batches, loader  # DataLoader ends its workers when its iterator goes

    def micro_batches(self, step: int, first: int, handed: list[int]) -> Iterator[MicroBatch]:
        """This rank's planned micro-batches of a step.

        Args:
            first: micro-batches handed out before; a DataLoader gives them to its workers in turn.
            handed: how many barred contents each worker was told of; brought up to date.
        """
        planned = self._queue.plan(step).for_rank(self._rank, self._world, self._micro_batch)
        if len(planned) != self._accumulation:
            raise ValueError(f"step {step} has {len(planned)} micro-batches for rank {self._rank}, not {self._accumulation}")
        for number, plans in enumerate(planned, first):
            worker = number % len(handed)
            known = handed[worker]
            barred = tuple(self._barred(step, known))
            handed[worker] += len(barred)
            yield MicroBatch(plans, known, barred)


class _PlannedMicroBatches(Sampler[MicroBatch]):
    """The micro-batches of steps ``first`` to ``stop``, each step planned when its first one is asked for."""

    def __init__(self, loader: PlannedLoader, first: int, stop: int | None) -> None:
        self._loader, self._first, self._stop = loader, first, stop

    def __iter__(self) -> Iterator[MicroBatch]:
        handed = [0] * max(self._loader.workers, 1)
        first = 0
        for step in count(self._first) if self._stop is None else range(self._first, self._stop):
            for micro_batch in self._loader.micro_batches(step, first, handed):
                yield micro_batch
                first += 1


class _Messenger:
    """Keeps what a worker was told is barred, and hands a UserError over as a value: a DataLoader would bury its message in a traceback."""

    def __init__(self, dataset: StickerDataset) -> None:
        self._dataset = dataset
        self._barred: set[str] = set()

    def __getitem__(self, micro_batch: MicroBatch) -> Batch | UserError:
        if micro_batch.known != len(self._barred):
            raise RuntimeError(f"this worker knows {len(self._barred)} barred contents, not {micro_batch.known}")
        self._barred.update(micro_batch.barred)
        try:
            return self._dataset.make(micro_batch.plans, self._barred)
        except UserError as error:
            return error


def _unwrap(result: Batch | UserError) -> Batch:
    if isinstance(result, UserError):
        raise result
    return result


def _start_worker(worker_id: int) -> None:
    """Workers leave signals to the main process: it finishes its step and its checkpoint, and then ends them, or dies and they with it.

    Forked, they have inherited where it writes the stacks of SIGUSR2.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    die_with_parent(parent.pid)  # even stuck where torch's own check for a lost parent is never reached
    sys.excepthook = _report


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An error outside of making batches. That the main process hung up, in the middle of taking one over, is its end and no error."""
    if not issubclass(kind, ConnectionError):
        sys.__excepthook__(kind, error, trace)
