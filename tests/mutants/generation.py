"""Wrongs of clips that are made in number."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

GENERATION = (
    Mutant(
        name="a batch of which a clip is there is not made",
        file="rdtf_ds/generation/making.py",
        old="if any(job.name not in there for job in group)",
        new="if all(job.name not in there for job in group)",
        tests=("tests/generation/test_making.py",),
    ),
    Mutant(
        name="clips of other settings count as made",
        file="rdtf_ds/generation/making.py",
        old="if found.get(key) != note.get(key)]",
        new="if key not in found]",
        tests=("tests/generation/test_making.py",),
    ),
    Mutant(
        name="pictures of prompts lie anywhere on the machine",
        file="rdtf_ds/generation/prompts.py",
        old="    if not inside:\n",
        new="    if False:\n",
        tests=("tests/generation/test_prompts.py",),
    ),
    Mutant(
        name="clips of a sheet all end with the shortest",
        file="rdtf_ds/generation/sheets.py",
        old="    end = max(int(clip_starts[-1])",
        new="    end = min(int(clip_starts[-1])",
        tests=("tests/generation/test_sheets.py",),
    ),
)
