"""What asks a run to save or to stop while it trains: SIGTERM, SIGUSR1, and files a person touches.

Nothing is interrupted: a wish is noted and answered between two steps, where the state is whole. Signals reach one rank or all of them,
and rank 0 alone looks for files, so ranks must agree on what they polled before they act.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple

from rdtf_ds.errors import UserError
from rdtf_ds.exit_codes import DONE, RESTART

SAVE, STOP = "save", "stop"
_MARK = ".stopping"
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Wishes(NamedTuple):
    """What one rank was asked for; stopping includes saving."""

    save: bool
    stop: bool


class Interruptions:
    """Context manager that notes SIGTERM and SIGUSR1 in place of dying by them; for the main thread, entered by all ranks together.

    A ``stop`` or ``save`` left from before is removed on entry with a line that says so: else a forgotten one would end every start.
    A ``stop`` that was heeded is removed on exit.

    Args:
        folder: The run folder, where ``touch save`` and ``touch stop`` ask.

    Raises:
        UserError: on entry, a file left there cannot be removed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._signal: str | None = None
        self._saw_stop = self._saw_save = False
        self._answered_save = False  # and could not be removed
        self._stopped_by: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruptions:
        for name in (SAVE, STOP):
            _remove_leftover(self._folder / name)
        (self._folder / _MARK).unlink(missing_ok=True)
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)  # None: one that Python did not set
        for name in (_MARK, STOP) if self._saw_stop and error is None else (_MARK,):
            with suppress(OSError):
                os.unlink(self._folder / name)

    def poll(self, rank: int) -> Wishes:
        """What this rank was asked for so far. Looks for files on rank 0; cheap enough for every step."""
        if rank == 0:
            self._saw_stop = self._saw_stop or os.path.lexists(self._folder / STOP)
            there = os.path.lexists(self._folder / SAVE)
            self._answered_save = self._answered_save and there
            self._saw_save = there and not self._answered_save
        if self._saw_stop:
            self._stopped_by = str(self._folder / STOP)  # a person's word outweighs a scheduler's, which would start the run again
        elif self._signal is not None:
            self._stopped_by = self._signal
        return Wishes(self._saw_save, self._stopped_by is not None)

    def done_saving(self) -> None:
        """The wish to save was answered, by a checkpoint or by an alarm: ``save`` goes away, which whoever touched it may wait for."""
        if not self._saw_save:
            return
        self._saw_save = False
        try:
            (self._folder / SAVE).unlink(missing_ok=True)
        except OSError:  # a folder that became read-only: not a save at every step from here on
            self._answered_save = True

    def noticed(self) -> bool:
        """Whether any rank was asked to stop, without a collective: for long work in which ranks do not meet.

        A launcher may tell one rank half a minute before the next, so a rank that hears a signal leaves a mark in the folder.
        """
        return self._signal is not None or any(os.path.lexists(self._folder / name) for name in (_MARK, STOP))

    @property
    def stopped_by(self) -> str | None:
        """What asked this rank to stop when it was last polled: a signal's name or the path of ``stop``."""
        return self._stopped_by

    @property
    def exit_code(self) -> int:
        """RESTART after a signal, else DONE. Where ranks that were asked differ, DONE counts: a person's word."""
        return RESTART if self._stopped_by is not None and not self._saw_stop else DONE

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal is None:  # a second one changes nothing
            self._signal = signal.Signals(number).name
            with suppress(OSError):
                (self._folder / _MARK).touch()


@contextmanager
def ctrl_c_waits() -> Iterator[None]:
    """Ctrl-C is answered at the end of the context, not within.

    Raised while torch calls a file's ``write`` it would come out as another error, and a save would be told as failed. A second one is
    answered at once.
    """
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        """The first one is kept for the end of the context; the second raises KeyboardInterrupt here."""
        if noted:
            signal.default_int_handler(number, frame)
        noted.append(number)

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield  # ignored, or another's
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if noted:
        raise KeyboardInterrupt


def ignore_stops() -> None:
    """From here on SIGTERM and SIGUSR1 do nothing: how the run ends is decided, and a launcher ending its ranks must not change that."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _remove_leftover(path: Path) -> None:
    try:
        os.unlink(path)  # of several ranks one succeeds
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path} asks this run to {path.name} and cannot be removed ({error.strerror}): remove it by hand.") from error
    print(f"{path} was left from before this run and is removed; touch it again to {path.name}.", file=sys.stderr, flush=True)
