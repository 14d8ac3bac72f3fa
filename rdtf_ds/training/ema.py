"""Exponential mean of the fp32 masters, sharded as they are: each rank averages its own part of every group.

The mean may wait in CPU memory while the masters are on a GPU: an update then copies them over, group by group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor


class HoldsWeights(Protocol):
    """What `ShardedEMA.applied_to` needs of the engine."""

    @property
    def masters(self) -> list[Tensor]:
        """This rank's fp32 shard of each group: what is shown again once the mean has had its turn."""

    def show(self, shards: Sequence[Tensor]) -> None:
        """Put fp32 shards, one per group, into the compute-precision weights of all ranks; the masters stay as they are."""


class ShardedEMA:
    """Mean of the weights over applied steps: ē ← d·ē + (1 − d)·w with d = min(decay, (1 + n) / (10 + n)) at the n-th update.

    The ramp lets the mean forget the random start within tens of steps, long before ``decay`` alone would.

    Args:
        masters: This rank's fp32 shards, by group name, live; kept by reference.
        decay: In (0, 1); 0.9999 forgets over about ten thousand steps.
        device: Where the mean waits; None: beside the masters.
    """

    def __init__(self, masters: Mapping[str, Tensor], decay: float, device: torch.device | None = None) -> None:
        if not 0.0 < decay < 1.0:
            raise ValueError(f"decay must lie between 0 and 1, got {decay}")
        self._masters = dict(masters)
        self.decay = decay
        self.updates = 0
        self.shards = {name: master.detach().to(device or master.device, copy=True) for name, master in self._masters.items()}
        elsewhere = [master for name, master in self._masters.items() if master.device != self.shards[name].device]
        self._staging = _staging(elsewhere) if elsewhere else None

    @torch.no_grad()
    def update(self) -> None:
        """Take in the masters as they are now; call after applied steps only."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, shard in self.shards.items():
            shard.lerp_(self._at_hand(self._masters[name]), 1.0 - decay)
        self.updates += 1

    def _at_hand(self, master: Tensor) -> Tensor:
        """The master where the mean is; valid until the next call."""
        if self._staging is None:
            return master
        return self._staging[: master.numel()].copy_(master)

    @contextmanager
    def applied_to(self, engine: HoldsWeights) -> Iterator[None]:
        """The mean in the live model of all ranks, for the time of the context; all ranks enter and leave together.

        Compute weights are always the cast of the masters, so showing the masters again restores them bit for bit. After an error
        they are not restored: showing them is a collective, and a rank that fails alone would wait in it instead of ending the run.
        """
        engine.show(list(self.shards.values()))
        yield
        engine.show(engine.masters)

    @property
    def nbytes(self) -> int:
        """Of the shards on this rank."""
        return sum(shard.nbytes for shard in self.shards.values())

    def state_dict(self) -> dict[str, Tensor]:
        """Flat tensors only, as safetensors wants them; ``updates`` is a scalar beside the groups."""
        return {**self.shards, "updates": torch.tensor(self.updates, dtype=torch.int64)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the place of the mean that `state_dict` described.

        Raises:
            ValueError: Other groups, or shards of another length.
        """
        expected = {name: tuple(shard.shape) for name, shard in self.shards.items()} | {"updates": ()}
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if found != expected:
            raise ValueError(f"EMA shards do not fit this model: expected {expected}, found {found}")
        for name, shard in self.shards.items():
            shard.copy_(state[name])
        self.updates = int(state["updates"])


def _staging(masters: Sequence[Tensor]) -> Tensor:
    """CPU memory for the largest of these, page-locked, which a GPU fills several times faster than other memory."""
    return torch.empty(max(master.numel() for master in masters), pin_memory=masters[0].device.type == "cuda")
