"""What Linux says of processes: who descends from whom, in which state, and who ends with whom. Standard library only.

Imported before anything heavy, by the supervisor, and by loader workers.
"""

from __future__ import annotations

import ctypes
import os
import signal
from dataclasses import dataclass

_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 1, 15, 36  # linux/prctl.h
_PARENT, _STARTED = 1, 19  # places in /proc/PID/stat, counted behind the name


@dataclass(frozen=True)
class Process:
    """One process at one moment.

    Attributes:
        state: A letter of proc(5): R runs, S sleeps, D waits for a disk or a network file system, T stopped, t traced, Z ended, ...
        started: Clock ticks from boot to its start; with the pid it says which process this is, as pids are used again.
    """

    pid: int
    name: str
    state: str
    parent: int
    started: int

    @property
    def stopped(self) -> bool:
        """By SIGSTOP, Ctrl-Z or a debugger: it answers nothing but SIGKILL and SIGCONT."""
        return self.state in "Tt"

    @property
    def ended(self) -> bool:
        """Dead, and at most waiting for its parent to notice."""
        return self.state in "ZX"


def read_process(pid: int) -> Process | None:
    """The process of this number, or None if there is none."""
    text = _read(pid, "stat")
    if not text:
        return None
    name = text[text.index("(") + 1 : text.rindex(")")]  # it may have spaces and brackets of its own
    fields = text[text.rindex(")") + 1 :].split()
    return Process(pid, name, fields[0], int(fields[_PARENT]), int(fields[_STARTED]))


def descendants(pid: int) -> list[Process]:
    """Children, then their children, and so on; ended ones that nobody has noticed yet too."""
    everyone = [process for name in os.listdir("/proc") if name.isdigit() and (process := read_process(int(name))) is not None]
    found: list[Process] = []
    parents = {pid}
    while generation := [process for process in everyone if process.parent in parents]:
        found += generation
        parents = {process.pid for process in generation}
    return found


def arguments(pid: int) -> list[str]:
    """The command line of a process; empty if it is gone."""
    return _read(pid, "cmdline").split("\0")[:-1]


def waits_in(pid: int) -> str:
    """The kernel function a process sleeps in, ``-`` if it runs or the kernel does not tell."""
    function = _read(pid, "wchan")
    return function if function not in ("", "0") else "-"


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler of its own for a signal."""
    for line in _read(pid, "status").splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def die_with_parent(parent: int) -> None:
    """SIGKILL this process when the thread that forked it ends, even by SIGKILL. Children do not inherit this.

    Args:
        parent: pid of the process that forked this one; if it has ended already, so does this one.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def adopt_orphans() -> None:
    """Descendants whose parent ends become children of this process, not of init, and so stay in sight."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def name_this_process(name: str) -> None:
    """What ``ps`` and ``top`` show, up to 15 characters."""
    _prctl(_PR_SET_NAME, name.encode())


def _prctl(option: int, value: int | bytes) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    argument = ctypes.c_char_p(value) if isinstance(value, bytes) else ctypes.c_ulong(value)
    if libc.prctl(ctypes.c_int(option), argument, ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


def _read(pid: int, name: str) -> str:
    try:
        with open(f"/proc/{pid}/{name}", encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:  # it ended
        return ""
