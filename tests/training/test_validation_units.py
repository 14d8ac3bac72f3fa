"""A piece of validation's work: what it comes to when it fails, is stopped, or leaves the card unusable."""

from __future__ import annotations

import pytest

from rdtf_ds.training import validation_units
from rdtf_ds.training.validation_units import Attempt, attempt, go_on


def test_an_attempt_tells_and_does_not_raise(monkeypatch):
    assert attempt(lambda: 5)[:2] == (5, None)
    assert attempt(lambda: go_on(lambda: True)).stopped and attempt(lambda: go_on(lambda: True)).failure is None
    emptied = []
    monkeypatch.setattr(validation_units.torch.cuda, "empty_cache", lambda: emptied.append(1))

    def out_of_memory():
        raise validation_units.torch.OutOfMemoryError("CUDA out of memory")

    assert attempt(out_of_memory) == Attempt(None, "OutOfMemoryError: CUDA out of memory", pytest.approx(0, abs=1)) and emptied == [1]

    def out_of_memory_as_the_driver_says():
        raise validation_units.torch.AcceleratorError("CUDA error: out of memory")

    assert "out of memory" in attempt(out_of_memory_as_the_driver_says).failure and len(emptied) == 2

    def unusable():
        raise validation_units.torch.AcceleratorError("device-side assert")

    with pytest.raises(validation_units.torch.AcceleratorError):
        attempt(unusable)
