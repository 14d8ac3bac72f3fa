"""The CPU as device: resident memory of a rank above that of the process once everything is imported and nothing built.

A run on a CPU has the tensors of one on a GPU and, in the same memory, what a GPU's kernels need nothing for. bitsandbytes updates on a CPU
in plain PyTorch operations, whose results were counted in its source (0.50, ``backends/cpu/ops.py``). What is not a tensor, such as
code that oneDNN compiles for each shape and libraries that are loaded when first used, is a constant here and was measured
(docs/memory.md).

That memory which was let go is the system's again, and not kept for later by glibc, is `rdtf_ds.training.allocator`'s doing.
"""

from __future__ import annotations

from collections.abc import Iterator

from rdtf_ds.memory.planner import Bytes, Group, MemoryPlan, Phase, Setup, Sources, host_bytes, moments, worst_moments

UPDATE_BYTES = {8: 20, 32: 12}
"""For each element that bitsandbytes updates on a CPU, beside master, moments and gradient. 8 bits: both moments in fp32, the scaled
gradient, the root of the second moment, that root corrected (4 bytes each). 32 bits: the scaled gradient, the root, the root with ε
or the quotient."""
STARTED_BYTES = 75_000_000
"""Libraries and Python modules that the building of a run loads, its index of clips, its lists of parameters. Measured."""
RUNNING_BYTES = 125_000_000
"""The same once it steps. Measured."""
COMPILED_BYTES = 57_000_000
"""What oneDNN compiles and remembers for one number of frames. It keeps a thousand such kernels, about those of six. Measured."""


def update_bytes(group: Group, ranks: int) -> int:
    """What bitsandbytes allocates on a CPU while it updates one rank's part of a group."""
    return UPDATE_BYTES[group.bits] * (group.length // ranks)


def plan_on_cpu(setup: Setup, sources: Sources) -> MemoryPlan:
    """Predict the peak of every phase of one rank, resident bytes, with everything that waits on the CPU among them."""
    worst = worst_moments(_moments(setup, sources))
    return MemoryPlan(setup, tuple(Phase(name, moment) for name, moment in worst.items()), None)


def _moments(setup: Setup, sources: Sources) -> Iterator[tuple[str, Bytes]]:
    waits = host_bytes(setup, sources)
    everything = sum(sources.encoders.values())
    if setup.encoders == "cpu":
        waits["encoders"] = everything  # they visit where they are
    elements = sum(sum(group.sizes) for group in sources.groups(setup.group_size))
    # The network as it is made, in fp32; each parameter is cast by itself.
    at_start = 0 if setup.encoders == "cached" else everything
    yield "initialise", {"weights": 4 * elements, "encoders": at_start, "libraries": STARTED_BYTES}
    for name, moment in moments(setup, sources, update_bytes, on_cpu=True):
        if setup.encoders == "cached":
            # The first validation loads them, and they stay; before it there are none.
            moment = {**moment, "encoders": 0}
            waits["encoders"] = everything if setup.validates and name != "initialise" else 0
        libraries = STARTED_BYTES if name == "initialise" else RUNNING_BYTES + setup.frame_counts * COMPILED_BYTES
        yield name, {key: moment.get(key, 0) + waits.get(key, 0) for key in {**moment, **waits}} | {"libraries": libraries}
