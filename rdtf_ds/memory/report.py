"""A memory plan as people and programs read it: lines of text, and a dictionary for JSON.

GB are 10^9 bytes; a small plan is told in MB, all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rdtf_ds.memory.host_levers import smallest_changes_on_cpu
from rdtf_ds.memory.levers import largest_micro_batch, smallest_changes
from rdtf_ds.memory.planner import MemoryPlan, Sources
from rdtf_ds.memory.video_decoders import LARGE_BYTES, RESIDENT_BYTES
from rdtf_ds.wording import counted

CATEGORIES = (
    "weights", "masters", "moments", "EMA", "gradients", "buckets", "fp32 working copies", "activations", "encoders",
    "libraries", "allocator slack", "CUDA context",
)  # fmt: skip
"""The order in which they are shown; others follow, by name."""
NOT_TENSORS = ("allocator slack", "CUDA context")
"""What the planner adds for a card, and PyTorch's statistics of tensors do not count."""

Report = dict[str, Any]


@dataclass(frozen=True)
class Limit:
    """What a plan is held against: a name such as a card's, and the bytes one rank may take."""

    name: str
    bytes: int


def report_of(made: MemoryPlan, sources: Sources, assumed: Sequence[str], limit: Limit | None = None, what_if: bool = True) -> Report:
    """All that is printed, JSON-able.

    Args:
        assumed: Encoders whose size is Table 6's, for want of them.
        limit: The memory there is; that of the plan's own card unless it says otherwise.
        what_if: Look for the largest micro-batch too, which takes some traces more.
    """
    if limit is None:
        assert made.gpu is not None, "a plan for no card needs a limit"
        limit = Limit(made.gpu.name, made.gpu.bytes)
    groups, margin = sources.groups(made.setup.group_size), limit.bytes - made.peak.total
    report: Report = {
        "predicted": True,
        "gpu": limit.name,
        "gpus": made.setup.ranks,
        "gpu_bytes": limit.bytes,
        "parameters": sum(sum(group.sizes) for group in groups),
        "groups": len(groups),
        "micro_batch": made.setup.micro_batch,
        "accumulation": made.setup.accumulation,
        "phases": [{"name": phase.name, "total": phase.total, "bytes": phase.bytes} for phase in made.phases],
        "peak_phase": made.peak.name,
        "peak_bytes": made.peak.total,
        "margin_bytes": margin,
        "margin": margin / limit.bytes if limit.bytes else -1.0,
        "fits": margin >= 0,
        "host_bytes": made.host,
        "seconds": made.seconds,
        "video_decoders": {"processes": made.setup.video_decoders, "bytes_each": RESIDENT_BYTES, "large_bytes_each": LARGE_BYTES},
        "largest_micro_batch": None,
        "changes": None,
        "assumed_encoders": list(assumed),
    }
    if made.gpu is not None and what_if:
        report["largest_micro_batch"] = largest_micro_batch(made.setup, sources, made.gpu)
    if not report["fits"]:
        report["changes"] = _changes(made, sources, limit)
    return report


def _changes(made: MemoryPlan, sources: Sources, limit: Limit) -> Report | None:
    """The smallest set of changes with which it would fit."""
    if made.gpu is not None:
        on_card = smallest_changes(made.setup, sources, made.gpu)
        names, changed = ([change.told for change in on_card[0]], on_card[1]) if on_card is not None else ([], None)
        bound = limit.bytes
    else:
        available = limit.bytes * made.setup.ranks
        on_cpu = smallest_changes_on_cpu(made.setup, sources, available)
        names, changed = (list(on_cpu[0]), on_cpu[1]) if on_cpu is not None else ([], None)
        bound = available // changed.setup.ranks if changed is not None else 0
    if changed is None:
        return None
    peak = changed.peak.total
    return {"set": names, "peak_bytes": peak, "margin_bytes": bound - peak, "seconds": changed.seconds}


def lines_of(report: Report) -> list[str]:
    """The report in full: the table of phases and categories, the verdict, what would change it."""
    start = f"{heading(report)} {report['gpus']} x {report['gpu']}, {unit_of(report)[0]} of each rank:"
    lines = [start, "", *_table(report), "", verdict(report)]
    if report["largest_micro_batch"] is not None and report["fits"]:
        lines.append(f"Largest micro-batch that fits: {report['largest_micro_batch']}.")
    if not report["fits"]:
        lines.append(remedy(report))
    if report["host_bytes"]:
        parts = ", ".join(f"{category} {told(size)}" for category, size in _in_order(report["host_bytes"]))
        lines.append(f"CPU memory of each rank beside that: {told(sum(report['host_bytes'].values()))} ({parts}).")
    if count := report["video_decoders"]["processes"]:
        each, large = (report["video_decoders"][name] for name in ("bytes_each", "large_bytes_each"))
        lines.append(
            f"For clips in WebM or MP4 also, CPU memory of each rank: {counted(count, 'decoder')}, {told(count * each)}; "
            f"{told(each)} each, up to {told(large)} with frames of 2048 pixels, measured."
        )
    if report["seconds"]:
        lines.append(f"What is moved costs each step, estimated from its bytes: {_costs(report['seconds'])}.")
    return lines + provisos(report)


def heading(report: Report) -> str:
    """What was planned, on whatever it may run."""
    return (
        f"{report['parameters']:,} parameters in {report['groups']} groups, micro-batch {report['micro_batch']}, "
        f"{report['accumulation']} in turn; predicted, not measured."
    )


def provisos(report: Report) -> list[str]:
    """What the figures hang on, a line each."""
    lines = []
    if report["assumed_encoders"]:
        lines.append(f"Not on this machine, so taken for Table 6's: {', '.join(report['assumed_encoders'])}.")
    return lines


def verdict(report: Report) -> str:
    """One line: the phase that needs most, of how much, and what is left or missing."""
    free = f"{told(abs(report['margin_bytes']))} ({abs(report['margin']):.0%})"
    ends = f"fits, free {free}" if report["fits"] else f"DOES NOT FIT, short of {free}"
    return f"Peak: {report['peak_phase']}, {told(report['peak_bytes'])} of {told(report['gpu_bytes'])}: {ends}."


def remedy(report: Report) -> str:
    """One line for what does not fit: the smallest set of changes that makes it."""
    if report["changes"] is None:
        return "No set of the changes known here makes it fit."
    changes = report["changes"]
    cost = f", for {_costs(changes['seconds'])} a step" if changes["seconds"] else ""
    return f"It would fit with {' and '.join(changes['set'])}: {told(changes['margin_bytes'])} free{cost}."


def line_of_card(report: Report) -> str:
    """The verdict on one card among several, to stand below others."""
    start = f"{report['gpu']:<12}{told(report['gpu_bytes']):>9}, peak {told(report['peak_bytes']):>9} in {report['peak_phase']:<11}"
    if report["fits"]:
        return f"{start}fits, free {told(report['margin_bytes'])} ({report['margin']:.0%}); micro-batch to {report['largest_micro_batch']}"
    return f"{start}does not fit, short of {told(-report['margin_bytes'])}. {remedy(report)}"


def told(size: float) -> str:
    """Bytes, for people."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def unit_of(report: Report) -> tuple[str, float]:
    """In what the plan is told: a name, and its bytes."""
    return ("GB", 1e9) if report["peak_bytes"] >= 1e9 else ("MB", 1e6)


def tensors_by_phase(report: Report) -> dict[str, int]:
    """Bytes of each phase that a measurement of tensors, or of resident memory, should find."""
    return {
        phase["name"]: sum(size for category, size in phase["bytes"].items() if category not in NOT_TENSORS) for phase in report["phases"]
    }


def categories_of(report: Report) -> list[str]:
    """The categories of all phases, in the order in which they are shown."""
    return [name for name, _ in _in_order({category: 0 for phase in report["phases"] for category in phase["bytes"]})]


def _table(report: Report) -> list[str]:
    categories, unit = categories_of(report), unit_of(report)[1]
    width = max(map(len, (*categories, "total"))) + 1

    def line(name: str, sizes: Iterable[int]) -> str:
        """A name, and a column for each phase of its bytes in the report's unit."""
        return f"{name:<{width}}" + "".join(f"{size / unit:>12.2f}" for size in sizes)

    lines = [f"{'':<{width}}" + "".join(f"{phase['name']:>12}" for phase in report["phases"])]
    lines += [line(category, (phase["bytes"].get(category, 0) for phase in report["phases"])) for category in categories]
    return [*lines, line("total", (phase["total"] for phase in report["phases"]))]


def _in_order(sizes: Mapping[str, int]) -> list[tuple[str, int]]:
    order = {category: number for number, category in enumerate(CATEGORIES)}
    return sorted(sizes.items(), key=lambda item: (order.get(item[0], len(order)), item[0]))


def _costs(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{lever} {value:.2f} s" for lever, value in seconds.items())
