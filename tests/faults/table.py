"""The table of counts that `make soak` prints and keeps in ``docs/faults.md``."""

from __future__ import annotations

import os
from datetime import date
from pathlib import Path
from typing import NamedTuple

BEGIN, END = "<!-- table: make soak -->", "<!-- end of table -->"
_HEAD = ("test", "bar", "measured", "on")


class Row(NamedTuple):
    """One promise: what was done, what must come out, what did, and when and on what."""

    test: str
    bar: str
    measured: str
    on: str


class FaultTable:
    """Rows by test, in the order they were measured."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}

    def __call__(self, test: str, bar: str, measured: str) -> None:
        """Enter what came out of a test."""
        self.rows[test] = Row(test, bar, measured, f"{date.today().isoformat()}, {len(os.sched_getaffinity(0))} cores")

    def write(self, document: Path) -> None:
        """Put the rows between the document's marks; rows of tests that were not run this time stay as they are.

        Raises:
            ValueError: The document has no marks.
        """
        before, begin, rest = document.read_text(encoding="utf-8").partition(BEGIN)
        old, end, after = rest.partition(END)
        if not begin or not end:
            raise ValueError(f"{document} has no {BEGIN} ... {END}")
        rows = {row.test: row for row in _parse(old)} | self.rows
        document.write_text(f"{before}{BEGIN}\n{render(list(rows.values()))}{END}{after}", encoding="utf-8")


def render(rows: list[Row]) -> str:
    """Markdown."""
    lines = [_HEAD, ("---",) * len(_HEAD), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |\n" for line in lines)


def _parse(text: str) -> list[Row]:
    lines = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [Row(*cells) for cells in lines[2:] if len(cells) == len(_HEAD)]
