"""The benchmark of guidance counts its passes and holds the batched three to their bar."""

from __future__ import annotations

import argparse

import pytest

from rdtf_ds.benchmarks import guidance


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    guidance.add_arguments(parser)
    return parser.parse_args(given)


def test_three_passes_are_compared_with_one():
    small = ("--widths", "64", "--side", "4", "--frames", "2", "--steps", "1", "--all")
    report = guidance.run(arguments(*small))
    rows = {row["name"]: row for row in report["rows"] if row["unit"] == "s"}
    assert list(rows) == ["1 steps, one pass", "1 steps, three passes", "1 steps, two passes", "1 steps, one pass, scales 0"]
    three = rows["1 steps, three passes"]
    assert three["bar"] == 3.0 and not three["at_least"] and three["compared_with"] == "one pass"
    assert three["ratio"] == pytest.approx(three["value"] / rows["1 steps, one pass"]["value"])
    assert all(row["bar"] is None for name, row in rows.items() if row is not three)
    assert any(row["unit"] == "processor s" and row["ratio"] for row in report["rows"])


def test_passes_that_are_not_made_are_noticed(monkeypatch):
    monkeypatch.setitem(guidance.SCALES, "three passes", (7.5, 7.5))  # two passes give the same
    with pytest.raises(AssertionError, match="three passes: 2 rows"):
        guidance.run(arguments("--widths", "64", "--side", "4", "--frames", "2", "--steps", "1"))
