"""How long frames are shown, as an index can store it."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from rdtf_ds.data.clips.timeline import Timeline


def test_durations_fit_an_int32() -> None:
    """A WebM may say that a frame is shown for centuries."""
    ticks = np.array([0, 40, 40 + 2**31 - 1, 40 + 2**32, 2**61])
    shown = Timeline("vp9", 8, 8, ticks, np.array([0]), Fraction(1, 1000), 10).durations_ms()
    assert shown == (40, 2**31 - 1, 2**31 - 1, 2**31 - 1, 10)
    assert np.array(Timeline("vp9", 8, 8, np.array([0, 2**31 - 2]), np.array([0]), Fraction(1, 1000), 1).durations_ms())[0] == 2**31 - 2
