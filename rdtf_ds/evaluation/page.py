"""An evaluation as one HTML page that needs nothing else: its tables, and real clips beside the made ones, frame by frame in step.

All that comes from the user's files is escaped by the template; the page's policy lets no script run but the one whose hash it names.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from rdtf_ds.evaluation.clip_making import REAL, Making, read_clip
from rdtf_ds.evaluation.tables import Report, explanations, facts, given, heading, lacking, name_of, notes_of, shown

FRAME_MS = 120
_SIDE, _SMALL, _QUALITY = 160, 96, 80
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Strip:
    """One clip's frames side by side.

    Attributes:
        where: A task's name, or ``real``.
        title: For people.
        given: A mark for each frame: was it given to the model?
        sheet: ``data:`` address of a WebP picture.
    """

    where: str
    title: str
    given: tuple[bool, ...]
    sheet: str


@dataclass(frozen=True)
class ClipView:
    """A real clip and what was made of it."""

    caption: str
    path: str
    strips: tuple[Strip, ...]


def view_clips(making: Making, count: int) -> list[ClipView]:
    """The first clips of the test set, which are as good as drawn."""
    views = []
    for clip in making.clips[:count]:
        strips = [Strip(REAL, "real", (), frame_sheet(read_clip(making, REAL, clip)))]
        for task in making.tasks:
            marks = tuple(frame in task.visible for frame in range(task.frames))
            strips.append(Strip(task.name, task.kind.title, marks, frame_sheet(read_clip(making, task.name, clip))))
        views.append(ClipView(clip.caption, clip.path, tuple(strips)))
    return views


def frame_sheet(frames: np.ndarray) -> str:
    """All frames in a row, small enough for a page: uint8 (F, S, S, 3) -> a ``data:`` address. Tiny ones are enlarged by whole pixels."""
    times = max(1, _SMALL // frames.shape[1])
    frames = frames.repeat(times, axis=1).repeat(times, axis=2)
    side = min(_SIDE, frames.shape[1])
    sheet = Image.new("RGB", (side * len(frames), side))
    for number, frame in enumerate(frames):
        sheet.paste(Image.fromarray(frame).resize((side, side), Image.Resampling.BICUBIC), (number * side, 0))
    buffer = BytesIO()
    sheet.save(buffer, "WEBP", quality=_QUALITY, method=3)
    return "data:image/webp;base64," + b64encode(buffer.getvalue()).decode("ascii")


def render(report: Report, clips: Sequence[ClipView]) -> str:
    """The whole page."""
    templates = Environment(loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined)
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    return templates.get_template("page.html").render(
        model=report.model,
        facts=list(facts(report)),
        lacking=list(lacking(report)),
        tables=[
            {
                "heading": heading(table.task),
                "given": given(table.task, report),
                "rows": [(name_of(figure), *(shown(figure, column) for column in ("model", "real", "paper"))) for figure in table.figures],
                "notes": notes_of(table, report),
            }
            for table in report.tables
        ],
        explanations=list(explanations(report)),
        tasks=[table.task for table in report.tables],
        clips=clips,
        of=len(report.clips.clips),
        frames=report.settings["frames"],
        frame_ms=FRAME_MS,
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash="sha256-" + b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
