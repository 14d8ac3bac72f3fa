"""Wrongs of the page about a data set."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

INSPECTION = (
    Mutant(
        name="a caption becomes markup",
        file="rdtf_ds/inspection/page.py",
        old="autoescape=True",
        new="autoescape=False",
        tests=("tests/inspection/test_page.py",),
    ),
    Mutant(
        name="a caption ends the report's script",
        file="rdtf_ds/inspection/page.py",
        old='text.replace("<",',
        new='text.replace("no such text",',
        tests=("tests/inspection/test_page.py",),
    ),
    Mutant(
        name="a frame is compared with itself",
        file="rdtf_ds/inspection/variety.py",
        old="np.triu_indices(count, 1)",
        new="np.triu_indices(count, 0)",
        tests=("tests/inspection/test_variety.py",),
    ),
    Mutant(
        name="the report draws other frames than training",
        file="rdtf_ds/inspection/variety.py",
        old='draw_key(sample_number, "frames", 0)',
        new='draw_key(sample_number, "frame", 0)',
        tests=("tests/inspection/test_views.py",),
    ),
)
