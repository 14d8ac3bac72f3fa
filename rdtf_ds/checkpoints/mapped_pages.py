"""Lets go of what was read of a memory-mapped file.

Whatever is read of a mapping stays with the process, and counts as its memory, for as long as the mapping lasts. The loaders of torch
and safetensors map a file as a whole and keep the mapping to themselves, so the kernel is asked directly (madvise(2)).
"""

from __future__ import annotations

import ctypes
import mmap
import os

from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)


def let_go(tensor: Tensor) -> None:
    """Take the pages that lie wholly within a contiguous ``tensor`` out of this process's memory.

    Of a mapped file nothing is lost: the next access reads it again. Not for tensors in memory of their own, which would become zeros.

    Raises:
        OSError: It is no memory of this process's.
    """
    page = mmap.PAGESIZE
    first = -(-tensor.data_ptr() // page) * page
    length = (tensor.data_ptr() + tensor.numel() * tensor.itemsize) // page * page - first
    if length > 0 and _libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_DONTNEED) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
