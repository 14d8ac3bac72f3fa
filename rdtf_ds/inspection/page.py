"""The report as one HTML page that needs nothing else: no network, no other file, and no script or style but its own.

All that comes from the user's files (paths, captions, reasons) is escaped by the template; the page's policy lets no script run but the
one whose hash it names.
"""

from __future__ import annotations

import hashlib
import json
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rdtf_ds.diffusion.masks import Task, mask_family
from rdtf_ds.inspection.charts import Bar, Bubble, bar_chart, bubble_chart, short
from rdtf_ds.inspection.histograms import Histogram, histogram
from rdtf_ds.inspection.survey import Survey
from rdtf_ds.inspection.variety import ALL_K
from rdtf_ds.inspection.views import ClipView

_HERE = Path(__file__).parent
_TASKS = {Task.INTERPOLATION: "interpolation", Task.PREDICTION: "prediction before or after", Task.GENERATION: "generation"}
_TILES = {
    "files": "clips", "trainable": "to train on", "held_out": "held out", "static": "static", "duplicates": "duplicates",
    "broken": "broken", "without_caption": "without caption",
}  # fmt: skip


def render(survey: Survey, clips: Sequence[ClipView], seed: int) -> str:
    """The whole page."""
    templates = Environment(loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined)
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    return templates.get_template("page.html").render(
        name=Path(survey.root).resolve().name or survey.root,
        survey=survey,
        clips=clips,
        seed=seed,
        tiles=[
            {"label": label, "value": survey.counts[name], "bad": name == "broken" and survey.counts[name] > 0}
            for name, label in _TILES.items()
        ],
        charts=_charts(survey),
        notes=_notes(survey),
        formats=[{"label": name, "value": count, "percent": 100 * count / survey.intact} for name, count in survey.formats.items()],
        ks=list(ALL_K),
        tasks=[{"name": task.value, "title": title} for task, title in _TASKS.items()],
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash="sha256-" + b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=for_script({"masks": masks(), "clips": [_data(number, clip) for number, clip in enumerate(clips) if not clip.problem]}),
    )


def for_script(data: Any) -> Markup:
    """JSON that may stand inside a script element: nothing in it can end that or begin a comment."""
    text = json.dumps(data, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def masks() -> dict[int, dict[str, list[str]]]:
    """Every condition mask by k and task, as a 1 for each frame the model sees and a 0 for each it makes."""
    return {k: {task.value: ["".join("01"[visible] for visible in mask) for mask in mask_family(task, k)] for task in Task} for k in ALL_K}


def _data(number: int, clip: ClipView) -> dict[str, Any]:
    draws = {
        k: [{"clusters": "".join(map(str, draw.clusters)), "frames": draw.frames} for draw in drawn] for k, drawn in clip.draws.items()
    }
    return {"card": f"clip-{number}", "frames": clip.frames, "columns": clip.columns, "rows": clip.rows, "draws": draws}


def _charts(survey: Survey) -> dict[str, Markup]:
    frames = histogram(list(survey.frame_counts), list(survey.frame_counts.values()), whole=True)
    return {
        "frames": _bars(frames, "frames", whole=True),
        "sizes": bubble_chart(
            [Bubble(width, height, count, f"{width} × {height}: {_clips(count)}") for (width, height), count in survey.sizes.items()],
            "width",
            "height",
        ),
        "seconds": _bars(survey.seconds, "seconds"),
        "rates": _bars(survey.frames_per_second, "frames per second"),
        "bytes": _bars(survey.bytes, "bytes", told=in_bytes),
        "words": _bars(survey.words, "words", whole=True),
    }


def _bars(shown: Histogram, title: str, whole: bool = False, told: Callable[[float], str] = short) -> Markup:
    bars = []
    for number, count in enumerate(shown.counts):
        low, high = shown.edges[number], shown.edges[number + 1]
        last = number == len(shown.counts) - 1
        if shown.open_end and last:
            label, span = f"≥{told(low)}", f"{low:g} or more"
        elif whole and high - low == 1:
            label = span = f"{low:g}"
        else:
            label, span = told(low), f"{low:,.10g} to {high - 1:,.10g}" if whole else f"{low:,.10g} to {high:,.10g}"
        bars.append(Bar(label, count, f"{span} {title}: {_clips(count)}"))
    return bar_chart(bars, title, "clips")


def in_bytes(value: float) -> str:
    """A power of two of bytes for an axis: 512 B, 8 KiB, 1 MiB."""
    for limit, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= limit:
            return f"{value / limit:g} {unit}"
    return f"{value:g} B"


def _clips(count: int) -> str:
    return f"{count:,} clip{'s' * (count != 1)}"


def _notes(survey: Survey) -> Mapping[str, str]:
    """A line below each chart that needs one."""
    counts, intact = survey.frame_counts, survey.intact
    timed, captioned = sum(survey.seconds.counts), sum(survey.words.counts)
    return {
        "frames": f"{min(counts)} to {max(counts)}, median {median(counts):g}" if counts else "",
        "sizes": _most_common_size(survey),
        "seconds": f"{_clips(intact - timed)} with one frame or without times" if timed < intact else "",
        "bytes": "each bar twice as many as the one before",
        "alpha": f"{survey.with_alpha / intact:.0%} with transparency" if intact else "",
        "words": f"of {captioned:,} captions" if captioned else "",
        "frequent": f"so many different words that each may have come {missed:,} times more" if (missed := survey.words_short) else "",
        "variety": _measured(survey),
    }


def _most_common_size(survey: Survey) -> str:
    if not survey.sizes:
        return ""
    width, height = max(survey.sizes, key=survey.sizes.__getitem__)
    left_out = survey.distinct_sizes - len(survey.sizes)
    return f"most often {width} × {height}" + (f"; {left_out:,} rarer sizes are not shown" if left_out > 0 else "")


def _measured(survey: Survey) -> str:
    if not survey.variety:
        return ""
    return f"; clips with more than k frames, {survey.variety_clips:,} of {survey.counts['trainable']:,} looked at"


def median(counts: Mapping[int, int]) -> float:
    """Of values given as how often each comes, rising."""
    total, seen, below = sum(counts.values()), 0, None
    for value, count in counts.items():
        seen += count
        if below is not None:
            return (below + value) / 2
        if 2 * seen > total:
            return value
        if 2 * seen == total:
            below = value
    raise ValueError("no values have no median")
