"""Runs ``train.py`` with a fault in it: ``RDTF_FAULT="gil sample=17" python tests/faults/saboteur.py ARGUMENTS``.

Several faults are parted by semicolons. Options are whole numbers; ``rank=N`` limits any fault to one rank. Loader workers are forked
later and inherit what is installed.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FAULT = "RDTF_FAULT"
"""Environment variable that names what shall go wrong."""
HANG_S = 3600


def install(faults: str) -> None:
    """Put the named faults into this process.

    Raises:
        KeyError: There is no such fault.
    """
    for words in filter(None, map(str.split, faults.split(";"))):
        options = {name: int(value) for name, value in (word.split("=") for word in words[1:])}
        if options.pop("rank", _rank()) == _rank():
            FAULTS[words[0]](**options)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def gil(sample: int) -> None:
    """Whoever decodes this sample sleeps for ever without letting any other thread of its process run."""
    from rdtf_ds.data.dataset import StickerDataset

    sleep = ctypes.PyDLL(None).sleep  # unlike CDLL, keeps the GIL

    def decode(original: Callable[..., Any], self: Any, plans: Any, *barred: Any) -> Any:
        if sample in [plan.sample_number for plan in plans]:
            sleep(HANG_S)
        return original(self, plans, *barred)

    _wrap(StickerDataset, "make", decode)


def nan(sample: int, attempts: int = 1) -> None:
    """The noise of this sample is NaN, in as many attempts at it as said."""
    from rdtf_ds.data.dataset import StickerDataset

    def decode(original: Callable[..., Any], self: Any, plans: Any, *barred: Any) -> Any:
        batch = original(self, plans, *barred)
        for position, plan in enumerate(plans):
            if plan.sample_number == sample and plan.attempt < attempts:
                batch.noise[position] = float("nan")
        return batch

    _wrap(StickerDataset, "make", decode)


def failing_save(first: int = 1, last: int = sys.maxsize) -> None:
    """torch.save finds the disk full in these saves, counted from 1 at every start."""

    def full(original: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    _in_saves(first, last, full)


def small_files(bytes: int, first: int = 1, last: int = sys.maxsize) -> None:
    """No file may grow beyond so many bytes in these saves: what a quota or RLIMIT_FSIZE does."""

    def limited(original: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        with file_size_limit(bytes):
            return original(*arguments, **named)

    _in_saves(first, last, limited)


def impatient(seconds: int) -> None:
    """No fault: waits so long for another trainer of the folder to end, instead of half a minute."""
    from rdtf_ds.training.run_lock import RunLock

    def take(original: Callable[..., Any], self: Any) -> None:
        self._wait_s = seconds
        original(self)

    _wrap(RunLock, "_take", take)


def dump() -> None:
    """What a start has in memory once it has resumed is saved to ``OUT/resumed/stepNNNNNNNN-ranksM``, as a checkpoint is."""
    import torch.distributed as dist
    from safetensors.torch import save_file

    import rdtf_ds.train
    from rdtf_ds.checkpoints.weights import ema_name

    def resume(original: Callable[..., Any], run: Any) -> Any:
        resumed = original(run)
        if resumed is not None:
            folder = run.folder / "resumed" / f"step{resumed.step:08d}-ranks{run.engine.world_size}"
            folder.mkdir(parents=True, exist_ok=True)
            dist.barrier()
            failure, _ = run.engine.save_shards(folder)
            assert failure is None, failure
            save_file({name: tensor.contiguous() for name, tensor in run.ema.state_dict().items()}, folder / ema_name(run.engine.rank))
        return resumed

    _wrap(rdtf_ds.train, "resume", resume)


def measure() -> None:
    """No fault: peak resident memory up to where training begins goes to ``OUT/peak_at_start_rank0000``, in bytes."""
    import rdtf_ds.train

    def train(original: Callable[..., Any], run: Any, *arguments: Any) -> Any:
        # The run restarts the kernel's peak at every phase; its own memory watch, the last argument, has that of all of them.
        peak = max(arguments[-1].read()["rss"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        (run.folder / f"peak_at_start_rank{run.engine.rank:04d}").write_text(str(peak))
        return original(run, *arguments)

    _wrap(rdtf_ds.train, "train", train)


_ALL = (gil, nan, failing_save, small_files, impatient, dump, measure)
FAULTS: dict[str, Callable[..., None]] = {fault.__name__: fault for fault in _ALL}


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """``owner.name`` becomes ``around``, which gets the original first."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*arguments: Any) -> Any:
        return around(original, *arguments)

    setattr(owner, name, wrapped)


def _in_saves(first: int, last: int, around: Callable[..., Any]) -> None:
    """torch.save becomes ``around`` while this process writes its shards of save number ``first`` to ``last``."""
    import torch

    from rdtf_ds.training.engine import TrainingEngine

    saves = 0

    def save_shards(original: Callable[..., Any], self: Any, *arguments: Any) -> Any:
        nonlocal saves
        saves += 1
        if not first <= saves <= last:
            return original(self, *arguments)
        unharmed = torch.save
        torch.save = functools.partial(around, unharmed)
        try:
            return original(self, *arguments)
        finally:
            torch.save = unharmed

    _wrap(TrainingEngine, "save_shards", save_shards)


@contextmanager
def file_size_limit(bytes: int) -> Iterator[None]:
    """A file size limit does what a full disk does: it cuts a write short, then refuses."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    from rdtf_ds.training.supervisor import supervise

    supervise()
    from rdtf_ds.train import run_command

    install(os.environ.get(FAULT, ""))
    sys.exit(run_command(sys.argv[1:]))
