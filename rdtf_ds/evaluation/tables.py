"""What an evaluation found, as JSON and as Markdown: the same bytes for the same clips, but for ``timing``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rdtf_ds.evaluation.measures import Figure
from rdtf_ds.evaluation.protocol import Task
from rdtf_ds.evaluation.test_set import RealClips

NOTHING = "—"
_FORMAT = 1
_DECIMALS = {"FVD": 1, "VQA": 3, "CLIP": 3}
_SIGNS = {True: "↓", False: "↑"}
_MARKUP = str.maketrans({character: f"\\{character}" for character in "\\`*_[]<>|#$~"})


@dataclass(frozen=True)
class Table:
    """One of the paper's tables, of this model."""

    task: Task
    figures: Sequence[Figure]


@dataclass(frozen=True)
class Report:
    """An evaluation.

    Attributes:
        model: What people call it.
        data: Likewise.
        clips: The test set.
        settings: What the clips were made with, as `protocol.differences` compares it.
        tables: In the order of the paper's.
        variants: By measure, what its figures are made of.
        missing: By measure, which file it would have needed.
        timing: Seconds and the like; the only part that differs from run to run.
    """

    model: str
    data: str
    clips: RealClips
    settings: Mapping[str, Any]
    tables: Sequence[Table]
    variants: Mapping[str, str]
    missing: Mapping[str, str]
    timing: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All of it, for programs."""
        return {
            "format": _FORMAT,
            "model": self.model,
            "data": self.data,
            "test_set": {
                "clips": len(self.clips.clips),
                "of": self.clips.of,
                "held_out": self.clips.held_out,
                "too_short": self.clips.too_short,
                "without_caption": self.clips.without_caption,
                "fingerprint": self.clips.fingerprint,
            },
            "settings": dict(self.settings),
            "tables": [
                {
                    "task": table.task.name,
                    "table": table.task.kind.table,
                    "visible": list(table.task.visible),
                    "figures": [asdict(figure) | {"lower_is_better": figure.lower_is_better} for figure in table.figures],
                }
                for table in self.tables
            ],
            "variants": dict(self.variants),
            "missing": dict(self.missing),
            "timing": dict(self.timing),
        }

    def json_text(self) -> str:
        """`to_json` as a file has it."""
        return json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n"


def markdown(report: Report) -> str:
    """The tables for people, each with what its numbers hang on."""
    lines = [f"# Evaluation of {report.model.translate(_MARKUP)}", ""]
    lines += [*(f"- {line.translate(_MARKUP)}" for line in (*facts(report), *lacking(report))), ""]
    for table in report.tables:
        lines += [f"## {heading(table.task)}", "", f"{given(table.task, report)}", ""]
        lines += ["| | this model | real clips | paper's RDTF |", "| --- | ---: | ---: | ---: |"]
        for figure in table.figures:
            lines.append(f"| {name_of(figure)} | {shown(figure, 'model')} | {shown(figure, 'real')} | {shown(figure, 'paper')} |")
        notes = notes_of(table, report)
        lines += ["", *(f"- {note.translate(_MARKUP)}" for note in notes), *([""] if notes else [])]
    lines += ["## What the figures are made of", "", *(f"- {line.translate(_MARKUP)}" for line in explanations(report)), ""]
    return "\n".join(lines)


def heading(task: Task) -> str:
    """Of a table."""
    return f"{task.kind.title} ({task.kind.table})"


def given(task: Task, report: Report) -> str:
    """What the model had, and whether that stands in its clips."""
    frames = ", ".join(map(str, task.visible))
    plural = "s" if len(task.visible) > 1 else ""
    caption = " and the caption" if report.clips.captioned else ", no caption"
    return f"Given: frame{plural} {frames} of {task.frames} ({task.mask}){caption}; {report.settings['given frames']}."


def name_of(figure: Figure) -> str:
    """A row's first cell."""
    return f"{figure.name} {_SIGNS[figure.lower_is_better]}"


def shown(figure: Figure, column: str) -> str:
    """A cell: ``model``, ``real`` or ``paper`` of a figure."""
    value: float | None = getattr(figure, column)
    if value is None:
        return NOTHING
    decimals = _DECIMALS[figure.measure] if column != "paper" else {"FVD": 2}.get(figure.measure, 3)
    text = f"{value:z.{decimals}f}"  # z: no -0.0, which rounding makes of a distance of 0
    if figure.spread is not None and column != "paper":
        text += f" ±\u00a0{figure.spread[0 if column == 'model' else 1]:.{decimals}f}"
    return text


def facts(report: Report) -> Iterator[str]:
    """Model, test set and settings, a line each."""
    clips, settings = report.clips, report.settings
    yield f"Model: {report.model}, {settings['model']}"
    kind = "held out from training" if clips.held_out else "not held out: the model may have been trained on them"
    yield f"Real clips: {len(clips.clips)} of {clips.of} in {report.data}, {kind}; seed {settings['seed']}, test set {clips.fingerprint}"
    left_out = [f"{count} {why}" for count, why in ((clips.too_short, "too short"), (clips.without_caption, "without a caption")) if count]
    if left_out:
        yield f"Left out: {', '.join(left_out)}"
    scales = f"text {settings['text_scale']:g}, image {settings['image_scale']:g}"
    threads = f"{settings['threads']} thread{'s' * (settings['threads'] != 1)}"
    noise = "" if settings["eta"] is None else f", η {settings['eta']:g}"
    yield (
        f"Clips: {settings['frames']} frames of {settings['image size']} px; {settings['sampler']}, {settings['steps']} steps{noise}, "
        f"guidance {scales}; {settings['device']}, {settings['dtype']}, {threads}, batches of {settings['batch']}"
    )


def lacking(report: Report) -> Iterator[str]:
    """What is not measured, and for want of what."""
    for measure, told in report.missing.items():
        yield f"{measure} is not measured: {told}"


def notes_of(table: Table, report: Report) -> list[str]:
    """What there is to say below a table: why a figure is missing, where `lacking` does not say it for all tables."""
    return [note for note in dict.fromkeys(figure.note for figure in table.figures) if note and note not in report.missing.values()]


def explanations(report: Report) -> Iterator[str]:
    """What each measure is made of here."""
    for measure, told in report.variants.items():
        yield f"{measure}: {told}"
    yield (
        "Real clips: what they would get themselves. FVD falls with the number of clips N, so a distance says something only beside "
        "another at the same N; a row of N others, and that of N without end, hold half of the made clips against the real clips of the "
        "other half. Such a limit may end a little below 0; how far, the real clips' own shows."
    )
    yield (
        "Paper's RDTF: other clips, other networks and preprocessing; for orientation, not for comparison. The paper's CLIP figure is "
        "taken to be the share among all captions."
    )
