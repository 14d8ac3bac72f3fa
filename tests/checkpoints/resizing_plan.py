"""Numbers that `tests.checkpoints.resizing` and the tests of what it leaves share; without its imports."""

BATCH, MICRO, SAVED, MORE = 12, 2, 3, 3
"""Samples of a step and of a micro-batch; steps before the checkpoint and after it."""
