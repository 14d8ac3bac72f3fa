"""A memory plan as a picture: a stacked bar for each phase, its parts by category, and a line at the size of the card.

matplotlib is imported by the first picture, since it takes half a second and most processes make none; nothing global of it is used or
changed (no pyplot), so a picture can be made anywhere.
"""

from __future__ import annotations

import io
import textwrap
from typing import TYPE_CHECKING

from rdtf_ds.memory.report import CATEGORIES, Report, categories_of, told, unit_of, verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Paul Tol's "muted" and "light" schemes, told apart with any kind of colour vision; neighbours in a bar differ in lightness too.
_COLOURS = (
    "#332288", "#88CCEE", "#117733", "#DDCC77", "#882255", "#EE8866", "#AA4499", "#44AA99", "#999933", "#555555", "#DDDDDD", "#BBBBBB",
)  # fmt: skip
_MORE = ("#CC6677", "#77AADD", "#EEDD88", "#FFAABB")
"""Of categories that are not among the usual ones, in their order."""
_HATCHED = ("libraries", "allocator slack", "CUDA context")
"""What no tensor of ours accounts for."""
_TOO_SMALL = 0.035
"""Parts lower than this share of the picture get no number in them."""
_SIZE_INCHES, DPI = (11.0, 6.0), 100


def draw(report: Report) -> Figure:
    """The picture of a report."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE_INCHES, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    name, unit = unit_of(report)
    room, peak = report["gpu_bytes"] / unit, report["peak_bytes"] / unit
    # A line far above all bars would make them illegible: then it is only told of.
    in_picture = room <= 4 * peak
    axes.set_ylim(0, 1.12 * max(peak, room if in_picture else 0) or 1)
    _draw_bars(axes, report)
    axes.set_xlim(-1.4, len(report["phases"]) - 0.5)  # room for the line's name beside the bars
    if in_picture:
        axes.axhline(room, color="black", linewidth=1.5, linestyle="--")
        axes.text(-1.35, room, f"{textwrap.fill(report['gpu'], 14)}\n{told(report['gpu_bytes'])}", va="bottom", weight="bold")
    else:
        axes.text(-1.35, axes.get_ylim()[1], f"{report['gpu']}: {told(report['gpu_bytes'])}, far above", va="top", weight="bold")
    axes.set_ylabel(f"{name} of each rank, predicted")
    title = f"{report['parameters'] / 1e6:,.1f} M parameters on {report['gpus']} x {report['gpu']}, micro-batch {report['micro_batch']}"
    host = f"\nBeside that, CPU memory of each rank: {told(sum(report['host_bytes'].values()))}" if report["host_bytes"] else ""
    figure.suptitle(f"{title}\n{verdict(report)}{host}", fontsize="medium")
    return figure


def png(report: Report) -> tuple[bytes, int, int]:
    """The picture as a PNG file's bytes, its height and its width in pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    file, canvas = io.BytesIO(), FigureCanvasAgg(draw(report))
    canvas.print_png(file)  # type: ignore[no-untyped-call]
    width, height = canvas.get_width_height()
    return file.getvalue(), height, width


def _draw_bars(axes: Axes, report: Report) -> None:
    phases, lowest, unit = report["phases"], _TOO_SMALL * axes.get_ylim()[1], unit_of(report)[1]
    bottoms, digits = [0.0] * len(phases), 2 if unit == 1e9 else 0
    for category, colour in _coloured(categories_of(report)):
        heights = [phase["bytes"].get(category, 0) / unit for phase in phases]
        hatch = "////" if category in _HATCHED else None
        axes.bar(range(len(phases)), heights, 0.72, bottoms, label=category, color=colour, edgecolor="white", linewidth=0.7, hatch=hatch)
        for number, height in enumerate(heights):
            if height > lowest:
                middle = bottoms[number] + height / 2
                text = axes.text(number, middle, f"{height:.{digits}f}", ha="center", va="center", fontsize="small")
                text.set(color=_readable_on(colour), bbox={"facecolor": colour, "edgecolor": "none", "pad": 1})
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for number, total in enumerate(bottoms):
        weight = "bold" if phases[number]["name"] == report["peak_phase"] else "normal"
        axes.text(number, total, f"{total:.{digits}f}", ha="center", va="bottom", weight=weight)
    axes.set_xticks(range(len(phases)), [phase["name"] for phase in phases])
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _coloured(categories: list[str]) -> list[tuple[str, str]]:
    """Each category's own colour: the same in every picture for the usual ones."""
    usual = dict(zip(CATEGORIES, _COLOURS, strict=True))
    others = [category for category in categories if category not in usual]
    more = {category: _MORE[number % len(_MORE)] for number, category in enumerate(others)}
    return [(category, usual.get(category) or more[category]) for category in categories]


def _readable_on(colour: str) -> str:
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"
