"""How numbers are written for people."""

from __future__ import annotations

from rdtf_ds.wording import counted


def test_one_is_singular():
    assert [counted(number, "clip") for number in (0, 1, 2, 11)] == ["0 clips", "1 clip", "2 clips", "11 clips"]
