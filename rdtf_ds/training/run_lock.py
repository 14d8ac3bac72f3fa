"""One trainer in a run folder at a time.

The lock is a POSIX record lock: it works on NFS, forked loader workers do not inherit it, and the kernel drops it when its process
dies, however it dies. So the file left behind by a killed trainer means nothing. (It is also dropped as soon as its process closes any
descriptor of the file: nothing else here opens it.)
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from rdtf_ds.errors import UserError

NAME = ".lock"
_HELD = (errno.EACCES, errno.EAGAIN)  # either, says POSIX
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_RETRY_S = 0.2


class FolderInUse(UserError):
    """Another trainer holds the lock."""


def _here(take: Callable[[], None]) -> None:
    take()


class RunLock:
    """Context manager that holds the lock on ``folder``.

    Args:
        folder: The run folder; made if it is not there.
        wait_s: How long to wait for another trainer: one that was just told to stop may still be saving.
        on_rank_zero: Calls a function on rank 0 alone and raises its error on all ranks; default: there is one rank.

    Raises:
        FolderInUse: on entry, another trainer holds the lock.
        UserError: on entry, the lock file cannot be opened.
    """

    def __init__(self, folder: Path, wait_s: float = 30.0, on_rank_zero: Callable[[Callable[[], None]], None] = _here) -> None:
        self._folder, self._wait_s, self._on_rank_zero = folder, wait_s, on_rank_zero
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        self._on_rank_zero(self._take)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)  # the file stays: another process may be waiting for this very one
            self._descriptor = None

    def _take(self) -> None:
        path = self._folder / NAME
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(
                f"{path} cannot be opened ({error.strerror}). Give a folder you may write to with --output_dir (rdtf.output_dir)."
            ) from error
        try:
            if not self._lock() and not self._wait():
                holder = self._holder()
                self._close()
                raise FolderInUse(
                    f"{self._folder} is in use by another trainer, {holder}. Wait for it to end, stop it there with `kill` or "
                    f"from anywhere with `touch {self._folder / 'stop'}`, or give another folder with --output_dir (rdtf.output_dir)."
                )
            self._sign()
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            _say(f"{self._folder} is on a file system without locks ({error.strerror}): see to it yourself that one trainer alone uses it.")

    def _lock(self) -> bool:
        assert self._descriptor is not None
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                return False
            raise
        return True

    def _wait(self) -> bool:
        if self._wait_s > 0:
            _say(f"{self._folder} is in use by {self._holder()}, perhaps about to end: waiting up to {self._wait_s:g} s.")
        deadline = time.monotonic() + self._wait_s
        while time.monotonic() < deadline:
            time.sleep(_RETRY_S)
            if self._lock():
                return True
        return False

    def _sign(self) -> None:
        """Who holds the lock, for those who find it held."""
        assert self._descriptor is not None
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(holder).encode() + b"\n", 0)

    def _holder(self) -> str:
        assert self._descriptor is not None
        try:
            holder = json.loads(os.pread(self._descriptor, 4096, 0))
            return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
        except (ValueError, KeyError, TypeError):  # it has the lock and has not signed yet
            return "a process that has just started"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
