"""The peak of every phase of a run on one rank, by category: plain arithmetic over what DeepSpeed's ZeRO-2 and bitsandbytes allocate.

The terms were read in the source of DeepSpeed 0.19 (``runtime/zero/stage_1_and_2.py``) and bitsandbytes 0.50; where they surprise, a
comment says so. Bytes of activations come from `rdtf_ds.memory.activations`. Nothing here was measured on a GPU.

Legend: P parameters with padding, W ranks, A micro-batches of a step (accumulation), c bytes of a number in compute precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from rdtf_ds.memory.activations import TrainingTrace
from rdtf_ds.memory.gpus import GPU, context_bytes

MASTER_BYTES = 4
NORM_BYTES = 8
"""DeepSpeed takes the norm of each gradient in a float64 copy of it."""
QUANTISATION_BLOCK = 256
SLACK = 0.05
"""Of all tensors: what the caching allocator holds beyond them, for blocks that fit none of the next. Assumed, not measured."""
GUIDANCE_PASSES = 3
"""The sampler answers (no condition, image, both) in one batch of a clip."""

Bytes = dict[str, int]
"""By category; those of zero left out."""


@dataclass(frozen=True)
class Group:
    """A flat optimizer group: its parameters' sizes in order, the padding at its end, the width of its moments (8 or 32 bits)."""

    sizes: tuple[int, ...]
    padding: int
    bits: int

    @property
    def length(self) -> int:
        return sum(self.sizes) + self.padding

    def held_by(self, rank: int, ranks: int) -> int:
        """Elements of all parameters that reach into a rank's part, each in full: so much DeepSpeed holds of their gradients."""
        first, last = rank * self.length // ranks, (rank + 1) * self.length // ranks
        held = start = 0
        for size in (*self.sizes, self.padding):
            if size and start < last and start + size > first:
                held += size
            start += size
        return held


@dataclass(frozen=True)
class Sources:
    """Where sizes come from that a lever may change.

    Attributes:
        groups: Of a group size.
        training: Of an activation checkpointing mode and a micro-batch.
        sampling: Bytes one pass over so many clips has alive without graph.
        encode, decode: The same of the autoencoder, for so many frames at once.
        encoder_bytes: Weights of all frozen encoders.
    """

    groups: Callable[[int], tuple[Group, ...]]
    training: Callable[[str, int], TrainingTrace]
    sampling: Callable[[int], int]
    encode: Callable[[int], int]
    decode: Callable[[int], int]
    encoder_bytes: int


@dataclass(frozen=True)
class Setup:
    """What the config and the command line say. ``compute_bytes`` 2 for fp16 and bf16, 4 for fp32; buckets count elements."""

    ranks: int
    global_batch: int
    micro_batch: int
    compute_bytes: int
    group_size: int
    ema: bool
    checkpointing: str
    autoencoder_slice: int
    frames: int
    reduce_bucket: int
    overlap_comm: bool
    validates: bool

    @property
    def accumulation(self) -> int:
        """A."""
        return self.global_batch // (self.micro_batch * self.ranks)


@dataclass(frozen=True)
class Phase:
    """One phase at its worst moment."""

    name: str
    bytes: Bytes

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


@dataclass(frozen=True)
class MemoryPlan:
    """Peaks of a setup; on a GPU when one was given, else tensors alone."""

    setup: Setup
    phases: tuple[Phase, ...]
    gpu: GPU | None

    @cached_property
    def peak(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def margin(self) -> int:
        """Bytes of the GPU left at the peak; negative when it does not fit."""
        assert self.gpu is not None, "a margin is one of a GPU"
        return self.gpu.bytes - self.peak.total

    @property
    def fits(self) -> bool:
        return self.margin >= 0


def plan(setup: Setup, sources: Sources, gpu: GPU | None = None) -> MemoryPlan:
    """Predict the peak of every phase on each rank.

    Args:
        gpu: Adds what CUDA takes and the allocator's slack.
    """
    worst: dict[str, Bytes] = {}
    for name, moment in _moments(setup, sources):
        moment = {category: size for category, size in moment.items() if size}
        if name not in worst or sum(moment.values()) > sum(worst[name].values()):
            worst[name] = moment
    if gpu is not None:
        for moment in worst.values():
            moment["allocator slack"] = round(SLACK * sum(moment.values()))
            moment["CUDA context"] = context_bytes(setup.ranks)
    return MemoryPlan(setup, tuple(Phase(name, moment) for name, moment in worst.items()), gpu)


def _moments(setup: Setup, sources: Sources) -> Iterator[tuple[str, Bytes]]:
    """(phase, what lives) for every moment that may be a phase's worst."""
    groups, c, ranks = sources.groups(setup.group_size), setup.compute_bytes, setup.ranks
    shards = [group.length // ranks for group in groups]
    largest = max(shards)
    elements = sum(shards)
    whole: Bytes = {"weights": c * elements * ranks, "encoders": sources.encoder_bytes}
    started: Bytes = {**whole, "masters": MASTER_BYTES * elements}
    ema = MASTER_BYTES * elements if setup.ema else 0
    running: Bytes = {**started, "EMA": ema, "moments": _moment_bytes(groups, ranks)}
    gradients = c * max(sum(group.held_by(rank, ranks) for group in groups) for rank in range(ranks))
    # With accumulation the gradients so far wait beside those of the micro-batch at hand, in a buffer of the same size.
    waiting = gradients if setup.accumulation > 1 else 0

    yield "initialise", _flattening(whole, shards, c, ranks)
    # All of them at once, and then let go: DeepSpeed's way to make room for an optimizer that makes its state at the start.
    yield "initialise", {**started, "gradients": MASTER_BYTES * elements}
    yield "initialise", {**started, "EMA": ema}

    trace = sources.training(setup.checkpointing, setup.micro_batch)
    frames = min(setup.autoencoder_slice, setup.frames * setup.micro_batch)
    yield "forward", {**running, "gradients": waiting, "activations": sources.encode(frames)}
    yield "forward", {**running, "gradients": waiting, "activations": trace.forward_peak}

    for moment in _backward(trace, setup, gradients):
        yield "backward", {**running, **moment, "gradients": moment["gradients"] + waiting}

    # A group's gradients joined, in compute precision, and their fp32 copy; the joined one is the copy when they are fp32 already. The
    # buffer they come from goes only after the last group, since all groups share it.
    joined = MASTER_BYTES * largest + (c * largest if c != MASTER_BYTES else 0)
    norm = NORM_BYTES * max(size for group in groups for size in group.sizes)
    yield "step", {**running, "gradients": gradients, "fp32 working copies": max(joined, norm)}

    # Before a save each group's masters are compared with what compute precision holds: their absolute values and one byte of answer.
    yield "save", {**running, "fp32 working copies": 5 * largest}
    if setup.validates:
        yield "validation", {**running, "activations": sources.sampling(GUIDANCE_PASSES)}
        yield "validation", {**running, "activations": sources.decode(min(setup.autoencoder_slice, setup.frames))}
    # A run that goes back to its last checkpoint reads new moments while it still has the old ones.
    yield "resume", {**running, "moments": 2 * running["moments"]}


def _moment_bytes(groups: tuple[Group, ...], ranks: int) -> int:
    """Adam's two moments of one rank's part: 4 bytes each, or 1 and a float for each block of 256."""
    total = 0
    for group in groups:
        length = group.length // ranks
        total += 8 * length if group.bits == 32 else 2 * (length + 4 * -(-length // QUANTISATION_BLOCK))
    return total


def _flattening(whole: Bytes, shards: list[int], c: int, ranks: int) -> Bytes:
    """Group by group: a flat copy of the weights beside the tensors it replaces, then this rank's master, through a clone of its part."""
    working = [
        (MASTER_BYTES * sum(shards[:number]), max(c * shard * ranks, (MASTER_BYTES + c) * shard)) for number, shard in enumerate(shards)
    ]
    masters, copies = max(working, key=sum)
    return {**whole, "masters": masters, "fp32 working copies": copies}


def _backward(trace: TrainingTrace, setup: Setup, gradients: int) -> Iterator[Bytes]:
    """Gradients as they arrive: into a bucket, which is reduced when the next would not fit, and from there into the rank's own part.

    A gradient larger than a bucket stays where it is until the reduction. The rank's part is one buffer, made at the first reduction.
    With more than one rank a bucket is joined from pieces, in a copy, before it is sent.
    """
    c = setup.compute_bytes
    buffers = c * setup.reduce_bucket * (2 if setup.overlap_comm else 1)
    filled = large = held = 0
    buckets = 0
    for arrival in trace.arrivals:
        yield {"activations": arrival.peak, "buckets": buckets + c * large, "gradients": held}
        buckets = buffers
        if filled and filled + arrival.elements > setup.reduce_bucket:
            held = gradients
            sent = c * filled if setup.ranks > 1 else 0
            yield {"activations": arrival.live, "buckets": buckets + c * large + sent, "gradients": held}
            filled = large = 0
        else:
            yield {"activations": arrival.live, "buckets": buckets + c * large, "gradients": held}
        filled += arrival.elements
        large += arrival.elements if arrival.elements > setup.reduce_bucket else 0
    sent = c * filled if setup.ranks > 1 else 0
    yield {"activations": trace.backward_tail, "buckets": buckets + c * large + sent, "gradients": gradients}
