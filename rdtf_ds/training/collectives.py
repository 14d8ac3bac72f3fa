"""What ranks say to each other beside tensors: votes, and who speaks for all. Every function is called by all ranks."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from rdtf_ds.errors import UserError, on_every_rank

T = TypeVar("T")


def gather_objects(value: Any) -> list[Any]:
    """``value`` of every rank, on every rank, by rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_rank_zero(make: Callable[[], T]) -> T:
    """``make()`` run by rank 0 alone, its value on every rank; a `UserError` of it is raised on all."""
    answer: list[Any] = [None, None]  # value, error
    if dist.get_rank() == 0:
        try:
            answer[0] = make()
        except UserError as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise on_every_rank(answer[1])
    value: T = answer[0]
    return value


def patiently_on_rank_zero(work: Callable[[Callable[[], None]], T], beat: Callable[[], None], every_s: float = 5.0) -> T:
    """``work(progress)`` run by rank 0 alone, however long it takes; its value, or what it raises, on every rank.

    Rank 0 works in a thread of its own. Meanwhile all ranks meet every few seconds, so that no collective waits past its timeout, and
    ``beat`` wherever ``progress`` was called since: work that hangs is silence, which a watchdog hears on every rank.

    Args:
        work: calls ``progress`` whenever it got on, from any thread. Its value must be picklable.
    """
    answer: list[Any] = [None, None]  # value, error
    steps, done = [0], threading.Event()
    if dist.get_rank() == 0:

        def progress() -> None:
            """The work got on; noticed when the ranks meet next."""
            steps[0] += 1

        def run() -> None:
            """In its thread: the work's value or error goes to ``answer``, and the meetings end."""
            try:
                answer[0] = work(progress)
            except BaseException as error:  # every end of it must reach the ranks that wait
                answer[1] = error
            finally:
                done.set()

        threading.Thread(target=run, name="work for all ranks", daemon=True).start()
    device, seen = "cuda" if dist.get_backend() == "nccl" else "cpu", 0
    while True:
        status = torch.tensor([done.wait(every_s), steps[0]] if dist.get_rank() == 0 else [0, 0], device=device)
        dist.broadcast(status, src=0)
        finished, count = status.tolist()
        if count != seen:
            seen = count
            beat()
        if finished:
            break
    return _told_to_all(answer)


def _told_to_all(answer: list[Any]) -> Any:
    """The value or error that rank 0 has, on every rank."""
    error = answer[1]
    told = [answer[0], error if error is None or _travels(error) else RuntimeError(f"rank 0: {type(error).__name__}: {error}")]
    dist.broadcast_object_list(told, src=0)
    if error is None:
        error = told[1]
    if error is not None:
        raise on_every_rank(error) if isinstance(error, UserError) else error
    return told[0]


def _travels(error: BaseException) -> bool:
    try:
        return isinstance(pickle.loads(pickle.dumps(error)), type(error))
    except Exception:
        return False


def any_rank(*flags: bool) -> list[bool]:
    """Whether each flag is set on any rank; cheaper than gathering objects in every step."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    votes = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return [bool(vote) for vote in votes.tolist()]
