"""The command: one JSON object, text, exit codes."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from rdtf_ds.benchmarks.report import Row, make_report
from rdtf_ds.errors import UserError
from tests.small_models import load_tool

ROOT = Path(__file__).resolve().parents[2]


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str):
    tool = load_tool(ROOT, "benchmark")
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    return tool


def test_json_is_all_that_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "attention", "--size", "tiny", "--frames", "2", "--repetitions", "1", "--json").main() == 0
    report = json.loads(capsys.readouterr().out)
    assert report["benchmark"] == "attention" and report["machine"]["measured_on"] in ("CPU", "GPU")
    assert {"name", "value", "unit", "compared_with", "ratio", "bar", "holds"} <= set(report["rows"][0])


@pytest.mark.parametrize(("ratio", "code", "word"), [(0.6, 0, "holds"), (0.8, 1, "MISSED")])
def test_a_missed_bar_is_told_and_is_exit_code_1(monkeypatch, capsys, ratio: float, code: int, word: str) -> None:
    tool = command(monkeypatch, "trim")
    module = importlib.import_module("rdtf_ds.benchmarks.trim")

    def run(arguments):
        print("a library's chatter")
        return make_report("trim", [Row("step", 1.0, "s", "padded", ratio, 0.7)])

    monkeypatch.setattr(module, "run", run)
    assert tool.main() == code
    out = capsys.readouterr().out
    assert out.startswith("trim: measured on") and word in out and "chatter" not in out


def test_wrong_input_is_one_paragraph_and_exit_code_2(monkeypatch, capsys) -> None:
    from rdtf_ds.benchmarks import trim

    def run(arguments):
        raise UserError("no such thing")

    monkeypatch.setattr(trim, "run", run)
    assert command(monkeypatch, "trim").main() == 2
    assert capsys.readouterr().err.strip().endswith("no such thing")


def test_every_benchmark_has_the_same_two_functions(monkeypatch) -> None:
    tool = command(monkeypatch)
    names = ["forward", "train_step", "attention", "trim", "memory", "index", "loader", "fvd", "export", "guidance", "samplers"]
    assert list(tool.BENCHMARKS) == names
    with pytest.raises(SystemExit) as stopped:
        tool.main()
    assert stopped.value.code == 2
