"""Rows keep to their bars or say that they do not."""

from __future__ import annotations

import json

import pytest
import torch

from rdtf_ds.benchmarks.report import Row, lines_of, machine, make_report


@pytest.mark.parametrize(
    ("ratio", "bar", "at_least", "holds"),
    [(0.7, 0.7, False, True), (0.71, 0.7, False, False), (0.85, 0.85, True, True), (0.84, 0.85, True, False), (0.5, None, False, None)],
)
def test_a_row_holds_to_its_bar(ratio: float, bar: float | None, at_least: bool, holds: bool | None) -> None:
    assert Row("x", 1.0, "s", "peer", ratio, bar, at_least).holds is holds


def test_a_bar_needs_a_ratio() -> None:
    with pytest.raises(ValueError, match="'x' has the bar 0.5"):
        _ = Row("x", 1.0, "s", bar=0.5).holds


def test_a_report_is_json_and_text() -> None:
    rows = [
        Row("forward", 5.139, "s", "I2VGenXLUNet", 0.661, 0.70, spread=0.08),
        Row("rate", 316.7, "GFLOP/s", "limit", 0.7, 0.75, at_least=True),
        Row("peak", 703.0, "MB", predicted=True),
    ]  # fmt: skip
    report = make_report("forward", rows, ["a note"], seconds=3)
    assert json.loads(json.dumps(report)) == report and report["seconds"] == 3
    assert [row["holds"] for row in report["rows"]] == [True, False, None]
    first, *lines, note = lines_of(report)
    assert first.startswith("forward: measured on CPU (") and f"torch {torch.__version__}, {torch.get_num_threads()} threads" in first
    assert lines == [
        "  forward  5.139 s ± 4 %, 0.661 × I2VGenXLUNet, bar ≤ 0.7: holds",
        "  rate     316.7 GFLOP/s, 0.700 × limit, bar ≥ 0.75: MISSED",
        "  peak     703 MB (predicted)",
    ]
    assert note == "  (a note)"


def test_the_machine_has_a_name() -> None:
    where = machine()
    assert where["measured_on"] == ("GPU" if torch.cuda.is_available() else "CPU")
    assert where["name"] and where["threads"] == torch.get_num_threads()
