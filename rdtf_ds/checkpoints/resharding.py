"""What M ranks would have written in place of N, bit for bit.

DeepSpeed flattens each group of parameters and cuts it evenly among the ranks; a rank's file holds its part of the fp32 masters and of
the two Adam moments. bitsandbytes keeps 8-bit moments in blocks of 256 values that share one absmax. Groups are padded so that no cut
goes through a block for any supported number of ranks: another number is another cut, and nothing is converted or rounded.

Legend: N ranks that wrote, M ranks that read; a shard is one rank's part.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rdtf_ds.checkpoints.manifest import CheckpointError

BLOCK = 256
"""Values that share one absmax in bitsandbytes' block-wise 8-bit state."""
MOST_NAMED = 64
"""The most ranks a message proposes."""

# Names of DeepSpeed's and bitsandbytes'.
STATE, MASTERS, BASE = "optimizer_state_dict", "single_partition_of_fp32_groups", "base_optimizer_state"
_PARTITIONS, _FRAGMENTS, _PADDINGS = "partition_count", "param_slice_mappings", ("group_paddings", "param_alignment_paddings")
# Moments are bitsandbytes' state1 and state2, or exp_avg and exp_avg_sq of torch's AdamW, which counts steps in a tensor.
_BY_VALUE, _BY_BLOCK = {"state1", "state2", "exp_avg", "exp_avg_sq"}, {"absmax1", "absmax2"}
_ALIKE = {"step", "qmap1", "qmap2"}

Join = Callable[[list[Tensor]], Tensor]


def optimizer_shard(shards: Sequence[Mapping[str, Any]], rank: int, world: int) -> dict[str, Any]:
    """The content of the optimizer file of rank ``rank`` of ``world``, from those of all N ranks in their order.

    Tensors may be memory-mapped. A part that lies in one old shard stays that memory; only what spans several is copied. Each tensor
    has a storage of its own length, since saving one writes its whole storage.

    Raises:
        CheckpointError: A group that ``world`` ranks cannot share in whole blocks, or shards that are not of one save.
    """
    content = _recut(shards, _Cut(rank, world, _alone_or_joined))
    content[STATE][MASTERS] = list(content[STATE][MASTERS])
    return content


def shard_to_load(shards: Sequence[Mapping[str, Any]], rank: int, world: int) -> dict[str, Any]:
    """As `optimizer_shard`, for DeepSpeed's ``load_state_dict``, which may take it once: no second copy of anything is held.

    The moments in it are copies, and become the live ones as they are. The masters, which DeepSpeed copies into the live ones, are cut
    when it asks for them, one group at a time.

    Args:
        shards: As `Reopened`, no more of the files is held than the group being cut.

    Raises:
        CheckpointError: As `optimizer_shard`.
    """
    content = _recut(shards, _Cut(rank, world, _alone_or_joined), own_moments=True)
    content[STATE][BASE] = _HandedOver(content[STATE][BASE])
    return content


def model_states(content: Mapping[str, Any], world: int) -> dict[str, Any]:
    """The content of ``mp_rank_00_model_states.pt`` for ``world`` ranks; the weights are in it whole.

    Raises:
        CheckpointError: ``world`` ranks cannot share the global batch.
    """
    return {**content, "dp_world_size": world, "ds_config": batch_keys(content["ds_config"], world)}


def ema_shard(shards: Sequence[Mapping[str, Tensor]], rank: int, world: int) -> dict[str, Tensor]:
    """What ``ShardedEMA`` of rank ``rank`` of ``world`` loads, from the states of all N ranks in their order.

    Raises:
        CheckpointError: As `optimizer_shard`.
    """
    _same_keys(shards, "the EMA")
    names = [name for name in shards[0] if name != "updates"]
    _refuse_uneven({name: [shard[name].numel() for shard in shards] for name in names}, world)
    cut = _Cut(rank, world, _alone_or_joined)
    parts = {name: cut([shard[name] for shard in shards]) for name in names}
    return parts | {"updates": _alike([shard["updates"] for shard in shards], "the EMA's updates")}


def batch_keys(ds_config: Mapping[str, Any], world: int) -> dict[str, Any]:
    """DeepSpeed's keys with the same global batch on ``world`` ranks: the same micro-batch, or the next smaller one that fits.

    Raises:
        CheckpointError: None fits.
    """
    batch, micro = ds_config["train_batch_size"], ds_config["train_micro_batch_size_per_gpu"]
    if batch % world:
        raise CheckpointError(f"A global batch of {batch} (train_batch_size) cannot be shared by {world} ranks. {_that_work(batch)}")
    each = batch // world
    micro = next(size for size in range(min(micro, each), 0, -1) if each % size == 0)
    return {**ds_config, "train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": each // micro}


class Reopened(Mapping[str, Any]):
    """The content of a file that is opened anew for each access: what was read of a memory-mapped one stays as long as its mapping."""

    def __init__(self, opened: Callable[[], Mapping[str, Any]]) -> None:
        self._opened = opened

    def __getitem__(self, key: str) -> Any:
        return self._opened()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._opened())

    def __len__(self) -> int:
        return len(self._opened())


@dataclass(frozen=True)
class _Cut:
    """Takes part ``rank`` of ``world`` equal ones from what N equal shards hold one after another."""

    rank: int
    world: int
    join: Join

    def __call__(self, shards: Sequence[Tensor]) -> Tensor:
        old = shards[0].numel()
        start, stop = self.bounds(old * len(shards))
        pieces = []
        while start < stop:
            number, offset = divmod(start, old)
            length = min(stop - start, old - offset)
            pieces.append(shards[number].detach()[offset : offset + length])
            start += length
        return self.join(pieces)

    def bounds(self, total: int) -> tuple[int, int]:
        """First value, and the one after the last, of ``total``."""
        length = total // self.world
        return self.rank * length, (self.rank + 1) * length


class _OneAtATime(Sequence[Tensor]):
    """Tensors that are made when asked for."""

    def __init__(self, make: Callable[[int], Tensor], length: int) -> None:
        self._make, self._length = make, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        return self._make(range(self._length)[index])


class _HandedOver(dict[str, Any]):
    """``copy.deepcopy`` of it is itself: bitsandbytes copies a state before it takes it, and would hold the moments twice."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _HandedOver:
        return self


def _recut(shards: Sequence[Mapping[str, Any]], cut: _Cut, own_moments: bool = False) -> dict[str, Any]:
    """The new shard, its masters as `_OneAtATime`; with ``own_moments`` these are copies even where they lie in one old shard."""
    states = [shard[STATE] for shard in shards]
    _same_keys(states, "the optimizer's state")
    if any(_total(state.get(key, [])) for state in states for key in _PADDINGS):
        raise CheckpointError("The groups hold paddings of DeepSpeed's (zero_optimization.parameter_alignment?), which ours never do.")
    own = (MASTERS, BASE, _FRAGMENTS, _PARTITIONS)
    kept = {key: _alike([state[key] for state in states], key) for key in states[0] if key not in own}
    settings = _alike([state[BASE]["param_groups"] for state in states], "the optimizer's settings")
    names = [group["name"] for group in settings]
    for key in (MASTERS, _FRAGMENTS):
        if any(len(state[key]) != len(names) for state in states):
            raise _disagree(f"the number of {key}, {len(names)}", [len(state[key]) for state in states])
    lengths = {name: [state[MASTERS][number].numel() for state in states] for number, name in enumerate(names)}
    _refuse_uneven(lengths, cut.world)

    def master(number: int) -> Tensor:
        """This rank's fp32 part of group ``number``, (the group's elements / ranks,), made anew at each call."""
        # From the files again, not from `states`, which would hold them. DeepSpeed's masters require gradients.
        return cut([shard[STATE][MASTERS][number] for shard in shards]).requires_grad_()

    moments = dataclasses.replace(cut, join=_copied) if own_moments else cut
    state = kept | {
        MASTERS: _OneAtATime(master, len(names)),
        BASE: {"state": _all_moments([state[BASE]["state"] for state in states], lengths, moments), "param_groups": settings},
        _FRAGMENTS: [
            _fragments([state[_FRAGMENTS][number] for state in states], lengths[name][0], cut) for number, name in enumerate(names)
        ],
        _PARTITIONS: [cut.world] * len(names),
    }
    return {**shards[0], STATE: {key: state[key] for key in states[0]}, "ds_config": batch_keys(shards[0]["ds_config"], cut.world)}


def _all_moments(states: Sequence[Mapping[int, Any]], lengths: Mapping[str, Sequence[int]], cut: _Cut) -> dict[int, Any]:
    """The base optimizer's state by group number; there is none before the first step."""
    _same_keys(states, "the moments")
    groups = list(lengths.items())
    return {number: _moments([state[number] for state in states], groups[number][0], groups[number][1][0], cut) for number in states[0]}


def _moments(parts: Sequence[Mapping[str, Any]], group: str, length: int, cut: _Cut) -> dict[str, Any]:
    """The optimizer's state of one group, some of it nested, from shards of ``length`` values each."""
    _same_keys(parts, f"the moments of group {group}")
    new: dict[str, Any] = {}
    for key, value in parts[0].items():
        values = [part[key] for part in parts]
        if isinstance(value, Mapping):
            new[key] = _moments(values, group, length, cut)
        elif key in _ALIKE:
            value = _alike(values, f"{key} of group {group}")
            new[key] = cut.join([value]) if isinstance(value, Tensor) else value
        elif key in _BY_VALUE | _BY_BLOCK:
            expected = length if key in _BY_VALUE else math.ceil(length / BLOCK)
            if any(value.shape != (expected,) or value.dtype != values[0].dtype for value in values):
                raise _disagree(f"{key} of group {group}, {expected} values", [f"{value.numel()} {value.dtype}" for value in values])
            new[key] = cut(values)
        else:
            raise CheckpointError(f"The moments of group {group} hold {key!r}, which this version cannot cut for another number of ranks.")
    return new


def _fragments(maps: Sequence[Mapping[str, Any]], length: int, cut: _Cut) -> dict[str, Any]:
    """Which run of which parameter lies where on the new rank, as DeepSpeed's offline tools read it: name -> (numel, start)."""
    spans: dict[str, tuple[int, int, Any]] = {}
    for number, fragments in enumerate(maps):
        for name, fragment in fragments.items():
            start = number * length + fragment.start
            spans[name] = (spans[name][0] if name in spans else start, start + fragment.numel, fragment)
    low, high = cut.bounds(length * len(maps))
    inside = {name: (max(start, low), min(stop, high), fragment) for name, (start, stop, fragment) in spans.items()}
    return {
        name: dataclasses.replace(fragment, start=start - low, numel=stop - start)
        for name, (start, stop, fragment) in inside.items()
        if start < stop
    }


def _copied(pieces: list[Tensor]) -> Tensor:
    """All pieces joined in memory of their own; a scalar is one piece."""
    return torch.cat(pieces) if pieces[0].ndim else pieces[0].clone()


def _alone_or_joined(pieces: list[Tensor]) -> Tensor:
    """One piece as it lies in memory, under a storage of just its bytes; several joined."""
    if len(pieces) > 1:
        return torch.cat(pieces)
    (piece,) = pieces
    first = piece.storage_offset() * piece.element_size()
    storage = piece.untyped_storage()[first : first + piece.nbytes]
    return torch.empty(0, dtype=piece.dtype).set_(storage, 0, piece.shape, piece.stride())


def _refuse_uneven(lengths: Mapping[str, Sequence[int]], world: int) -> None:
    """Cuts that go through a block, before or after; ``lengths`` of every rank's shard by group."""
    totals = [sum(shards) for shards in lengths.values()]
    for name, shards in lengths.items():
        if len(set(shards)) > 1:
            raise _disagree(f"the length of group {name}", shards)
        total = sum(shards)
        if len(shards) != world and (shards[0] % BLOCK or total % (BLOCK * world)):
            raise CheckpointError(
                f"Group {name} of {total} values in {len(shards)} shards cannot be cut for {world} ranks: quantised moments are kept in "
                f"blocks of {BLOCK}, and a cut goes through one. {_that_work(math.gcd(*totals) // BLOCK if not shards[0] % BLOCK else 0)}"
            )


def _that_work(total: int) -> str:
    counts = [count for count in range(1, min(total, MOST_NAMED) + 1) if total % count == 0]
    return f"Numbers of ranks that can: {', '.join(map(str, counts))}." if counts else "No other number can."


def _same_keys(parts: Sequence[Mapping[Any, Any]], what: str) -> None:
    if any(part.keys() != parts[0].keys() for part in parts):
        raise _disagree(f"what {what} holds", [sorted(part) for part in parts])


def _alike(values: Sequence[Any], what: str) -> Any:
    """The value that all ranks have."""
    if not all(_equal(value, values[0]) for value in values):
        raise _disagree(what, [value if isinstance(value, int | float | str | bool) else "..." for value in values])
    return values[0]


def _equal(one: Any, other: Any) -> bool:
    """Equality of nested plain values, tensors, and objects without an equality of their own, as DeepSpeed's loss scalers are."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other) or (hasattr(one, "__dict__") and _equal(vars(one), vars(other)))


def _disagree(what: str, values: Sequence[Any]) -> CheckpointError:
    told = "; ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
    return CheckpointError(f"The shards are not of one save: they differ in {what} ({told}). Use another checkpoint of the run.")


def _total(paddings: Sequence[Any]) -> int:
    """Sum of nested paddings."""
    return sum(_total(padding) if isinstance(padding, list) else padding for padding in paddings)
