"""A disk whose power can be cut after any operation, losing what was not yet flushed."""

from __future__ import annotations

import builtins
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rdtf_ds.checkpoints import durable


class PowerCut(BaseException):
    """Not an Exception: nothing in the code under test may handle it."""


class Disk:
    """Stands in for ``os`` and ``open`` of `rdtf_ds.checkpoints.durable`; counts operations and stops after ``cut_after`` of them.

    Args:
        folder: The folder under test.
        limbo: An empty folder outside it, for files that were removed and may come back.
        cut_after: Operations that still happen; None: all.
        lose: Whether data not flushed and names whose folder was not flushed are lost with the power.
    """

    def __init__(self, folder: Path, limbo: Path, cut_after: int | None = None, lose: bool = False) -> None:
        self._folder, self._limbo, self._cut_after, self._lose = folder, limbo, cut_after, lose
        self.done: list[str] = []
        self._is_off = False
        self._pending: list[tuple[Path, Callable[[], None]]] = []  # folder or file that must be flushed, how it is lost
        self._paths: dict[int, Path] = {}
        self._renamed: list[tuple[Path, Path]] = []

    def install(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(durable, "os", self)
        patch.setattr(durable, "open", self.open, raising=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)  # constants, close

    # --- operations, each counted before it happens

    def open(self, path: Any, mode: Any = os.O_RDONLY, *rest: Any) -> Any:
        if isinstance(mode, int):
            descriptor = os.open(path, mode, *rest)
            self._paths[descriptor] = Path(path)
            return descriptor
        if "r" in mode:
            return builtins.open(path, mode)
        self._operation(f"create {Path(path).name}")
        file = _File(self, Path(path), builtins.open(path, mode, buffering=0))  # noqa: SIM115  _File closes it
        self._undoable(Path(path).parent, lambda: self._now(Path(path)).unlink(missing_ok=True))
        self._paths[file.fileno()] = Path(path)
        return file

    def mkdir(self, path: Path) -> None:
        self._operation(f"mkdir {path.name}")
        os.mkdir(path)
        self._undoable(path.parent, lambda: shutil.rmtree(path, ignore_errors=True))

    def rename(self, source: Path, target: Path) -> None:
        self._operation(f"rename {source.name} to {target.name}")
        replaced = self._limbo / f"{len(self.done)}"
        if target.exists():
            shutil.copy2(target, replaced)
        os.replace(source, target)

        self._renamed.append((source, target))

        def undo() -> None:
            os.rename(target, source)
            self._renamed.remove((source, target))
            if replaced.exists():
                shutil.copy2(replaced, target)

        self._undoable(target.parent, undo)

    replace = rename

    def unlink(self, path: Path) -> None:
        self._operation(f"unlink {path.name}")
        self._away(path)

    def rmdir(self, path: Path) -> None:
        self._operation(f"rmdir {path.name}")
        self._away(path)

    def fsync(self, descriptor: int) -> None:
        path = self._paths[descriptor]
        self._operation(f"fsync {path.name}")
        os.fsync(descriptor)
        self._pending = [(needed, undo) for needed, undo in self._pending if needed != path]

    def written(self, path: Path, before: int) -> None:
        def lose() -> None:
            if self._now(path).exists():
                os.truncate(self._now(path), before)

        self._undoable(path, lose)

    def operation(self, name: str) -> None:
        self._operation(name)

    def _operation(self, name: str) -> None:
        if self._cut_after is not None and len(self.done) >= self._cut_after:
            self._cut()
        self.done.append(name)

    def _now(self, path: Path) -> Path:
        """Where a file is that was written under this name."""
        for source, target in self._renamed:
            if path == source or source in path.parents:
                path = target / path.relative_to(source)
        return path

    def _undoable(self, needed: Path, undo: Callable[[], None]) -> None:
        self._pending.append((needed, undo))

    def _away(self, path: Path) -> None:
        limbo = self._limbo / f"{len(self.done)}"
        os.rename(path, limbo)
        self._undoable(path.parent, lambda: os.rename(limbo, path) if path.parent.is_dir() else None)

    @property
    def found(self) -> Path:
        """What is on the disk when the power is back, whatever the code under test still did; the folder itself without a cut."""
        return self._limbo / "found" if self._is_off else self._folder

    def _cut(self) -> None:
        if not self._is_off:
            for _, undo in reversed(self._pending) if self._lose else ():
                undo()
            shutil.copytree(self._folder, self._limbo / "found")
            self._is_off = True
        raise PowerCut(self.done[-1] if self.done else "before anything")


class _File:
    """Unbuffered, so that every write is an operation."""

    def __init__(self, disk: Disk, path: Path, file: Any) -> None:
        self._disk, self._path, self._file = disk, path, file
        self._size = 0

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *failure: object) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        self._disk.operation(f"write {self._path.name}")
        written = self._file.write(data)
        self._disk.written(self._path, self._size)
        self._size += written
        return int(written)

    def flush(self) -> None: ...

    def fileno(self) -> int:
        return int(self._file.fileno())
