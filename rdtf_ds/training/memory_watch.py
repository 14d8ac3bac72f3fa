"""Measured memory beside the predicted one, phase by phase, while a run trains.

Every phase of every step is looked at, since its peak hangs on how many frames a step has; that costs some 40 µs a phase, and no
wait for a GPU. What is kept, and logged when it grows, is the highest each phase has been.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from rdtf_ds.memory.report import told
from rdtf_ds.training.device_memory import CardPeaks, PeakMeter, ResidentPeaks, whole_peak
from rdtf_ds.training.telemetry import RunLog, Stopwatch

PHASE_OF_LAP = {"encode": "forward"}
"""What a step's watch calls otherwise than the plan."""
RUN = "run"
"""In the place of a phase, where phases cannot be told apart."""
TOLERANCE = 0.1
UNPLANNED = 256 * 2**20
"""Bytes beside the tensors that are no reason to warn: modules imported on first use, kernels' workspaces, the index of the clips."""
GROWTH = 0.01
"""By as much a phase must grow to be logged again."""


class MemoryWatch:
    """Peaks of one process by phase; phases that no plan has (``data``) count for the whole only.

    Args:
        meter: Restarted here; None: nothing is measured, as on ranks that do not log.
        predicted: Bytes by phase.
    """

    def __init__(self, meter: PeakMeter | None, predicted: Mapping[str, int]) -> None:
        self._meter = meter
        by_phase = meter is None or meter.by_phase
        self.predicted = dict(predicted) if by_phase else {RUN: max(predicted.values(), default=0)}
        self.measured: dict[str, int] = {}
        self._whole: dict[str, int] = {}
        self._logged: dict[str, int] = {}
        self._told = self._warned = False

    @classmethod
    def on(cls, device: torch.device, rank: int, predicted: Mapping[str, int]) -> MemoryWatch:
        """Of rank 0, from what its process holds now; silent on the others."""
        if rank != 0:
            return cls(None, predicted)
        return cls(CardPeaks(device) if device.type == "cuda" else ResidentPeaks(), predicted)

    def lap(self, phase: str) -> None:
        """What was at most held since the last lap belongs to ``phase``."""
        if self._meter is None:
            return
        reading = self._meter.read()
        self._meter.restart()
        for kind, size in reading.items():
            self._whole[kind] = max(size, self._whole.get(kind, 0))
        name = PHASE_OF_LAP.get(phase, phase) if self._meter.by_phase else RUN
        if name in self.predicted:
            self.measured[name] = max(reading["peak"], self.measured.get(name, 0))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is done inside is one phase; what was before it belongs to none."""
        self.lap("")
        yield
        self.lap(name)

    def read(self) -> dict[str, Any]:
        """For ``metrics.jsonl``: bytes at most so far, of the process and by phase."""
        cuda = {"cuda": self._whole["peak"], "cuda_reserved": self._whole["reserved"]} if "reserved" in self._whole else {}
        return {"rss": self._whole.get("rss", whole_peak()), **cuda, "measured": dict(self.measured), "predicted": dict(self.predicted)}

    def report(self, log: RunLog, done: int) -> None:
        """Log what grew in ``done`` steps; say the first figures once, and once that one is well above its prediction."""
        for phase, size in self.measured.items():
            if size > (1 + GROWTH) * self._logged.get(phase, 0):
                self._logged[phase] = size
                log.scalar(f"memory_gb/measured_{phase}", size / 1e9, done)
                log.scalar(f"memory_gb/predicted_{phase}", self.predicted[phase] / 1e9, done)
        if not self._told and self.measured:
            self._told = True
            log.say(f"Memory, measured of predicted: {', '.join(map(self._compared, self.measured))}.{self._in_one_piece()}")
        above = [phase for phase, size in self.measured.items() if size > (1 + TOLERANCE) * self.predicted[phase] + UNPLANNED]
        if above and not self._warned:
            self._warned = True
            log.say(
                f"Warning: more memory than predicted: {', '.join(map(self._compared, above))}. Training goes on; leave more of it free "
                f"than the plan says, and report this with memory_plan.txt, for the plan is wrong."
            )

    def _compared(self, phase: str) -> str:
        return f"{phase} {told(self.measured[phase])} of {told(self.predicted[phase])}"

    def _in_one_piece(self) -> str:
        if RUN not in self.predicted:
            return ""
        return " This machine lets no process restart its peak (/proc/self/clear_refs), so phases cannot be told apart."


class StepWatch:
    """Seconds and memory of one step, both by phase.

    Args:
        memory: Of the run.
    """

    def __init__(self, memory: MemoryWatch) -> None:
        self._time, self._memory = Stopwatch(), memory
        memory.lap("")

    def lap(self, phase: str) -> None:
        """``phase`` ends here."""
        self._time.lap(phase)
        self._memory.lap(phase)

    def read(self) -> tuple[dict[str, float], dict[str, Any]]:
        """Seconds of this step by phase, and bytes so far."""
        return self._time.read(), self._memory.read()
