"""Numbers gone bad: steps counted, the run sent back to a checkpoint past the samples it happened with, and the second time stopped.

A step is bad when it was skipped for numbers that are not finite, and not in fp16's search for a loss scale. After some bad steps in a
row an incident is recorded, and the run goes back. What incidents passed over stays passed over, whichever checkpoint is resumed.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from rdtf_ds.checkpoints.durable import replace_file
from rdtf_ds.data.step_plan import SamplePlan, StepPlan
from rdtf_ds.errors import UserError, on_every_rank
from rdtf_ds.exit_codes import DIVERGED

_CLIPS_SHOWN = 12
_log = logging.getLogger(__name__)


class Outcome(Protocol):
    """The part of a `StepOutcome` that is counted: see `rdtf_ds.training.engine`."""

    @property
    def applied(self) -> bool:
        """Whether the weights were updated."""

    @property
    def bad(self) -> bool:
        """Skipped for numbers that are not finite, and not in fp16's search for a loss scale."""

    @property
    def sample_losses(self) -> tuple[float, ...]:
        """Of each sample, in global batch order, as the plan has them."""


class NumbersWentBad(UserError):
    """Too many bad steps in a row, or weights that are not finite: the run must go back to a checkpoint.

    Attributes:
        first_step, last_step: The bad steps; ordinary overflows may lie between them.
        sample_numbers: To be passed over.
        clip_ids: Planned clips of these samples, aligned with them; empty where they are not known.
    """

    everywhere = True  # judged by gathered losses and votes

    def __init__(self, message: str, first_step: int, last_step: int, sample_numbers: Sequence[int], clip_ids: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.first_step, self.last_step = first_step, last_step
        self.sample_numbers, self.clip_ids = tuple(sample_numbers), tuple(clip_ids)


class Diverged(UserError):
    """Numbers went bad again after the run had gone back to the same checkpoint: another attempt would not help."""

    everywhere = True
    exit_code = DIVERGED


class BadSteps:
    """Counts bad steps in a row and remembers the samples to blame; on every rank alike.

    Args:
        limit: The bad step in a row at which the run must go back.

    Raises:
        ValueError: A limit below 1.
    """

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"the limit of bad steps must be at least 1, got {limit}")
        self._limit = limit
        self._steps: list[int] = []
        self._culprits: dict[int, int] = {}  # clip by sample number

    @property
    def count(self) -> int:
        """Bad steps since the last good one."""
        return len(self._steps)

    def observe(self, plan: StepPlan, outcome: Outcome) -> None:
        """Count one attempted step. A good one ends the row; one that fp16 skipped to lower its loss scale says nothing.

        Raises:
            NumbersWentBad: At the limit.
        """
        if not outcome.bad:
            if outcome.applied:
                self.reset()
            return
        self._steps.append(plan.step)
        self._culprits |= {sample.sample_number: sample.clip_id for sample in _culprits(plan, outcome)}
        if self.count >= self._limit:
            first, last = self._steps[0], self._steps[-1]
            raise NumbersWentBad(
                f"The numbers of {_steps(first, last)} were not finite: {self.count} bad step(s) in a row, which is "
                f"rdtf.watchdog.bad_steps. Try a lower rdtf.optimizer.learning_rate or more rdtf.optimizer.warmup_steps.",
                first,
                last,
                tuple(self._culprits),
                tuple(self._culprits.values()),
            )

    def reset(self) -> None:
        """Forget the row."""
        self._steps, self._culprits = [], {}

    def to_json(self) -> dict[str, Any]:
        """The row so far, for a checkpoint within it."""
        return {"steps": list(self._steps), "culprits": [list(culprit) for culprit in self._culprits.items()]}

    def restore(self, row: Mapping[str, Any]) -> None:
        """Take up a row as `to_json` gave it."""
        self._steps, self._culprits = list(row["steps"]), {number: clip_id for number, clip_id in row["culprits"]}


def _culprits(plan: StepPlan, outcome: Outcome) -> Sequence[SamplePlan]:
    """Samples whose loss is not finite; all of them if every loss is, as it is when gradients went bad."""
    guilty = [sample for sample, loss in zip(plan.samples, outcome.sample_losses, strict=True) if not math.isfinite(loss)]
    return guilty or plan.samples


@dataclass(frozen=True, slots=True)
class Incident:
    """Numbers went bad in steps ``first_step`` to ``last_step``, and the run went back to the checkpoint after ``checkpoint_step`` steps.

    Attributes:
        sample_numbers: Passed over from then on.
        where: What was not finite first, for people.
        clips: Files of these samples as planned, aligned with them; empty where they are not known.
    """

    checkpoint_step: int
    first_step: int
    last_step: int
    sample_numbers: tuple[int, ...]
    where: str
    clips: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A line of ``incidents.jsonl``."""
        return {**asdict(self), "sample_numbers": list(self.sample_numbers), "clips": list(self.clips)}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Incident:
        """The incident that `to_json` gave. ValueError if there is something else."""
        try:
            incident = cls(**{**entry, "sample_numbers": tuple(entry["sample_numbers"]), "clips": tuple(entry["clips"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"no incident: {error}") from error
        numbers = (incident.checkpoint_step, incident.first_step, incident.last_step, *incident.sample_numbers)
        if not all(type(number) is int for number in numbers):
            raise ValueError("no incident: steps and sample numbers must be whole numbers")
        return incident


class Incidents:
    """The incidents of a run, in order: a JSONL file in its folder, and a copy in each checkpoint. All ranks hold the same.

    Args:
        path: Of the file; what an earlier start recorded still holds.
        write: Whether this rank writes it.

    Raises:
        UserError: The file holds something else.
    """

    def __init__(self, path: Path, write: bool) -> None:
        self.path = path
        self._write = write
        self._incidents = _load(path)

    @property
    def all(self) -> tuple[Incident, ...]:
        """From the first to the last."""
        return tuple(self._incidents)

    @property
    def passed_over(self) -> dict[int, int]:
        """How often each sample was passed over, by sample number: what `PlanQueue` takes."""
        return dict(Counter(number for incident in self._incidents for number in incident.sample_numbers))

    def since(self, checkpoint_step: int) -> int:
        """How many incidents went back to the checkpoint of this step."""
        return sum(incident.checkpoint_step == checkpoint_step for incident in self._incidents)

    def add(self, incident: Incident) -> None:
        """Record an incident; it is on disk on return. A disk that refuses is an alarm: the next checkpoint holds a copy."""
        self._incidents.append(incident)
        self._save()

    def to_json(self) -> list[dict[str, Any]]:
        """The copy that travels in a checkpoint."""
        return [incident.to_json() for incident in self._incidents]

    def merge(self, copy: Sequence[Mapping[str, Any]]) -> None:
        """Take the longer of the file and a checkpoint's copy.

        Raises:
            UserError: Neither is the beginning of the other.
        """
        theirs = [Incident.from_json(entry) for entry in copy]
        known = min(len(self._incidents), len(theirs))
        if self._incidents[:known] != theirs[:known]:
            raise on_every_rank(
                UserError(
                    f"'{self.path}' tells of other incidents than the checkpoint does, so it is of another run or was changed. Put the "
                    f"run's own file back, or delete it: the checkpoint's copy takes its place."
                )
            )
        if len(theirs) > known:
            self._incidents = theirs
            self._save()

    def _save(self) -> None:
        if not self._write:
            return
        try:
            replace_file(self.path, "".join(json.dumps(entry) + "\n" for entry in self.to_json()).encode())
        except OSError as error:
            # Lost only if the run is killed before its next checkpoint, and then the same steps find the same again.
            _log.error("'%s' could not be written (%s); free some space or see that it may be written", self.path, error)


def _load(path: Path) -> list[Incident]:
    """Incidents of earlier starts; a last line cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines()
    incidents = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                _log.warning("the last line of '%s' was cut short and is left out", path)
                break
            raise _unreadable(path, number, str(error)) from error
        try:
            incidents.append(Incident.from_json(entry))
        except ValueError as error:
            raise _unreadable(path, number, str(error)) from error
    return incidents


def _unreadable(path: Path, line: int, reason: str) -> UserError:
    return UserError(
        f"Line {line} of '{path}' cannot be read ({reason}). Mend it, or delete the file: the checkpoint's copy takes its place."
    )


def go_back(
    incidents: Incidents,
    bad: NumbersWentBad,
    checkpoint_step: int,
    where: str,
    path_of: Callable[[int], str] = "clip {}".format,
) -> Incident:
    """Record that the run goes back to the checkpoint of ``checkpoint_step``; called by all ranks with the same arguments.

    Args:
        where: What was not finite first, as `first_nonfinite` found it on any rank.
        path_of: File of a clip id.

    Raises:
        Diverged: The run went back to this checkpoint before; nothing is recorded, so that another start ends here too.
    """
    clips = tuple(path_of(clip_id) for clip_id in bad.clip_ids)
    if incidents.since(checkpoint_step):
        before = [incident for incident in incidents.all if incident.checkpoint_step == checkpoint_step][-1]
        raise Diverged(
            f"Numbers went bad in {_steps(bad.first_step, bad.last_step)} ({where}), after the run had gone back to the checkpoint of step "
            f"{checkpoint_step} and passed over the samples of {_steps(before.first_step, before.last_step)} ({before.where}). "
            f"Clips this time: {_some(clips) or 'not known'}. The checkpoint is whole. Before you start again, lower "
            f"rdtf.optimizer.learning_rate or raise rdtf.optimizer.warmup_steps, and look at the clips above and at the samples "
            f"named in '{incidents.path}'."
        )
    incident = Incident(checkpoint_step, bad.first_step, bad.last_step, bad.sample_numbers, where, clips)
    incidents.add(incident)
    return incident


def _steps(first: int, last: int) -> str:
    return f"step {first}" if first == last else f"steps {first} to {last}"


def _some(clips: Sequence[str]) -> str:
    different = list(dict.fromkeys(clips))
    more = len(different) - _CLIPS_SHOWN
    return ", ".join(different[:_CLIPS_SHOWN]) + (f" and {more} more" if more > 0 else "")
