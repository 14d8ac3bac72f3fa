"""Wrongs of the plan of what fits."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

MEMORY = (
    Mutant(
        name="moments in 8 bits are planned without their scales",
        file="rdtf_ds/memory/planner.py",
        old="2 * (length + 4 * -(-length // QUANTISATION_BLOCK))",
        new="2 * length",
        tests=("tests/memory/test_planner.py",),
    ),
    Mutant(
        name="a bucket is planned to be sent once it overflows",
        file="rdtf_ds/memory/planner.py",
        old="if filled and filled + arrival.elements > setup.reduce_bucket:",
        new="if filled > setup.reduce_bucket:",
        tests=("tests/memory/test_planner.py",),
    ),
    Mutant(
        name="gradients are planned to wait between steps of one micro-batch",
        file="rdtf_ds/memory/planner.py",
        old="if setup.offload_optimizer or setup.accumulation == 1 else summed",
        new="if setup.offload_optimizer else summed",
        tests=("tests/memory/test_planner.py",),
    ),
)
