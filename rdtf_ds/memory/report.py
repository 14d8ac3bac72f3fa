"""A memory plan as people and programs read it: lines of text, and a dictionary for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rdtf_ds.memory.levers import largest_micro_batch, smallest_changes
from rdtf_ds.memory.planner import MemoryPlan, Sources


def report_of(made: MemoryPlan, sources: Sources, assumed: Sequence[str]) -> dict[str, Any]:
    """All that is printed, JSON-able."""
    assert made.gpu is not None
    groups = sources.groups(made.setup.group_size)
    report: dict[str, Any] = {
        "predicted": True,
        "gpu": made.gpu.name,
        "gpus": made.setup.ranks,
        "gpu_bytes": made.gpu.bytes,
        "parameters": sum(sum(group.sizes) for group in groups),
        "groups": len(groups),
        "micro_batch": made.setup.micro_batch,
        "accumulation": made.setup.accumulation,
        "phases": [{"name": phase.name, "total": phase.total, "bytes": phase.bytes} for phase in made.phases],
        "peak_phase": made.peak.name,
        "peak_bytes": made.peak.total,
        "margin_bytes": made.margin,
        "margin": made.margin / made.gpu.bytes,
        "fits": made.fits,
        "largest_micro_batch": largest_micro_batch(made.setup, sources, made.gpu),
        "changes": None,
        "assumed_encoders": list(assumed),
    }
    if not made.fits and (found := smallest_changes(made.setup, sources, made.gpu)) is not None:
        changes, changed = found
        report["changes"] = {"set": [change.told for change in changes], "peak_bytes": changed.peak.total, "margin_bytes": changed.margin}
    return report


def lines_of(made: MemoryPlan, report: dict[str, Any]) -> list[str]:
    """The report as text; GB are 10^9 bytes."""
    phases = {phase.name: phase for phase in made.phases}
    categories = sorted({category for phase in made.phases for category in phase.bytes}, key=_rank_of_category)
    width = max(map(len, (*categories, "total")))
    lines = [
        f"{report['parameters']:,} parameters in {report['groups']} groups on {report['gpus']} x {report['gpu']}, micro-batch "
        f"{report['micro_batch']}, {report['accumulation']} in turn. GB of each GPU, predicted, not measured:",
        "",
        f"{'':<{width}}" + "".join(f"{name:>12}" for name in phases),
    ]
    for category in categories:
        cells = "".join(f"{phase.bytes.get(category, 0) / 1e9:>12.2f}" for phase in made.phases)
        lines.append(f"{category:<{width}}{cells}")
    lines.append(f"{'total':<{width}}" + "".join(f"{phase.total / 1e9:>12.2f}" for phase in made.phases))
    lines.append("")
    verdict = "fits, free" if made.fits else "DOES NOT FIT, short of"
    lines.append(
        f"Peak: {report['peak_phase']}, {report['peak_bytes'] / 1e9:.2f} of {report['gpu_bytes'] / 1e9:.2f} GB: {verdict} "
        f"{abs(report['margin_bytes']) / 1e9:.2f} GB ({abs(report['margin']):.0%})."
    )
    if made.fits:
        lines.append(f"Largest micro-batch that fits: {report['largest_micro_batch']}.")
    elif report["changes"] is None:
        lines.append("No set of the changes known here makes it fit.")
    else:
        changed = report["changes"]
        lines.append(f"It would fit with {' and '.join(changed['set'])}: {changed['margin_bytes'] / 1e9:.2f} GB free.")
    if report["assumed_encoders"]:
        lines.append(f"Not on this machine, so taken for Table 6's: {', '.join(report['assumed_encoders'])}.")
    if made.setup.checkpointing == "blocks_cpu_offload":
        lines.append("What blocks_cpu_offload moves to the CPU is counted as if it stayed: an upper bound.")
    return lines


def _rank_of_category(category: str) -> int:
    order = ("weights", "masters", "moments", "EMA", "gradients", "buckets", "fp32 working copies", "activations", "encoders")
    return order.index(category) if category in order else len(order)
