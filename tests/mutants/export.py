"""Wrongs of models written for others to load."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

EXPORT = (
    Mutant(
        name="a value beyond the exported dtype is let through",
        file="rdtf_ds/export/weight_files.py",
        old="    if largest > limit:",
        new="    if largest > 2 * limit:",
        tests=("tests/export/test_weight_files.py",),
    ),
    Mutant(
        name="a shard is as large as the size and one parameter more",
        file="rdtf_ds/export/weight_files.py",
        old="held + length > max_shard",
        new="held > max_shard",
        tests=("tests/export/test_weight_files.py",),
    ),
    Mutant(
        name="a frozen part keeps its weights once it is written",
        file="rdtf_ds/export/frozen_parts.py",
        old='    return part.to("meta")',
        new="    return part",
        tests=("tests/export/test_frozen_parts.py",),
    ),
    Mutant(
        name="values that are NaN pass the half check",
        file="rdtf_ds/export/half_check.py",
        old="        return self.relative_error is not None and self.relative_error <= self.bar",
        new="        return self.relative_error is None or self.relative_error <= self.bar",
        tests=("tests/export/test_half_check.py",),
    ),
)
