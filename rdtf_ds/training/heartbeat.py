"""Signs of life of the training process, over memory it shares with its supervisor. Standard library only.

A beat is a count, not a time: the supervisor measures silence by its own clock and only while it runs itself, so Ctrl-Z or a suspended
machine are not taken for a hang.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import struct
import time
from pathlib import Path
from typing import BinaryIO

from rdtf_ds.errors import UserError

START = "start"
"""The phase up to the first step, which has a limit of its own."""

STACKS_SIGNAL = signal.SIGUSR2

OUTCOME = "outcome.json"
"""In the run folder: the exit code of the last run that has ended."""

# beats, start limit, stall limit, phase, path of the stacks, whether the folder is this run's
_COUNT, _LIMITS, _PHASE, _PATH = slice(0, 8), slice(8, 24), slice(24, 88), slice(88, 88 + 4096)
_CLAIM = _PATH.stop
_SIZE = _CLAIM + 1
_LONGEST_TICK_S = 1.0


def shared_memory() -> mmap.mmap:
    """What the two sides share: made before the fork."""
    return mmap.mmap(-1, _SIZE)


class Heartbeat:
    """The child's side: says that training goes on, and in which phase.

    Args:
        memory: Shared with the supervisor; None: nobody listens, and nothing is done.
    """

    def __init__(self, memory: mmap.mmap | None = None) -> None:
        self._memory, self._beats = memory, 0
        self._stacks: BinaryIO | None = None

    def watch(self, folder: Path, start_timeout_s: float, stall_timeout_s: float) -> None:
        """Limit the seconds between two beats, in phase ``start`` and in all others; 0 is no limit.

        From here on SIGUSR2 (to this process or to the supervisor) and crashes write the Python stacks of all threads into
        ``folder/stacks_rank0000.txt``, even while one thread holds the GIL. Forked loader workers inherit this.

        Raises:
            UserError: the file cannot be written.
        """
        if self._memory is None:
            return
        rank = int(os.environ.get("RANK", "0"))
        path = folder.absolute() / f"stacks_rank{rank:04d}.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stacks = open(path, "ab")  # noqa: SIM115  # open as long as the process lives
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}): choose a folder you may write to with --output_dir") from error
        faulthandler.register(STACKS_SIGNAL, file=self._stacks, all_threads=True)
        faulthandler.enable(file=self._stacks, all_threads=True)
        self.beat(START)
        self._memory[_PATH] = os.fsencode(path).ljust(4096, b"\0")
        self._memory[_LIMITS] = struct.pack("=dd", start_timeout_s, stall_timeout_s)

    def claim(self) -> None:
        """The folder is this run's alone from here on: its rank 0 leaves ``outcome.json`` there when it ends; an old one goes now."""
        if self._memory is None or self._stacks is None or int(os.environ.get("RANK", "0")) != 0:
            return
        Path(os.fsdecode(self._memory[_PATH].rstrip(b"\0"))).with_name(OUTCOME).unlink(missing_ok=True)
        self._memory[_CLAIM] = 1

    def beat(self, phase: str) -> None:
        """Still alive, and now in ``phase``; costs about a microsecond."""
        if self._memory is None:
            return
        self._beats += 1
        # Count first, and read last: a silence is never measured by the limit of the phase that ended it.
        self._memory[_COUNT] = struct.pack("=Q", self._beats)
        self._memory[_PHASE] = phase.encode()[:64].ljust(64, b"\0")


_current = Heartbeat()


def heartbeat() -> Heartbeat:
    """This process's heartbeat; a silent one where no supervisor listens, as in tests and tools."""
    return _current


def connect(memory: mmap.mmap) -> Heartbeat:
    """Make `heartbeat` the one a supervisor hears."""
    global _current
    _current = Heartbeat(memory)
    return _current


class Silence:
    """The supervisor's side: how long the child has not beaten, and the limit of its phase.

    Attributes:
        seconds: Of this process's own time since it last saw a beat.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._beats, self._looked = 0, time.monotonic()
        self.seconds = 0.0

    def look(self) -> bool:
        """Whether the limit is reached. Called several times a second; a longer gap means that this process did not run either."""
        limit, now = self.limit, time.monotonic()
        self.seconds += min(now - self._looked, _LONGEST_TICK_S)
        self._looked = now
        (beats,) = struct.unpack("=Q", self._memory[_COUNT])
        if beats != self._beats:
            self._beats, self.seconds = beats, 0.0
        return 0 < limit <= self.seconds

    @property
    def phase(self) -> str:
        """What the watched process said last that it does."""
        return self._memory[_PHASE].rstrip(b"\0").decode(errors="replace") or START

    @property
    def limit(self) -> float:
        """Seconds of silence that are allowed in this phase; 0: any."""
        start, stall = struct.unpack("=dd", self._memory[_LIMITS])
        return float(start if self.phase == START else stall)

    @property
    def key(self) -> str:
        """The limit's name in a config."""
        return f"rdtf.watchdog.{'start' if self.phase == START else 'stall'}_timeout_s"

    @property
    def claimed(self) -> bool:
        """Whether the folder of the stacks is this run's alone, and this its rank 0."""
        return bool(self._memory[_CLAIM])

    @property
    def stacks(self) -> Path | None:
        """Where stacks go; None before `Heartbeat.watch`."""
        name = self._memory[_PATH].rstrip(b"\0")
        return Path(os.fsdecode(name)) if name else None
