"""Watches the training process from outside: hangs, signals, a lost launcher, a death. Standard library only.

``train.py`` calls :func:`supervise` before it imports anything heavy. The process forks: the child goes on to train, the parent stays
small, never returns, and exits with the code of the run. To a launcher the parent is the rank.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from typing import BinaryIO, NoReturn

from rdtf_ds.checkpoints.durable import replace_file
from rdtf_ds.exit_codes import BUG, DONE, MEANING, RESTART
from rdtf_ds.processes import (
    Process,
    adopt_orphans,
    arguments,
    catches,
    descendants,
    die_with_parent,
    name_this_process,
    read_process,
    waits_in,
)
from rdtf_ds.training.heartbeat import OUTCOME, STACKS_SIGNAL, Heartbeat, Silence, connect, heartbeat, shared_memory

__all__ = ["Heartbeat", "heartbeat", "leave", "supervise"]

_STOP = (signal.SIGTERM, signal.SIGUSR1)
_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)  # those that faulthandler answers
_HEARD = frozenset((*_STOP, signal.SIGINT, signal.SIGCHLD, signal.SIGALRM, STACKS_SIGNAL))
_FROM_TERMINAL = 0x80  # SI_KERNEL: Ctrl-C, which the terminal sends to the child as well
_POLL_S = 0.25
_ANSWER_S, _QUIET_S, _ALL_STACKS_S = 1.0, 0.1, 5.0
_LAST_WAIT_S = 10.0
_LAUNCHERS = ("deepspeed.launcher", "torch.distributed.run", "torch.distributed.launch")
_LAUNCHER_COMMANDS = ("bin/deepspeed", "torchrun")


def supervise() -> Heartbeat:
    """Fork. Returns in the child alone; the parent watches it and exits with the run's code.

    The child dies with the parent, has every signal unblocked that the parent hands on, and keeps the dispositions it inherited (such
    as SIGHUP ignored by nohup).
    """
    memory, parent = shared_memory(), os.getpid()
    launchers = find_launchers()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # inherited as ignored, children could not be waited for
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD)
    trainer = os.fork()
    if trainer == 0:
        die_with_parent(parent)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask - _HEARD)
        return connect(memory)
    code = BUG
    try:
        name_this_process("rdtf-supervisor")
        adopt_orphans()
        supervisor = _Supervisor(trainer, memory, launchers)
        code = supervisor.run()
        supervisor.leave_word(code)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # without it the parent would go on to train too


def leave(code: int) -> NoReturn:
    """End this process now: taking a process with torch in it apart takes Python up to 10 s, and stuck children for ever.

    What was printed is flushed, files must be closed already; the supervisor ends what is left.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a closed pipe
            stream.flush()
    os._exit(code)


def find_launchers() -> list[Process]:
    """This process's parent and grandparent, those that are launchers. A shell is none: nohup outlives it."""
    found, process = [], read_process(os.getppid())
    for _ in range(2):
        if process is None:
            break
        if _is_launcher(arguments(process.pid)[:4]):
            found.append(process)
        process = read_process(process.parent)
    return found


def _is_launcher(words: list[str]) -> bool:
    modules = any(word == name or word.startswith(f"{name}.") for word in words for name in _LAUNCHERS)
    return modules or any(word == name or word.endswith(f"/{name}") for word in words for name in _LAUNCHER_COMMANDS)


class _Supervisor:
    """The parent's side."""

    def __init__(self, trainer: int, memory: mmap.mmap, launchers: list[Process]) -> None:
        self._trainer, self._launchers = trainer, launchers
        self._silence = Silence(memory)

    def run(self) -> int:
        """Watch until the trainer has ended, and everything it started; returns the exit code."""
        # A timer and not sigtimedwait: interrupted past its time, as by SIGSTOP, Python 3.11's returns a signal that never came.
        signal.setitimer(signal.ITIMER_REAL, _POLL_S, _POLL_S)
        while True:
            self._hand_on(signal.sigwaitinfo(_HEARD))
            status = self._reap()
            if status is not None:
                return self._ended(status)
            self._look_for_launchers()
            if self._silence.look():
                return self._end_stalled()

    def leave_word(self, code: int) -> None:
        """``OUT/outcome.json`` of rank 0: a launcher may put a code of its own in the place of this one."""
        if self._silence.stacks is None or not self._silence.claimed:
            return
        meaning = MEANING.get(code, f"ended by signal {code - 128}" if code > 128 else "unknown")
        word = {"exit_code": code, "meaning": meaning, "ended": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        with suppress(OSError):
            replace_file(self._silence.stacks.parent / OUTCOME, f"{json.dumps(word)}\n".encode())

    def _hand_on(self, received: signal.struct_siginfo) -> None:
        number = signal.Signals(received.si_signo)
        asked_from_outside = number == signal.SIGINT and received.si_code != _FROM_TERMINAL
        # SIGUSR2 kills a process that has no handler for it yet; the others may.
        if number in _STOP or asked_from_outside or (number == STACKS_SIGNAL and catches(self._trainer, STACKS_SIGNAL)):
            os.kill(self._trainer, number)

    def _reap(self) -> int | None:
        """Notice ended children, adopted ones too; the trainer's wait status if it is among them."""
        found = None
        with suppress(ChildProcessError):  # none is left
            while (ended := os.waitpid(-1, os.WNOHANG))[0] != 0:
                if ended[0] == self._trainer:
                    found = ended[1]
        return found

    def _look_for_launchers(self) -> None:
        for launcher in self._launchers:
            now = read_process(launcher.pid)
            if now is None or now.ended or now.started != launcher.started:
                _say(f"the launcher ({launcher.name}, process {launcher.pid}) is gone: stopping after this step, with a checkpoint")
                os.kill(self._trainer, signal.SIGTERM)
                self._launchers = []
                return

    def _ended(self, status: int) -> int:
        self._end_family()
        code = os.waitstatus_to_exitcode(status)
        if code >= 0:
            self._clear_stacks(code)
            return code
        _say(f"{self._death(-code)}; the same command goes on from the last checkpoint")
        return RESTART if -code in _STOP else 128 - code

    def _death(self, number: int) -> str:
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        if number in _STOP:
            return f"ended by {name} while starting or leaving"
        said = f"killed by {name} in phase '{self._silence.phase}'"
        if number == signal.SIGKILL:
            return f"{said}, by somebody or for want of memory (dmesg tells)"
        written = number in _CRASHES and self._silence.stacks is not None
        return f"{said}, its stacks are in {self._silence.stacks}" if written else said

    def _clear_stacks(self, code: int) -> None:
        """A run that is done leaves no empty file; another's may still be in use."""
        path = self._silence.stacks
        with suppress(OSError):
            if code == DONE and path is not None and path.stat().st_size == 0:
                path.unlink()

    def _end_stalled(self) -> int:
        silence = self._silence
        silent = f"silent for {silence.seconds:.0f} s in phase '{silence.phase}'"
        _say(
            f"{silent}, {silence.key} is {silence.limit:g} (0: no limit). What its processes were doing is in {silence.stacks}. "
            "The same command goes on from the last checkpoint"
        )
        family = descendants(os.getpid())
        try:
            assert silence.stacks is not None  # there is no limit before there is a path
            with open(silence.stacks, "ab", buffering=0) as file:
                _record(family, f"rank {_rank()}, {silent}", file)
        except OSError as error:  # such as a full disk, perhaps what it hangs on
            _say(f"{silence.stacks} cannot be written ({error.strerror}); its processes are\n{_table(family)}")
        self._end_family()
        return RESTART

    def _end_family(self) -> None:
        """SIGKILL every process that descends from this one; those that cannot die (state D) are left after some seconds."""
        deadline = time.monotonic() + _LAST_WAIT_S
        while family := descendants(os.getpid()):
            if time.monotonic() > deadline:
                _say(f"these processes cannot be killed:\n{_table(family)}")
                return
            for process in family:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.01)
            self._reap()


def _record(family: list[Process], title: str, file: BinaryIO) -> None:
    """Append the state of all processes, then the Python stacks of those that can give them, one after the other."""
    file.write(f"\n=== {time.strftime('%Y-%m-%d %H:%M:%S %z')}: {title} ===\n{_table(family)}\n".encode())
    deadline = time.monotonic() + _ALL_STACKS_S
    for process in family:
        if process.stopped or process.ended or not catches(process.pid, STACKS_SIGNAL) or time.monotonic() > deadline:
            continue
        file.write(f"\n--- stacks of process {process.pid} ({process.name}) ---\n".encode())
        before = os.fstat(file.fileno()).st_size
        with suppress(ProcessLookupError):
            os.kill(process.pid, STACKS_SIGNAL)
            _wait_for_text(file, before)


def _wait_for_text(file: BinaryIO, before: int) -> None:
    """Until something was appended and nothing more comes, or nothing has come at all."""
    size, changed = before, time.monotonic()
    while time.monotonic() - changed < (_QUIET_S if size > before else _ANSWER_S):
        time.sleep(0.01)
        now = os.fstat(file.fileno()).st_size
        if now != size:
            size, changed = now, time.monotonic()


def _table(family: list[Process]) -> str:
    rows = [f"{process.pid:>8}  {process.state}      {waits_in(process.pid):<34}  {process.name}" for process in family]
    legend = "R runs, S sleeps, D waits for a disk or network file system, T stopped, Z ended"
    return "\n".join([f"{'pid':>8}  state  {'waits in (kernel)':<34}  name", *rows, f"({legend})"])


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _say(text: str) -> None:
    """One line on standard error, which may be a closed pipe by now."""
    with suppress(OSError):
        os.write(2, f"Rank {_rank()}: {text}.\n".encode())
