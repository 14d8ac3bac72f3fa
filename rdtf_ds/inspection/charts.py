"""Small charts as inline SVG: bars and bubbles, drawn for a width of 340 so that their text stays legible on a phone.

Colours come from the page's style sheet, by class, so that they follow light and dark mode. Every text is escaped here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, sqrt

from markupsafe import Markup, escape

WIDTH, HEIGHT = 340, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 8, 10, 36
_BUBBLE = 11.0
"""Radius of the largest bubble."""
_LABELS = 7
"""About as many labels as fit below the bars."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of a histogram: its label below, how high it is, and what it says when pointed at."""

    label: str
    value: float
    tip: str


@dataclass(frozen=True, slots=True)
class Bubble:
    """``count`` things at (x, y)."""

    x: float
    y: float
    count: int
    tip: str


def bar_chart(bars: Sequence[Bar], x_title: str, y_title: str) -> Markup:
    """Upright bars of equal width, in order; not all are labelled where there are many."""
    if not bars:
        return Markup('<p class="none">nothing to show</p>')
    ticks = nice_ticks(max(bar.value for bar in bars))
    step = (WIDTH - _LEFT - _RIGHT) / len(bars)
    every = -(-len(bars) // _LABELS)
    parts = list(_value_axis(ticks))
    for number, bar in enumerate(bars):
        x, y = _LEFT + number * step, _height_at(bar.value, ticks[-1])
        height = HEIGHT - _BOTTOM - y
        gap = min(2.0, step * 0.15)
        parts.append(
            Markup('<rect class="bar" x="{:.2f}" y="{:.2f}" width="{:.2f}" height="{:.2f}"><title>{}</title></rect>').format(
                x + gap / 2, y, step - gap, height, bar.tip
            )
        )
        if number % every == 0:
            parts.append(_text(x + step / 2, HEIGHT - _BOTTOM + 13, bar.label))
    return _svg(parts, x_title, y_title)


def bubble_chart(bubbles: Sequence[Bubble], x_title: str, y_title: str) -> Markup:
    """Points whose area is their count, the largest drawn first, on axes from 0."""
    if not bubbles:
        return Markup('<p class="none">nothing to show</p>')
    across, up = nice_ticks(max(bubble.x for bubble in bubbles)), nice_ticks(max(bubble.y for bubble in bubbles))
    largest = max(bubble.count for bubble in bubbles)
    span = WIDTH - _LEFT - _RIGHT - _BUBBLE
    parts = list(_value_axis(up))
    parts += [_text(_LEFT + span * tick / across[-1], HEIGHT - _BOTTOM + 13, short(tick)) for tick in across]
    for bubble in sorted(bubbles, key=lambda bubble: -bubble.count):
        x, y = _LEFT + span * bubble.x / across[-1], _height_at(bubble.y, up[-1])
        radius = max(2.5, _BUBBLE * sqrt(bubble.count / largest))
        circle = Markup('<circle class="bubble" cx="{:.2f}" cy="{:.2f}" r="{:.2f}"><title>{}</title></circle>')
        parts.append(circle.format(x, y, radius, bubble.tip))
    return _svg(parts, x_title, y_title)


def nice_ticks(largest: float) -> list[float]:
    """0 and up to five more round numbers (1, 2 or 5 times a power of ten apart, at least 1), the last at or above ``largest``."""
    step = 1.0
    while step * 5 < largest:
        step *= 2.5 if f"{step:.0e}".startswith("2") else 2
    return [step * number for number in range(max(1, ceil(largest / step)) + 1)]


def short(value: float) -> str:
    """A number for an axis: 0.5, 12, 1.2k, 3M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def _height_at(value: float, top: float) -> float:
    return HEIGHT - _BOTTOM - (HEIGHT - _BOTTOM - _TOP) * value / top


def _value_axis(ticks: Sequence[float]) -> Iterator[Markup]:
    for tick in ticks:
        y = _height_at(tick, ticks[-1])
        yield Markup('<line class="grid" x1="{}" x2="{}" y1="{:.2f}" y2="{:.2f}"/>').format(_LEFT, WIDTH - _RIGHT, y, y)
        yield _text(_LEFT - 5, y + 3.5, short(tick), "end")


def _text(x: float, y: float, text: str, anchor: str = "middle") -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, text)


def _svg(parts: Sequence[Markup], x_title: str, y_title: str) -> Markup:
    titles = _text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 6, x_title)
    body = Markup("").join(parts)
    label = escape(f"{y_title} by {x_title}")
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}{}</svg>').format(
        WIDTH, HEIGHT, label, body, titles
    )
