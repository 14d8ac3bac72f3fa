"""What glibc does with memory that is let go, on a CPU, where it is the memory that counts.

glibc starts with giving every block of 128 KiB or more back to the system as soon as it is freed, and then raises that bound, up to
32 MiB, to whatever it has seen freed. Tensors smaller than that end up in one heap with holes that nothing fits: measured, 740 MB of
3.2 GB (a network of 251 M parameters, two steps). Here the bound stays where it starts.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
STARTING_BOUND = 128 * 1024
"""glibc's own for both."""


def give_freed_memory_back() -> bool:
    """Hold glibc to the bounds it starts with, for the rest of this process; False where the C library is another."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, STARTING_BOUND)) and bool(mallopt(_M_TRIM_THRESHOLD, STARTING_BOUND))
