"""What a rank does between two meetings of a validation: it may fail or be cut short, but it comes back to where the others wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch

from rdtf_ds.errors import UserError
from rdtf_ds.training.supervisor import heartbeat

T = TypeVar("T")


class Interrupted(Exception):
    """The run was asked to stop."""


class Attempt(NamedTuple, Generic[T]):
    """How a piece of work ended on this rank: its value, or why there is none; and its seconds.

    Attributes:
        stopped: There is no value because the run was asked to stop, which is no failure.
    """

    value: T | None
    failure: str | None
    seconds: float
    stopped: bool = False


def attempt(work: Callable[[], T]) -> Attempt[T]:
    """Do a piece of work that has no collective in it; whatever goes wrong is told, not raised.

    Raises:
        torch.AcceleratorError: The device is of no more use, so the run has to end.
    """
    started = time.perf_counter()
    try:
        return Attempt(work(), None, time.perf_counter() - started)
    except Interrupted:
        return Attempt(None, None, time.perf_counter() - started, stopped=True)
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
            torch.cuda.empty_cache()  # training has a plan for that memory
        elif isinstance(error, torch.AcceleratorError):
            raise
        words = str(error).partition("\n")[0]
        failure = words if isinstance(error, UserError) else f"{type(error).__name__}: {words}"
        return Attempt(None, failure, time.perf_counter() - started)


def go_on(hurry: Callable[[], bool]) -> None:
    """Beat, and see whether there is still time.

    Raises:
        Interrupted: ``hurry`` says that the run was asked to stop.
    """
    heartbeat().beat("validation")
    if hurry():
        raise Interrupted
