"""Which GPUs a compiled library has kernels for, read from the file: no GPU, no driver and no CUDA tools are needed.

nvcc puts its kernels into a library as "fat binaries": a header of 16 bytes, then one entry for each architecture, either machine code
(runs on GPUs of the same major version from that minor one on) or PTX (compiled by the driver, at first use, for any GPU as new or newer).
NVIDIA does not document the format. What is relied on here (magic number, sizes, the entry's kind and architecture) was compared with the
architectures that torch 2.10.0 and bitsandbytes 0.50.2 say they were built for, and agreed.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

_MAGIC = struct.pack("<I", 0xBA55ED50)
_HEADER = struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes of all entries
_ENTRY = struct.Struct("<HHIQ")  # kind, unknown, bytes of this entry's header, bytes of its code
_ARCHITECTURE_AT = 28  # bytes into an entry's header, an unsigned 32-bit number such as 70
_KINDS = {1: "compute", 2: "sm"}


def architectures(library: str | Path) -> tuple[str, ...]:
    """Architectures in the manner of ``torch.cuda.get_arch_list()``: ``("sm_70", "sm_75", "compute_75")``, machine code first.

    Empty for a library without kernels.

    Raises:
        OSError: the file cannot be read.
    """
    found: set[tuple[int, int]] = set()
    with open(library, "rb") as file:
        if not Path(library).stat().st_size:
            return ()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            at = data.find(_MAGIC)
            while at >= 0:
                found |= _entries(data, at)
                at = data.find(_MAGIC, at + len(_MAGIC))
    return tuple(f"{_KINDS[kind]}_{number}" for kind, number in sorted(found, key=lambda entry: (-entry[0], entry[1])))


def _entries(data: mmap.mmap, at: int) -> set[tuple[int, int]]:
    """(kind, architecture) of every entry behind a header; nothing where the magic number turns out to be other data."""
    found: set[tuple[int, int]] = set()
    if at + _HEADER.size > len(data):
        return found
    _, version, header_bytes, entries_bytes = _HEADER.unpack_from(data, at)
    end = at + header_bytes + entries_bytes
    if version != 1 or header_bytes != _HEADER.size or end > len(data):
        return found
    at += header_bytes
    while at + _ARCHITECTURE_AT + 4 <= end:
        kind, _, entry_bytes, code_bytes = _ENTRY.unpack_from(data, at)
        if kind not in _KINDS or entry_bytes < _ARCHITECTURE_AT + 4:
            break
        found.add((kind, struct.unpack_from("<I", data, at + _ARCHITECTURE_AT)[0]))
        at += entry_bytes + code_bytes
    return found
