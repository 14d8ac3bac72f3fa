"""A model of round numbers for tests of levers: what its training saves, and its optimizer's groups."""

from __future__ import annotations

from rdtf_ds.memory.activations import GradientArrival, TrainingTrace
from rdtf_ds.memory.planner import Group, Sources

ELEMENTS, PARAMETERS = 49_152 * 2_000, 100  # about a tenth of DFGN


def arrivals(activations: int) -> tuple[GradientArrival, ...]:
    return tuple(GradientArrival(ELEMENTS // PARAMETERS, activations, activations) for _ in range(PARAMETERS))


def training(checkpointing: str, clips: int) -> TrainingTrace:
    activations = clips * (400_000_000 if checkpointing == "none" else 50_000_000)
    return TrainingTrace(activations, activations, arrivals(activations), 0)


def groups(size: int) -> tuple[Group, ...]:
    count = -(-ELEMENTS // size)
    return tuple(Group((ELEMENTS // PARAMETERS,) * (PARAMETERS // count), 0, 8) for _ in range(count))


SOURCES = Sources(groups, training, lambda clips: 0, lambda frames: 0, lambda frames: 0, {})
