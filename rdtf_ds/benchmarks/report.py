"""What a benchmark says: rows of figures, each beside what it is compared with and the bar it is held to."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        name: What was measured or predicted.
        value: The median, in ``unit``.
        unit: Such as ``s``, ``TFLOP``, ``GB``.
        compared_with: Name of the peer or limit; None when the figure stands alone.
        ratio: Of ``value`` to the peer's.
        bar: The ratio's bound: at most, or at least where ``at_least``; None when nothing is asked of it.
        at_least: The bar is a lower bound.
        spread: (largest − smallest) / median of the repetitions; None for what is counted and not timed.
        predicted: Not measured.
    """

    name: str
    value: float
    unit: str
    compared_with: str | None = None
    ratio: float | None = None
    bar: float | None = None
    at_least: bool = False
    spread: float | None = None
    predicted: bool = False

    @property
    def holds(self) -> bool | None:
        """Whether the ratio keeps to its bar; None without a bar.

        Raises:
            ValueError: a bar without a ratio.
        """
        if self.bar is None:
            return None
        if self.ratio is None:
            raise ValueError(f"'{self.name}' has the bar {self.bar} and no ratio to hold against it")
        return self.ratio >= self.bar if self.at_least else self.ratio <= self.bar

    def to_json(self) -> dict[str, Any]:
        """Every attribute, and `holds`, whose ValueError it shares."""
        return {**asdict(self), "holds": self.holds}


def make_report(benchmark: str, rows: Iterable[Row], notes: Sequence[str] = (), **more: Any) -> dict[str, Any]:
    """A report as `rdtf_ds.benchmarks` describes it; ``more`` are further JSON-able keys."""
    return {"benchmark": benchmark, "machine": machine(), "rows": [row.to_json() for row in rows], "notes": list(notes), **more}


def machine() -> dict[str, Any]:
    """Where this process measures: kind of device, its name, torch's version and threads."""
    gpu = torch.cuda.is_available()
    return {
        "measured_on": "GPU" if gpu else "CPU",
        "name": torch.cuda.get_device_name() if gpu else _processor(Path("/proc/cpuinfo")),
        "host": platform.node(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _processor(cpuinfo: Path) -> str:
    """The CPU's name as Linux knows it, elsewhere its architecture."""
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def lines_of(report: Mapping[str, Any]) -> list[str]:
    """The report as text: the machine, one line for each row, the notes."""
    where = report["machine"]
    lines = [
        f"{report['benchmark']}: measured on {where['measured_on']} ({where['name']}, host {where['host']}), "
        f"torch {where['torch']}, {where['threads']} threads"
    ]
    width = max((len(row["name"]) for row in report["rows"]), default=0)
    lines += [f"  {row['name']:<{width}}  {_figure(row)}" for row in report["rows"]]
    return lines + [f"  ({note})" for note in report["notes"]]


def _figure(row: Mapping[str, Any]) -> str:
    text = f"{row['value']:.4g} {row['unit']}"
    if row["predicted"]:
        text += " (predicted)"
    if row["spread"] is not None:
        text += f" ± {50 * row['spread']:.0f} %"
    if row["ratio"] is not None:
        text += f", {row['ratio']:.3f} × {row['compared_with']}"
    if row["bar"] is not None:
        text += f", bar {'≥' if row['at_least'] else '≤'} {row['bar']:g}: {'holds' if row['holds'] else 'MISSED'}"
    return text
