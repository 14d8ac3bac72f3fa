"""GPUs the planner knows. No figure here was measured by this project: it has been run on machines without a GPU only.

Total bytes are what PyTorch reports as "total capacity" in the out-of-memory messages people post, the smallest seen of each card where
drivers and ECC differ. Looked up: 31.74 GiB (V100-32GB), 15.78 (V100-16GB), 14.56 (T4), 11.60 (a 12 GB card), 7.78 (an 8 GB card),
23.61 to 23.68 (RTX 4090), 23.69 and 23.70 (RTX 3090), 39.50 and 39.59 (A100-40GB), 79.25 (A100-80GB). Those of the P100 and A10 are from
memory of such messages: none was found. It is a little less than what is printed on the box, and a desktop drawn on the same card takes
its own part of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from rdtf_ds.errors import UserError

GIB, MIB = 2**30, 2**20

CONTEXT_BYTES = 700 * MIB
"""CUDA context with the kernels it loads, and the workspaces of cuBLAS and cuDNN. Posts speak of 300 to 720 MiB for the context."""
NCCL_BYTES = 300 * MIB
"""Channels and buffers of NCCL, as soon as there is more than one rank."""


@dataclass(frozen=True)
class GPU:
    """One kind of card.

    Attributes:
        name: What ``--gpu`` takes.
        bytes: Usable in all, the context among them.
        capability: Compute capability; bf16 needs (8, 0).
    """

    name: str
    bytes: int
    capability: tuple[int, int]


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("8gb", int(7.78 * GIB), (8, 6)),
        GPU("rtx3060", int(11.60 * GIB), (8, 6)),
        GPU("t4", int(14.56 * GIB), (7, 5)),
        GPU("v100-16gb", int(15.77 * GIB), (7, 0)),
        GPU("p100", int(15.89 * GIB), (6, 0)),
        GPU("a10", int(22.06 * GIB), (8, 6)),
        GPU("rtx4090", int(23.61 * GIB), (8, 9)),
        GPU("rtx3090", int(23.68 * GIB), (8, 6)),
        GPU("v100-32gb", int(31.74 * GIB), (7, 0)),
        GPU("a100-40gb", int(39.39 * GIB), (8, 0)),
        GPU("a100-80gb", int(79.14 * GIB), (8, 0)),
    )
}
"""By name, small to large."""


def find_gpu(name: str) -> GPU:
    """The card of that name, in any case.

    Raises:
        UserError: Unknown; the message names those there are.
    """
    gpu = GPUS.get(name.lower())
    if gpu is None:
        raise UserError(f"--gpu {name}: known are {', '.join(GPUS)}. For another card take one with as much memory.")
    return gpu


def context_bytes(ranks: int) -> int:
    """What is gone on each card before the first tensor is made."""
    return CONTEXT_BYTES + (NCCL_BYTES if ranks > 1 else 0)
