"""How much memory this machine leaves a rank, and how much of it a rank held at most: what the planner's figures are held against."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import psutil
import torch

from rdtf_ds.memory.gpus import GPU, context_bytes

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MOUNT, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_NO_LIMIT = 2**60
"""Version 1 of cgroups says "none" by a number of this size."""


@dataclass(frozen=True)
class Room:
    """What one rank may take.

    Attributes:
        name: Of the card, or of the machine's memory.
        total: Of the card, or of the machine, bytes.
        taken: By other processes; on a machine also by this one, so far. What is left is shared by ``ranks``.
        ranks: Of this machine on a CPU, 1 on a card.
        capability: Of a card.
        host: Beside a card: bytes of the machine's memory that are free for each of its ranks. None on a CPU.
    """

    name: str
    total: int
    taken: int
    ranks: int = 1
    capability: tuple[int, int] | None = None
    host: int | None = None

    @property
    def bytes(self) -> int:
        """Of each rank."""
        return max(0, self.total - self.taken) // self.ranks

    @property
    def gpu(self) -> GPU | None:
        """For the planner; None for a CPU."""
        return None if self.capability is None else GPU(self.name, self.bytes, self.capability)


def room_of(device: torch.device, ranks: int) -> Room:
    """What each of so many ranks of a run may take on this rank's device."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or ranks)  # torchrun's and DeepSpeed's names for it
    total, available = machine_memory()
    if device.type == "cuda":
        return replace(card_room(device, ranks), host=available // here)
    return Room("this machine's memory", total, total - available, here)


def card_room(device: torch.device, ranks: int) -> Room:
    """A card as it is now; a look at it makes the CUDA context, if nothing else has.

    The driver tells what is free, not whose the rest is. Of the rest, what the plan counts for a context is taken for this process's own.
    """
    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_reserved(device) + context_bytes(ranks)
    capability = torch.cuda.get_device_capability(device)
    return Room(torch.cuda.get_device_name(device), total, max(0, total - free - own), capability=capability)


def machine_memory() -> tuple[int, int]:
    """(total, available) bytes for this process: the machine's, or less where a control group says so, as containers do."""
    machine = psutil.virtual_memory()
    total, available = int(machine.total), int(machine.available)
    for limit, used in cgroup_limits():
        total, available = min(total, limit), min(available, limit - used)
    return total, max(0, available)


def cgroup_limits(mount: Path = _MOUNT, own: Path = _OWN_CGROUPS) -> Iterator[tuple[int, int]]:
    """(limit, used) of every control group around this process that has a limit; pages of files that can be dropped are not used.

    Args:
        mount: Where the groups are, of version 2, or of version 1 with ``memory`` below it.
        own: The file that says which are this process's.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return  # not Linux
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root, limit, used, dropped = (
            (mount / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if controllers
            else (mount, "memory.max", "memory.current", "inactive_file")
        )
        # In a container the path may be that outside of it, and the group itself stands at the root.
        inner = Path(path.lstrip("/"))
        for folder in (root / inner, *(root / parent for parent in inner.parents)):
            bounds = _number(folder / limit)
            if bounds is not None and bounds < _NO_LIMIT:
                yield bounds, max(0, (_number(folder / used) or 0) - _statistic(folder / "memory.stat", dropped))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # not there; "max"
        return None


def _statistic(path: Path, name: str) -> int:
    try:
        return next((int(line.split()[1]) for line in path.read_text().splitlines() if line.split()[0] == name), 0)
    except OSError:
        return 0


class PeakMeter(Protocol):
    """Peak memory since the last `restart`.

    Attributes:
        by_phase: Whether a restart is possible; else every reading is of the whole run.
    """

    by_phase: bool

    def restart(self) -> None:
        """Begin a new peak at what is held now; where that is not possible, ``by_phase`` says so."""

    def read(self) -> dict[str, int]:
        """Bytes: ``peak``, which the planner predicts, and others of the same device."""
        ...


class CardPeaks:
    """Of PyTorch's allocator: ``peak`` of the tensors, ``reserved`` of what it holds for them. It counts on the CPU: nothing waits."""

    by_phase = True

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def restart(self) -> None:
        """Both peaks begin anew at what is held now, for everyone who reads PyTorch's statistics of this device."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def read(self) -> dict[str, int]:
        """Bytes since the last restart, of this process alone."""
        held = torch.cuda.memory_stats_as_nested_dict(self._device)
        return {"peak": held["allocated_bytes"]["all"]["peak"], "reserved": held["reserved_bytes"]["all"]["peak"]}


class ResidentPeaks:
    """Of the process: ``peak`` of resident memory above what it held when this was made, ``rss`` of all of it; about 40 µs a phase.

    Linux forgets a peak when asked to (``/proc/self/clear_refs``); where a container forbids that, the readings are of the whole run.

    Args:
        status, clear: Files of /proc.
    """

    def __init__(self, status: Path = _STATUS, clear: Path = _CLEAR) -> None:
        self._status, self._clear = status, clear
        self.by_phase = True
        self.restart()
        self._bare = psutil.Process().memory_info().rss

    def restart(self) -> None:
        """Ask Linux to forget the peak; refused once, ``by_phase`` is False for good."""
        try:
            with open(self._clear, "wb", buffering=0) as file:
                file.write(b"5")
        except OSError:
            self.by_phase = False

    def read(self) -> dict[str, int]:
        """Bytes since the last restart, or of the whole run without ``by_phase``; ``peak`` is never negative."""
        peak = self._highest() if self.by_phase else whole_peak()
        return {"peak": max(0, peak - self._bare), "rss": peak}

    def _highest(self) -> int:
        with open(self._status, "rb") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(b"VmHWM:"))


def whole_peak() -> int:
    """Peak of this process's resident memory; since the last restart, if there was any: both come from the same number of the kernel."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
