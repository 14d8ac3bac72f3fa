"""The parent's side of one child that decodes (`decoder_child`): started, asked with a deadline, and killed for certain."""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rdtf_ds.errors import UserError

COMMAND = (sys.executable, "-m", "rdtf_ds.data.clips.decoder_child")
ANSWER_BYTES = 64 * 2**20  # of shared memory; sparse, so that a child has only what its largest answer took
_LONGEST_LINE = 2**20
_LONGEST_S = 1e6  # 12 days, for a deadline that is meant to be none: poll(2) and alarm(2) count in 32 bits
_START_S = 60.0  # from nothing to the first line, on a machine that does much else
LEFT_TO_THE_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""What a child ignores, though a terminal or scheduler sends it to all: the run ends children itself, after its checkpoint."""
_DTYPES = ("|u1", "<i8")
_PACKAGE_ROOT = Path(__file__).resolve().parents[3]
# What the kernel or a person does to a process, in contrast to what a process does to itself.
_FROM_OUTSIDE = {signal.SIGKILL, signal.SIGALRM, signal.SIGXCPU, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}


class DecoderUnavailable(UserError):
    """No child works here: the machine or the installation is at fault, and nothing is known of any clip."""

    def __init__(self, why: str, remedy: str) -> None:
        super().__init__(f"Clips cannot be decoded, as the decoder cannot be started: {why}. {remedy}")
        self._words = why, remedy

    def __reduce__(self) -> tuple[type[DecoderUnavailable], tuple[str, str]]:
        return DecoderUnavailable, self._words  # crosses process borders


class ChildFailed(Exception):
    """A request has no answer. The child is dead.

    Attributes:
        reason: a phrase for people.
        outside: The machine or a person ended it, or time was up; else it fell over what it was given.
    """

    def __init__(self, reason: str, outside: bool) -> None:
        super().__init__(reason)
        self.reason, self.outside = reason, outside


@dataclass(frozen=True)
class Answer:
    """What the child found, or why it found nothing."""

    head: dict[str, Any]
    arrays: dict[str, np.ndarray]
    error: str | None = None
    transient: bool = False


class DecoderProcess:
    """One child. Used by one thread at a time; `strike` may come from any.

    Attributes:
        served: requests it was given.
        busy: It owes an answer.

    Args:
        command: starts it; three arguments are appended, see `decoder_child`.
        memory_bytes: the most address space it may have.
    Raises:
        DecoderUnavailable: It cannot be started, or says that it cannot work.
    """

    def __init__(self, command: tuple[str, ...], memory_bytes: int) -> None:
        self.served, self.busy = 0, False
        self._memory_bytes = memory_bytes
        self._rest = b""
        self._may_read = 0
        self._memory = _shared_memory(ANSWER_BYTES)
        # A child is told to end with the *thread* that starts it; only of the main thread is it known that it lasts.
        parent = os.getpid() if threading.current_thread() is threading.main_thread() else 0
        paths = os.pathsep.join([str(_PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, LEFT_TO_THE_PARENT)  # until the child ignores them
        try:
            self._process = subprocess.Popen(
                (*command, str(self._memory), str(memory_bytes), str(parent)), pass_fds=(self._memory,), bufsize=0,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )  # fmt: skip
        except OSError as error:
            os.close(self._memory)
            remedy = "It is another process: see `ulimit -u`, `ulimit -n`, and how much memory is free."
            raise DecoderUnavailable(f"{command[0]}: {error.strerror}", remedy) from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        try:
            self._hear_that_it_works(f"{' '.join(command)} 0 {memory_bytes} 0")
        except BaseException:
            self.kill()
            raise

    def _hear_that_it_works(self, command: str) -> None:
        try:
            first = self._read_line(time.monotonic() + _START_S)
        except TimeoutError:
            raise DecoderUnavailable(f"it says nothing for {_START_S:g} s", f"See whether `{command}` hangs.") from None
        except (EOFError, ValueError, OSError):
            raise DecoderUnavailable(_death(self.kill(grace_s=1.0)), f"See what `{command}` prints.") from None
        if "unable" in first:
            raise DecoderUnavailable(str(first["unable"]), str(first.get("remedy", "")))
        if first != {"ready": True}:
            raise DecoderUnavailable("it does not say that it is ready", f"See what `{command}` prints.")

    @property
    def pid(self) -> int:
        """Of the child, also when it has ended."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the child has not ended; one that has is reaped by this."""
        return self._process.poll() is None

    def ask(self, request: dict[str, Any], seconds: float, most_bytes: int, most_read: int = 0) -> Iterator[Answer]:
        """The answers to a request, one by one. To leave early, `kill`.

        Args:
            seconds: for each answer, counted from when it is asked for, or from when the child last said that it has read some of a file.
            most_bytes: of the arrays of one answer.
            most_read: bytes it may say to have read, in all.
        Raises:
            ChildFailed: It died, missed a deadline, or does not speak the protocol. It is killed.
        """
        seconds = min(seconds, _LONGEST_S)
        self.served, self.busy = self.served + 1, True
        self._may_read = most_read
        try:
            if self._rest:
                raise ValueError("more than was asked for")
            self._write({"id": self.served, "seconds": seconds, **request})
            while True:
                answer, last = self._receive(seconds, most_bytes)
                self.busy = not last
                yield answer
                if last:
                    return
                self._write(None)
        except TimeoutError:
            self.kill()
            raise ChildFailed(f"decoding took longer than rdtf.data.decode_timeout_s ({seconds:g} s)", outside=True) from None
        except MemoryError as error:
            self.kill()
            raise ChildFailed(f"takes more than {self._memory_bytes >> 20} MiB to decode: {error}", outside=False) from None
        except (EOFError, OSError):
            code = self.kill(grace_s=1.0)
            raise ChildFailed(f"the decoder died ({_death(code)})", outside=code is not None and -code in _FROM_OUTSIDE) from None
        except (ValueError, KeyError, TypeError) as error:
            self.kill()
            raise ChildFailed(f"the decoder answered nonsense: {error}", outside=False) from None

    def strike(self) -> None:
        """Kill the child and leave the rest to the thread that uses it."""
        self._process.kill()

    def kill(self, grace_s: float = 0.0) -> int | None:
        """End the child and return its exit code, its own if it ends within ``grace_s``. Any number of times."""
        try:
            code: int | None = self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self.forget()
        return code

    def forget(self) -> None:
        """Close this process's side, and leave the child to whoever else has it: for processes forked from the one that started it."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        descriptor, self._memory = self._memory, -1
        if descriptor >= 0:
            os.close(descriptor)
        if self._process.returncode is None:
            self._process.returncode = 0  # it is another's to wait for

    def _receive(self, seconds: float, most_bytes: int) -> tuple[Answer, bool]:
        """One answer, which may come in several parts, and whether it is the last one."""
        parts: dict[str, list[np.ndarray]] = {}
        deadline = time.monotonic() + seconds
        while True:
            line = self._read_line(deadline)
            if line["id"] != self.served:
                raise ValueError("it answers something else")
            if "read" in line:
                self._may_read -= max(1, int(line["read"]))
                if self._may_read < 0:
                    raise ValueError("it reads without end")
                deadline = time.monotonic() + seconds
            offset = 0
            for name, dtype, shape in line["arrays"]:
                array = self._take(dtype, shape, offset, most_bytes)
                offset += array.nbytes
                most_bytes -= array.nbytes
                parts.setdefault(name, []).append(array)
            if "error" in line:
                if line["memory"]:  # it is in no state to go on
                    raise MemoryError(line["error"])
                return Answer({}, {}, str(line["error"]), bool(line["transient"])), True
            if "answer" in line:
                arrays = {name: part[0] if len(part) == 1 else np.concatenate(part) for name, part in parts.items()}
                return Answer(dict(line["answer"]), arrays), bool(line["last"])
            self._write(None)

    def _take(self, dtype: str, shape: list[int], offset: int, most_bytes: int) -> np.ndarray:
        """Copy one array out of the shared memory, which never becomes part of this process."""
        if dtype not in _DTYPES or not all(isinstance(side, int) and side > 0 for side in shape):
            raise ValueError(f"an array of {dtype} {shape}")
        count = 1
        for side in shape:
            count *= side
        count *= np.dtype(dtype).itemsize
        if count > most_bytes or offset + count > ANSWER_BYTES:
            raise ValueError(f"it answers too much: an array of {dtype} {shape}")
        array = np.empty(shape, dtype)
        if os.preadv(self._memory, [array.reshape(-1).view(np.uint8).data], offset) != count:
            raise ValueError("its memory is cut short")
        return array

    def _write(self, request: dict[str, Any] | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write((b"" if request is None else json.dumps(request).encode()) + b"\n")

    def _read_line(self, deadline: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        data = self._rest
        while b"\n" not in data:
            if len(data) > _LONGEST_LINE:
                raise ValueError("a line without end")
            if not poll.poll(max(0.0, 1000 * (deadline - time.monotonic()))):
                raise TimeoutError
            more = os.read(descriptor, 2**16)
            if not more:
                raise EOFError
            data += more
        line, _, self._rest = data.partition(b"\n")
        answer = json.loads(line)
        if not isinstance(answer, dict):
            raise ValueError("not an object")
        return answer


def _shared_memory(size: int) -> int:
    """An anonymous file of this size that nobody can shrink under the other's feet."""
    descriptor = -1
    try:
        descriptor = os.memfd_create("decoded frames", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return descriptor
    except OSError as error:
        if descriptor >= 0:
            os.close(descriptor)
        remedy = "Allow memfd_create(2) where this runs (a sandbox may forbid it), and see `ulimit -n` and `ulimit -f`."
        raise DecoderUnavailable(f"no memory can be shared with it ({error.strerror})", remedy) from None


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"signal {name}, which is what the kernel sends when memory is short" if name == "SIGKILL" else f"signal {name}"
    return f"exit code {code}"
