"""Makes the clips of an evaluation, by one process or several, and goes on where an earlier run ended.

What is made together is settled by the test set and the batch size alone: processes share batches out among them, and a batch that is
not whole is made again. So the clips are the same whoever makes them, and however often it was interrupted.

Layout: ``EVAL/real/NAME.png`` are the real clips, ``EVAL/TASK/NAME.png`` the made ones, both lossless and with a note of what they are.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rdtf_ds.data.clips.clip import ClipError, DecodeLimits
from rdtf_ds.data.clips.decoding import decode_clip
from rdtf_ds.data.clips.writing import write_clip
from rdtf_ds.data.indexing.index import ClipIndex
from rdtf_ds.errors import UserError
from rdtf_ds.evaluation.protocol import Task
from rdtf_ds.evaluation.test_set import RealClip, real_frames
from rdtf_ds.generation.jobs import Job
from rdtf_ds.generation.loading import load_pipeline
from rdtf_ds.generation.making import make_clips
from rdtf_ds.processes import die_with_parent

REAL, SUFFIX = "real", ".png"

Batch = tuple[Task, tuple[RealClip, ...]]
"""Clips of one task that are made together."""
OnClips = Callable[[int], None]
"""Called with a number of clips that are done."""


@dataclass(frozen=True)
class Making:
    """All that a process needs to make clips: it may be sent to another one.

    Attributes:
        folder: EVAL.
        model: Folder of the exported model.
        tasks, clips: What to make of what.
        side, background: Pixels of the model's square frames, and the colour behind transparent ones.
        device: ``cpu`` or ``cuda``, of which each process takes its own.
        threads: Of torch in each process, on the CPU.
        batch: Clips made at once.
        sampling: ``steps``, ``sampler``, ``eta``, ``text_scale``, ``image_scale``; None takes the model's.
        keep_given: Given frames stand in the clip as they were given.
        identity: What is noted in every clip besides.
    """

    folder: Path
    model: Path
    tasks: tuple[Task, ...]
    clips: tuple[RealClip, ...]
    side: int
    background: tuple[int, int, int]
    device: str
    dtype: str
    threads: int
    batch: int
    keep_given: bool = True
    sampling: Mapping[str, Any] = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=dict)

    def path(self, where: str, clip: RealClip) -> Path:
        """Of a clip's file; ``where`` is a task's name or ``REAL``."""
        return self.folder / where / f"{clip.name}{SUFFIX}"

    def batches(self) -> list[Batch]:
        """What is made together, in order."""
        starts = range(0, len(self.clips), self.batch)
        return [(task, self.clips[start : start + self.batch]) for task in self.tasks for start in starts]

    def unfinished(self) -> list[Batch]:
        """Batches of which a clip is missing."""
        return [(task, clips) for task, clips in self.batches() if not all(self.path(task.name, clip).is_file() for clip in clips)]

    def made(self) -> int:
        """Clips that are there."""
        return sum(self.path(task.name, clip).is_file() for task in self.tasks for clip in self.clips)


def write_real(making: Making, index: ClipIndex, on_clips: OnClips = lambda count: None) -> None:
    """Write the real clips that are not there yet.

    Raises:
        UserError: One cannot be read, or not be written.
    """
    for clip in making.clips:
        path = making.path(REAL, clip)
        if not path.is_file():
            note = {"real": clip.path, "content": clip.content, "frames_shown": list(clip.shown), "caption": clip.caption}
            frames = real_frames(index, clip, making.side, making.background)
            with told_unless_written(path):
                write_clip(frames, path, metadata=note)
        on_clips(1)


@contextmanager
def told_unless_written(path: Path) -> Iterator[None]:
    """What keeps a file of an evaluation from being written, a full disk or a file in a folder's place, as a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"'{path}' cannot be written: {error.strerror or error}. See to the room and the permissions there, and that its folder is "
            "one; then start again: what is made is kept."
        ) from error


def read_clip(making: Making, where: str, clip: RealClip, frames: Sequence[int] | None = None) -> np.ndarray:
    """A clip of the evaluation, or some frames of it: uint8 (F, S, S, 3), exactly as it was written.

    Raises:
        UserError: It cannot be read.
    """
    path = making.path(where, clip)
    try:
        return decode_clip(path, making.side, (255, 255, 255), DecodeLimits(), frames=frames)
    except ClipError as error:
        raise UserError(f"'{path}' cannot be read: {error.reason}. Remove it and start again: it is then made anew.") from error


def read_clips(making: Making, where: str) -> Iterator[np.ndarray]:
    """All clips of a task, or the real ones, in the order of the test set."""
    return (read_clip(making, where, clip) for clip in making.clips)


def make_missing(making: Making, processes: int = 1, on_clips: OnClips = lambda count: None) -> None:
    """Make the clips that are not there yet; the real ones must be.

    Raises:
        UserError: The model cannot be loaded or makes NaN, a clip that is there is of other settings, or a process died.
    """
    wanted = making.unfinished()
    if not wanted:
        return
    processes = min(processes, len(wanted))
    if processes == 1:
        _make(making, wanted, making.device, on_clips)
        return
    with _children(making, [wanted[share::processes] for share in range(processes)]) as children:
        while children:
            for reader in wait(list(children)):
                assert isinstance(reader, Connection)
                _hear(reader, children, on_clips)


def _make(making: Making, batches: Sequence[Batch], device: str, on_clips: OnClips) -> None:
    torch.set_num_threads(making.threads)
    pipeline: Any = load_pipeline(making.model, device, making.dtype)
    pipeline.set_progress_bar_config(disable=True)
    for task, clips in batches:
        jobs = [_job(making, task, clip) for clip in clips]
        made = make_clips(
            pipeline,
            jobs,
            making.folder / task.name,
            batch=making.batch,
            suffix=SUFFIX,
            identity=making.identity,
            keep_given=making.keep_given,
        )
        on_clips(len(made.made))  # a batch is made whole, and what was there of it is left


def _job(making: Making, task: Task, clip: RealClip) -> Job:
    given = read_clip(making, REAL, clip, task.visible)
    return Job(
        name=clip.name,
        prompt=clip.caption or None,
        pictures=dict(zip(task.visible, given, strict=True)),
        seed=clip.seed,
        frames=task.frames,
        **making.sampling,
    )


@contextmanager
def _children(making: Making, shares: Sequence[list[Batch]]) -> Iterator[dict[Connection, SpawnProcess]]:
    """A process for each share, by the connection it speaks through; none is left behind."""
    context = multiprocessing.get_context("spawn")
    children: dict[Connection, SpawnProcess] = {}
    started: list[SpawnProcess] = []
    try:
        for number, share in enumerate(shares):
            reader, writer = context.Pipe(duplex=False)
            child = context.Process(target=_make_share, args=(making, share, number, writer, os.getpid()), daemon=True)
            child.start()
            started.append(child)
            writer.close()  # the child's own copy is then the last, and its death ends what is read
            children[reader] = child
        yield children
    finally:
        for child in started:
            child.terminate()
        for child in started:
            child.join()


def _make_share(making: Making, share: list[Batch], number: int, writer: Connection, parent: int) -> None:
    """A child: the batches of its share, on the GPU of its number."""
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent says so once and ends the others
    device = f"cuda:{number % torch.cuda.device_count()}" if making.device == "cuda" else making.device
    try:
        _make(making, share, device, writer.send)
        writer.send(None)
    except UserError as error:
        writer.send(str(error))


def _hear(reader: Connection, children: dict[Connection, SpawnProcess], on_clips: OnClips) -> None:
    """One word of a child: clips it made, None when it has done, or what stopped it."""
    try:
        word = reader.recv()
    except EOFError:
        child = children[reader]
        child.join()
        how = f"signal {-child.exitcode}" if child.exitcode is not None and child.exitcode < 0 else f"exit code {child.exitcode}"
        raise UserError(
            f"a process that made clips ended ({how}); with signal 9 the machine was most likely out of memory. What is made is kept: "
            "start again to go on, if need be with fewer --processes."
        ) from None
    if isinstance(word, str):
        raise UserError(word)
    if word is None:
        del children[reader]
        reader.close()
    else:
        on_clips(word)
