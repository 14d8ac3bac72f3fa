"""What is evaluated: the tasks of the paper's Tables 1 and 2, which frames each gives to the model, and when two evaluations are one.

The paper shows masks of each task (Table 7) and does not say which of them its Table 2 used. We take the first of each task that the
table shows, and ``--visible`` takes others.

Legend: F frames of a clip, numbered from 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rdtf_ds.errors import UserError

STEPS = 25
"""DDIM steps of the paper's comparisons; its Table 6 has 50 for generation in general."""


@dataclass(frozen=True)
class TaskKind:
    """One of the paper's tables.

    Attributes:
        name: On the command line and as a folder.
        title: For people.
        table: Where the paper has it.
        paper: What it shows of RDTF there, by measure: other clips and other weights, so for orientation alone.
    """

    name: str
    title: str
    table: str
    paper: Mapping[str, float]

    def default_visible(self, frames: int) -> tuple[int, ...]:
        """Frames given to the model: i2v 10000000, interpolation 01010101, prediction 11111000 of eight, and likewise of fewer."""
        if self.name == "i2v":
            return (0,)
        if self.name == "interpolation":
            return tuple(range(1, frames, 2))
        return tuple(range(-(-5 * frames // 8)))


TASKS = {
    kind.name: kind
    for kind in (
        TaskKind("i2v", "Picture and text to clip", "Table 1", {"FVD": 442.18, "VQA": 0.502, "CLIP": 0.376}),
        TaskKind("interpolation", "Interpolation", "Table 2, left", {"FVD": 192.62, "VQA": 0.536}),
        TaskKind("prediction", "Prediction", "Table 2, right", {"FVD": 67.92, "VQA": 0.539}),
    )
}


@dataclass(frozen=True)
class Task:
    """A task as it is evaluated here: its kind, and the frames that are given, rising."""

    kind: TaskKind
    frames: int
    visible: tuple[int, ...]

    @property
    def name(self) -> str:
        """Of its kind."""
        return self.kind.name

    @property
    def mask(self) -> str:
        """A 1 for each frame that is given, a 0 for each that is made, as Table 7 writes them."""
        return "".join("01"[frame in self.visible] for frame in range(self.frames))

    @property
    def has_similarity(self) -> bool:
        """Whether CLIP similarity belongs to it: the paper's Table 2 has none."""
        return "CLIP" in self.kind.paper


def make_tasks(names: Sequence[str], frames: int, visible: Sequence[str] = ()) -> tuple[Task, ...]:
    """The tasks to evaluate, in the order of the paper's tables.

    Args:
        names: Of ``TASKS``.
        frames: F.
        visible: Texts such as ``interpolation=0,7``, in the place of a task's default.

    Raises:
        UserError: A name that is no task, a frame that there is not, or none left to make.
    """
    if unknown := [name for name in names if name not in TASKS]:
        raise UserError(f"--tasks {unknown[0]}: no such task. Choose from {', '.join(TASKS)}.")
    if not names:
        raise UserError(f"--tasks is empty. Choose from {', '.join(TASKS)}.")
    chosen: dict[str, tuple[int, ...]] = {}
    for text in visible:
        name, numbers = _read_visible(text, frames)
        if name in chosen:
            raise UserError(f"--visible names {name} twice.")
        chosen[name] = numbers
    if idle := [name for name in chosen if name not in names]:
        raise UserError(f"--visible {idle[0]}=…: that task is not evaluated; --tasks names {', '.join(names)}.")
    kinds = [kind for kind in TASKS.values() if kind.name in names]
    tasks = tuple(Task(kind, frames, chosen.get(kind.name, kind.default_visible(frames))) for kind in kinds)
    for task in tasks:
        if len(task.visible) == frames:
            raise UserError(f"{task.name} gives all {frames} frames and leaves none to make. Give fewer: --visible {task.name}=0.")
    return tasks


def _read_visible(text: str, frames: int) -> tuple[str, tuple[int, ...]]:
    name, equals, listed = text.partition("=")
    if not equals or name not in TASKS or not re.fullmatch(r"\d+(,\d+)*", listed):
        raise UserError(f"--visible {text}: write TASK=N,N,… with a task of {', '.join(TASKS)} and numbers of frames, the first is 0.")
    numbers = tuple(sorted({int(number) for number in listed.split(",")}))
    if numbers[-1] >= frames:
        raise UserError(f"--visible {text}: there is no frame {numbers[-1]}; the {frames} frames are numbered 0 to {frames - 1}.")
    if len(numbers) == frames:
        raise UserError(f"--visible {text}: all {frames} frames are given, so none is left to make. Leave at least one out.")
    return name, numbers


def differences(kept: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Where two evaluations' settings differ, one line each: ``steps: 25 there, 50 asked for``."""
    lines = []
    for key in sorted({*kept, *asked}):
        there, here = kept.get(key), asked.get(key)
        if there != here:
            lines.append(f"{key}: {_told(there)} there, {_told(here)} asked for")
    return lines


def _told(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_told(part)}" for name, part in value.items())
    return "nothing" if value is None else str(value)
