"""Wrongs of the page that draws stickers."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

WEB = (
    Mutant(
        name="the web page takes predictions with gaps",
        file="rdtf_ds/web/slots.py",
        old="if len(frames) >= MIN_SHOWN and frames in ends:",
        new="if len(frames) >= MIN_SHOWN:",
        tests=("tests/web/test_slots.py",),
    ),
    Mutant(
        name="visitors of the web page share the model at once",
        file="rdtf_ds/web/studio.py",
        old="        with self._busy:\n",
        new="        if True:\n",
        tests=("tests/web/test_studio.py",),
    ),
    Mutant(
        name="the web page opens any file that a request names",
        file="rdtf_ds/web/studio.py",
        old="return path if path.is_relative_to(uploads.resolve()) and path.is_file() else None",
        new="return path if path.is_file() else None",
        tests=("tests/web/test_studio.py",),
    ),
)
