"""What ranks say to each other beside tensors: votes, and who speaks for all. Every function is called by all ranks."""

from __future__ import annotations

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


def any_rank(*flags: bool) -> list[bool]:
    """Whether each flag is set on any rank; cheaper than gathering objects in every step."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    votes = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return [bool(vote) for vote in votes.tolist()]
