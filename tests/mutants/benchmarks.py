"""Wrongs of how what was measured is told."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

BENCHMARKS = (
    Mutant(
        name="a lower bar is read as an upper one",
        file="rdtf_ds/benchmarks/report.py",
        old="self.ratio >= self.bar if self.at_least",
        new="self.ratio <= self.bar if self.at_least",
        tests=("tests/benchmarks/test_report.py",),
    ),
)
