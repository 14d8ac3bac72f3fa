"""What it costs in time to keep things in CPU memory: seconds a step, from the bytes that cross PCIe and those the CPU touches.

Estimates, not measurements: no GPU was at hand. A copy is taken to run at `PCIE`, nothing of it hidden behind compute, so that the
figures are upper bounds where copies overlap. AdamW on the CPU is bound by memory, and is taken to run at `CPU_MEMORY`.
"""

from __future__ import annotations

from dataclasses import dataclass

from rdtf_ds.memory.activations import TrainingTrace


@dataclass(frozen=True)
class Rates:
    """Bytes a second.

    Attributes:
        pcie: One way. 12e9 is what pinned copies reach over PCIe 3.0 x16 (15.75e9 on paper), the V100's; each GPU has its own link.
        cpu_memory: Of one rank's AdamW on the CPU, reading and writing. 20e9 is about one channel of DDR4-2666 for each of eight ranks.
    """

    pcie: float = 12e9
    cpu_memory: float = 20e9


DEFAULT = Rates()
ADAMW_BYTES = 4 * 4 + 3 * 4 + 2 * 4 + 4 + 2
"""Touched for each element by a step: master, gradient and two moments read, master and moments written; before it the gradient unscaled
and clipped, after it the master cast."""
LERP_BYTES = 3 * 4
"""Touched for each element by an update of the mean: master and mean read, mean written."""


def ema_seconds(elements: int, masters_on_gpu: bool, rates: Rates = DEFAULT) -> float:
    """Of one update of a mean that waits on the CPU; masters are copied there first when they are on the GPU."""
    copied = 4 * elements / rates.pcie if masters_on_gpu else 0.0
    return copied + LERP_BYTES * elements / rates.cpu_memory


def encoder_seconds(weights: int, passes: int, rates: Rates = DEFAULT) -> float:
    """Of frozen encoders that visit the GPU for ``passes`` micro-batches a step; nothing is copied back."""
    return weights * passes / rates.pcie


def activation_seconds(trace: TrainingTrace, passes: int, rates: Rates = DEFAULT) -> float:
    """Of activations that wait on the CPU between forward and backward: there and back in each micro-batch."""
    return 2 * trace.host * passes / rates.pcie


def offload_seconds(elements: int, compute_bytes: int, passes: int, rates: Rates = DEFAULT) -> float:
    """Of an optimizer on the CPU, for one rank's ``elements``.

    Each micro-batch's gradients go to the CPU, and those so far come to the GPU to be added to; at the end of the step they go once more
    in fp32, and the updated weights come back in compute precision.
    """
    accumulated = compute_bytes * (2 * passes - 1) if passes > 1 else 0
    copied = (accumulated + 4 + compute_bytes) * elements
    return copied / rates.pcie + ADAMW_BYTES * elements / rates.cpu_memory
