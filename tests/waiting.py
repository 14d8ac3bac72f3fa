"""Waiting for what another process does."""

from __future__ import annotations

import time
from collections.abc import Callable

from rdtf_ds.processes import read_process

PATIENCE = 120
"""Seconds for something that takes a fraction of one on an idle machine."""


def until(condition: Callable[[], bool], what: Callable[[], str] = lambda: "what was waited for") -> None:
    """Returns once it is so; what has not come within `PATIENCE` fails the test, named by ``what`` as things are then."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"never came: {what()}"
        time.sleep(0.01)


def gone(pid: int) -> bool:
    process = read_process(pid)
    return process is None or process.ended
