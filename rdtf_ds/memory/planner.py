"""The peak of every phase of a run on one rank, by category: plain arithmetic over what DeepSpeed's ZeRO-2 and bitsandbytes allocate.

The terms were read in the source of DeepSpeed 0.19 (``runtime/zero/stage_1_and_2.py``) and bitsandbytes 0.50; where they surprise, a
comment says so. Bytes of activations come from `rdtf_ds.memory.activations`. Nothing here was measured on a GPU.

Legend: P parameters with padding, W ranks, A micro-batches of a step (accumulation), c bytes of a number in compute precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from rdtf_ds.memory import pcie
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
AUTOENCODER = "autoencoder"

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
        """Elements of the flat group on all ranks together, padding included."""
        return sum(self.sizes) + self.padding

    @property
    def largest(self) -> int:
        """Elements of its largest parameter."""
        return max(self.sizes)


@dataclass(frozen=True)
class Sources:
    """Where sizes come from that a lever may change.

    Attributes:
        groups: Of a group size.
        training: Of an activation checkpointing mode and a micro-batch.
        sampling: Bytes one pass over so many clips has alive without graph.
        encode, decode: The same of the autoencoder, for so many frames at once.
        encoders: Bytes of the weights of each frozen encoder, the autoencoder's under `AUTOENCODER`.
    """

    groups: Callable[[int], tuple[Group, ...]]
    training: Callable[[str, int], TrainingTrace]
    sampling: Callable[[int], int]
    encode: Callable[[int], int]
    decode: Callable[[int], int]
    encoders: dict[str, int]


@dataclass(frozen=True)
class Setup:
    """What the config and the command line say; buckets count elements.

    Attributes:
        compute_bytes: Of one number: 2 for fp16 and bf16, 4 for fp32.
        ema: ``gpu``, ``cpu`` or ``off``.
        encoders: ``resident``, ``cpu`` (each visits the GPU for its pass) or ``cached`` (none while training, visits in validation).
        offload_optimizer: Masters, moments and gradients wait in CPU memory.
        grad_bytes: Of one number of the summed gradients; 0: as in compute precision.
        frame_counts: How many different numbers of frames steps have: a CPU's kernels are compiled for each.
        video_decoders: Processes of a rank that decode videos (`rdtf_ds.memory.video_decoders`). Told in reports, in no phase.
    """

    ranks: int
    global_batch: int
    micro_batch: int
    compute_bytes: int
    group_size: int
    ema: str
    checkpointing: str
    autoencoder_slice: int
    frames: int
    reduce_bucket: int
    overlap_comm: bool
    validates: bool
    encoders: str = "resident"
    offload_optimizer: bool = False
    grad_bytes: int = 0
    frame_counts: int = 1
    video_decoders: int = 0

    @property
    def accumulation(self) -> int:
        """A."""
        return self.global_batch // (self.micro_batch * self.ranks)

    @property
    def gradient_bytes(self) -> int:
        """Of one number of the summed gradients."""
        return self.grad_bytes or self.compute_bytes


@dataclass(frozen=True)
class Phase:
    """One phase at its worst moment."""

    name: str
    bytes: Bytes

    @property
    def total(self) -> int:
        """Bytes of all categories."""
        return sum(self.bytes.values())


@dataclass(frozen=True)
class MemoryPlan:
    """Peaks of a setup; on a GPU when one was given, else tensors alone.

    Attributes:
        gpu: None for the CPU as device, and for tensors alone.
        host: Bytes of CPU memory of one rank by category, which levers moved there; empty on the CPU as device.
        seconds: Of a step, that each lever in use costs over PCIe and on the CPU (`rdtf_ds.memory.pcie`).
    """

    setup: Setup
    phases: tuple[Phase, ...]
    gpu: GPU | None
    host: Bytes = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

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
        """Whether the peak is no more than the GPU has; asked of a plan for a GPU alone."""
        return self.margin >= 0


def plan(setup: Setup, sources: Sources, gpu: GPU | None = None, rates: pcie.Rates = pcie.DEFAULT) -> MemoryPlan:
    """Predict the peak of every phase on each rank.

    Args:
        gpu: Adds what CUDA takes and the allocator's slack.
        rates: At which bytes move to the CPU and there.
    """
    worst = worst_moments(moments(setup, sources))
    if gpu is not None:
        for moment in worst.values():
            moment["allocator slack"] = round(SLACK * sum(moment.values()))
            moment["CUDA context"] = context_bytes(setup.ranks)
    phases = tuple(Phase(name, moment) for name, moment in worst.items())
    return MemoryPlan(setup, phases, gpu, host_bytes(setup, sources), seconds(setup, sources, rates))


def worst_moments(found: Iterable[tuple[str, Bytes]]) -> dict[str, Bytes]:
    """Of each phase the moment with the largest sum, in the order in which phases begin."""
    worst: dict[str, Bytes] = {}
    for name, moment in found:
        moment = {category: size for category, size in moment.items() if size}
        if name not in worst or sum(moment.values()) > sum(worst[name].values()):
            worst[name] = moment
    return worst


@dataclass(frozen=True)
class _Kept:
    """Bytes of summed gradients before a backward pass, after it, and of the largest group, whose buffer is made with its first one."""

    waiting: int
    summed: int
    group: int


Update = Callable[[Group, int], int]


def _nothing(group: Group, ranks: int) -> int:
    return 0


def moments(setup: Setup, sources: Sources, update: Update = _nothing, on_cpu: bool = False) -> Iterator[tuple[str, Bytes]]:
    """(phase, what lives) for every moment that may be a phase's worst.

    Args:
        update: Bytes the optimizer needs beside masters, moments and the fp32 gradient while it updates one rank's part of a group.
        on_cpu: Buffers count as far as they were written.
    """
    groups, c, ranks = sources.groups(setup.group_size), setup.compute_bytes, setup.ranks
    shards = [group.length // ranks for group in groups]
    elements = sum(shards)
    resident = sum(sources.encoders.values()) if setup.encoders == "resident" else 0
    whole: Bytes = {"weights": c * elements * ranks, "encoders": resident}
    if setup.offload_optimizer:
        # One buffer through which a parameter's accumulated gradient comes back to be added to.
        whole["gradients"] = c * max(group.largest for group in groups)
    started: Bytes = {**whole, "masters": 0 if setup.offload_optimizer else MASTER_BYTES * elements}
    ema = MASTER_BYTES * elements if setup.ema == "gpu" and not setup.offload_optimizer else 0
    held = 0 if setup.offload_optimizer else _moment_bytes(groups, ranks)
    running: Bytes = {**started, "EMA": ema, "moments": held}

    yield "initialise", _flattening(whole, shards, setup)
    if not setup.offload_optimizer:
        # All of them at once, and then let go: DeepSpeed's way to make room for an optimizer that makes its state at the start.
        yield "initialise", {**started, "gradients": MASTER_BYTES * elements}
    yield "initialise", {**started, "EMA": ema}

    # One buffer of this rank's part sums the micro-batches of a step, and stays between them.
    summed = whole["gradients"] if setup.offload_optimizer else setup.gradient_bytes * elements
    waiting = whole.get("gradients", 0) if setup.offload_optimizer or setup.accumulation == 1 else summed
    trace = sources.training(setup.checkpointing, setup.micro_batch)
    frames = min(setup.autoencoder_slice, setup.frames * setup.micro_batch)
    forward = {**running, "gradients": waiting}
    for visitor in _visitors(setup, sources.encoders):
        yield "forward", {**forward, "encoders": resident + visitor}
    if setup.encoders != "cached":
        visitor = sources.encoders.get(AUTOENCODER, 0) if setup.encoders == "cpu" else 0
        yield "forward", {**forward, "encoders": resident + visitor, "activations": sources.encode(frames)}
    yield "forward", {**forward, "activations": trace.forward_peak}

    kept = _Kept(waiting, summed, setup.gradient_bytes * max(shards))
    for moment in _backward(trace, setup, kept, max(group.largest for group in groups), on_cpu):
        yield "backward", {**running, **moment}

    yield from (("step", {**running, **moment}) for moment in _step(setup, groups, summed, update))

    # Before a save each group's masters are compared with what compute precision holds: their absolute values and one byte of answer.
    yield "save", {**running, "fp32 working copies": 0 if setup.offload_optimizer else 5 * max(shards)}
    if setup.validates:
        # Encoders that do not stay come for their pass; of a run from a cache only the autoencoder does, text is encoded on the CPU.
        visitor = 0 if setup.encoders == "resident" else sources.encoders.get(AUTOENCODER, 0)
        yield "validation", {**running, "activations": sources.sampling(GUIDANCE_PASSES)}
        decoding = {"encoders": resident + visitor, "activations": sources.decode(min(setup.autoencoder_slice, setup.frames))}
        yield "validation", {**running, **decoding}
    # Moments read from a checkpoint become the live ones; those of a run that goes back were let go before. Masters come group by group.
    yield "resume", {**running, "fp32 working copies": 0 if setup.offload_optimizer else MASTER_BYTES * max(shards)}


def host_bytes(setup: Setup, sources: Sources) -> Bytes:
    """CPU memory of one rank that levers take on a machine with GPUs; most of it page-locked."""
    groups, c, ranks = sources.groups(setup.group_size), setup.compute_bytes, setup.ranks
    elements = sum(group.length for group in groups) // ranks
    found: Bytes = {}
    if setup.offload_optimizer:
        found |= {"masters": MASTER_BYTES * elements, "moments": 8 * elements}
        # fp32 for the step, what is summed before it, and a parameter's buffer; the weights pass through a copy of their own.
        largest = max(group.largest for group in groups)
        found["gradients"] = (MASTER_BYTES + (c if setup.accumulation > 1 else 0)) * elements + c * largest
        found["weights"] = c * elements
    if setup.ema == "cpu" or (setup.ema == "gpu" and setup.offload_optimizer):
        found["EMA"] = MASTER_BYTES * elements
        if not setup.offload_optimizer:
            found["EMA"] += MASTER_BYTES * max(group.length // ranks for group in groups)  # masters come through one buffer
    if setup.encoders == "cpu" or (setup.encoders == "cached" and setup.validates):
        found["encoders"] = sum(sources.encoders.values())
    if host := sources.training(setup.checkpointing, setup.micro_batch).host:
        found["activations"] = host
    return found


def seconds(setup: Setup, sources: Sources, rates: pcie.Rates = pcie.DEFAULT) -> dict[str, float]:
    """Of a step, by lever: what moving bytes to CPU memory costs."""
    elements = sum(group.length for group in sources.groups(setup.group_size)) // setup.ranks
    passes, found = setup.accumulation, {}
    if setup.offload_optimizer:
        found["zero_optimization.offload_optimizer"] = pcie.offload_seconds(elements, setup.compute_bytes, passes, rates)
    if setup.ema == "cpu":
        found["rdtf.ema.device"] = pcie.ema_seconds(elements, not setup.offload_optimizer, rates)
    if setup.encoders == "cpu":
        found["rdtf.memory.encoders"] = pcie.encoder_seconds(sum(sources.encoders.values()), passes, rates)
    if setup.checkpointing == "blocks_cpu_offload":
        trace = sources.training(setup.checkpointing, setup.micro_batch)
        found["rdtf.memory.activation_checkpointing"] = pcie.activation_seconds(trace, passes, rates)
    return found


def _visitors(setup: Setup, encoders: dict[str, int]) -> list[int]:
    """Bytes of the encoders that come to the device one after the other while a micro-batch is encoded."""
    return list(encoders.values()) if setup.encoders == "cpu" else []


def _moment_bytes(groups: tuple[Group, ...], ranks: int) -> int:
    """Adam's two moments of one rank's part: 4 bytes each, or 1 and a float for each block of 256."""
    total = 0
    for group in groups:
        length = group.length // ranks
        total += 8 * length if group.bits == 32 else 2 * (length + 4 * -(-length // QUANTISATION_BLOCK))
    return total


def _flattening(whole: Bytes, shards: list[int], setup: Setup) -> Bytes:
    """Group by group: a flat copy of the weights beside the tensors it replaces, then this rank's master, through a clone of its part."""
    c, ranks = setup.compute_bytes, setup.ranks
    kept = 0 if setup.offload_optimizer else MASTER_BYTES
    working = [(kept * sum(shards[:number]), max(c * shard * ranks, (kept + c) * shard)) for number, shard in enumerate(shards)]
    masters, copies = max(working, key=sum)
    return {**whole, "masters": masters, "fp32 working copies": copies}


def _backward(trace: TrainingTrace, setup: Setup, kept: _Kept, largest: int, on_cpu: bool) -> Iterator[Bytes]:
    """Gradients as they arrive: into a bucket, which is reduced when the next would not fit, and from there into the rank's own part.

    A gradient larger than a bucket stays where it is until the reduction. With more than one rank a bucket is joined from pieces, in a
    copy, before it is sent; where the sum is wider than the bucket, before it is added. On a CPU a buffer is resident as far as it was
    written; a GPU's is whole from the start.
    """
    c = setup.compute_bytes
    wider = setup.gradient_bytes != c
    # On its way to the CPU a gradient becomes fp32, and its norm is taken in a wider copy still.
    leaving = NORM_BYTES * largest if setup.offload_optimizer else 0
    whole = c * setup.reduce_bucket * (2 if setup.overlap_comm else 1)
    filled = large = reduced = written = 0
    buckets, held = 0, kept.waiting

    def moment(activations: int, sent: int = 0) -> Bytes:
        """Bytes alive by category; ``sent``: of the copy that is on its way to other ranks or into a wider sum."""
        return {"activations": activations, "buckets": buckets + c * large + sent, "gradients": held, "fp32 working copies": leaving}

    def reduction(live: int) -> Iterator[Bytes]:
        """Before what waits in the bucket is summed, and after; ``live``: bytes of activations meanwhile."""
        nonlocal held, reduced
        sent = c * filled if setup.ranks > 1 or wider else 0
        yield moment(live, sent)
        reduced += filled
        made = setup.gradient_bytes * reduced // setup.ranks + (0 if on_cpu else kept.group)
        held = max(kept.waiting, min(kept.summed, made))
        yield moment(live, sent if wider else 0)

    for arrival in trace.arrivals:
        yield moment(arrival.peak)
        if filled and filled + arrival.elements > setup.reduce_bucket:
            yield from reduction(arrival.live)
            filled = large = 0
        filled += arrival.elements
        if arrival.elements > setup.reduce_bucket:
            large += arrival.elements
        else:
            written = max(written, filled)
        buckets = c * written if on_cpu else whole
        yield moment(arrival.live)
    yield from reduction(trace.backward_tail)
    held = kept.summed
    yield moment(trace.backward_tail)


def _step(setup: Setup, groups: tuple[Group, ...], summed: int, update: Update) -> Iterator[Bytes]:
    """The norm of all gradients, then group by group: its gradients in fp32, the update, and its part of the sums is let go."""
    if setup.offload_optimizer:
        yield {}
        return
    yield {"gradients": summed, "fp32 working copies": NORM_BYTES * max(group.largest for group in groups)}
    left = summed
    for group in groups:
        own = setup.gradient_bytes * (group.length // setup.ranks)
        fp32 = 0 if setup.gradient_bytes == MASTER_BYTES else MASTER_BYTES * (group.length // setup.ranks)
        yield {"gradients": left, "fp32 working copies": fp32}
        if fp32:
            left -= own  # what they were cast from is let go before the update, else with it
        yield {"gradients": left, "fp32 working copies": fp32 + update(group, setup.ranks)}
        if not fp32:
            left -= own
