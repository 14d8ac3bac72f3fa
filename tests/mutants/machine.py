"""Wrongs of how a machine is judged."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

MACHINE = (
    Mutant(
        name="machine code of an older generation counts as kernels",
        file="rdtf_ds/machine/verdicts.py",
        old="fitting = built[0] == capability[0] and built <= capability",
        new="fitting = built <= capability",
        tests=("tests/machine/test_verdicts.py",),
    ),
)
