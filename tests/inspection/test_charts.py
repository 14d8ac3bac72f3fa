"""Charts: well-formed SVG whose bars are as high as they should be, with nobody else's markup in it."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdtf_ds.inspection.charts import HEIGHT, WIDTH, Bar, Bubble, bar_chart, bubble_chart, nice_ticks, short


def test_bars_are_proportional_and_say_what_they_are():
    svg = ElementTree.fromstring(bar_chart([Bar("a", 10, "ten"), Bar("b", 5, "five"), Bar("c", 0, "none")], "letters", "clips"))
    bars = svg.findall("rect")
    heights = [float(bar.attrib["height"]) for bar in bars]
    assert heights[0] == pytest.approx(2 * heights[1], abs=0.02) and heights[2] == 0
    assert [bar.findtext("title") for bar in bars] == ["ten", "five", "none"]
    bottoms = {round(float(bar.attrib["y"]) + float(bar.attrib["height"]), 1) for bar in bars}
    assert len(bottoms) == 1, "all stand on one line"
    starts = [float(bar.attrib["x"]) for bar in bars]
    assert starts == sorted(starts) and starts[-1] + float(bars[-1].attrib["width"]) <= WIDTH
    assert {"a", "b", "c", "letters"} <= {text.text for text in svg.findall("text")}
    assert svg.attrib["aria-label"] == "clips by letters"


def test_many_bars_are_not_all_labelled():
    svg = ElementTree.fromstring(bar_chart([Bar(f"n{number}", 1, "") for number in range(40)], "n", "clips"))
    labels = [text.text for text in svg.findall("text") if (text.text or "").startswith("n") and text.text != "n"]
    assert labels[0] == "n0" and 4 <= len(labels) <= 8


def test_bubbles_lie_where_they_should():
    svg = ElementTree.fromstring(bubble_chart([Bubble(100, 50, 4, "wide"), Bubble(50, 100, 1, "tall")], "width", "height"))
    wide, tall = svg.findall("circle")
    assert wide.findtext("title") == "wide" and float(wide.attrib["r"]) == pytest.approx(2 * float(tall.attrib["r"]))
    assert float(wide.attrib["cx"]) > float(tall.attrib["cx"]) and float(wide.attrib["cy"]) > float(tall.attrib["cy"])
    assert all(0 < float(circle.attrib["cy"]) < HEIGHT for circle in (wide, tall))


def test_texts_are_escaped():
    for chart in (bar_chart([Bar("</text>", 1, "<b>")], '"x"', "<y>"), bubble_chart([Bubble(1, 1, 1, "<script>")], "&", "'")):
        svg = ElementTree.fromstring(chart)
        assert {element.tag for element in svg.iter()} <= {"svg", "rect", "circle", "line", "text", "title"}


def test_nothing_to_draw_is_said():
    assert bar_chart([], "x", "y") == bubble_chart([], "x", "y") == '<p class="none">nothing to show</p>'


@given(st.floats(0, 1e9))
def test_ticks_are_few_and_reach_the_top(largest):
    ticks = nice_ticks(largest)
    assert 2 <= len(ticks) <= 6 and ticks[0] == 0 and ticks[-1] >= largest
    assert len(ticks) == 2 or ticks[-2] < largest
    assert f"{ticks[1]:.0e}"[0] in "125" and ticks[1] >= 1


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (0.5, "0.5"), (999, "999"), (1000, "1k"), (1500, "1.5k"), (2e6, "2M"), (3e9, "3G")])
def test_short_numbers(value, text):
    assert short(value) == text
