"""A decoder that does to its process what the name of the clip says, in the place of the package's own; other clips it decodes.

``decode_`` before a trick leaves examining alone, so that a clip passes as sound until it is trained on.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from rdtf_ds.data.clips import decoder_child, video
from rdtf_ds.data.clips.clip import Place


def sleeps() -> None:
    time.sleep(1e6)


def sleeps_deaf() -> None:
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    time.sleep(1e6)


def stops() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def spins() -> None:
    while True:
        pass


def segfaults() -> None:
    ctypes.string_at(0)


def aborts() -> None:
    os.abort()


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def exits() -> None:
    os._exit(3)


def allocates_10_gb() -> None:
    bytearray(10 * 2**30)


def allocates_bit_by_bit() -> None:
    hoard = []
    while len(hoard) < 640:
        hoard.append(np.ones(2**21))  # 16 MiB that are really used


def runs_out_in_c() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    libc.memset(libc.malloc(10 * 2**30), 1, 2**20)  # as a library that never looks at what malloc returns


def writes(text: bytes, times: int = 1) -> None:
    """Into every pipe but standard input: one of them leads to the parent."""
    for _ in range(times):
        for descriptor in range(3, 32):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/self/fd/{descriptor}").startswith("pipe:"):
                    os.write(descriptor, text)


def writes_garbage() -> None:
    writes(b"\xff\0{not json\n")


def writes_a_list() -> None:
    writes(b"[1, 2]\n")


def writes_without_end() -> None:
    writes(b"x" * 2**16, 1000)


def writes_two_answers() -> None:
    writes(b'{"id": 1, "arrays": [], "answer": {}, "last": true}\n' * 2)


def answers_wrongly() -> None:
    writes(b'{"id": 1, "arrays": [["frames", "|O", [1]]], "answer": {}, "last": true}\n')


def answers_too_much() -> np.ndarray:
    return np.zeros((400, 512, 512, 3), np.uint8)


def answers_another_shape() -> np.ndarray:
    return np.zeros((2, 8, 8, 3), np.uint8)


def cuts_the_memory() -> None:
    """The parent must not be able to fall into what a child has cut away: the kernel refuses, and the clip is decoded."""
    for descriptor in range(3, 32):
        with contextlib.suppress(OSError):
            if "memfd" in os.readlink(f"/proc/self/fd/{descriptor}"):
                os.ftruncate(descriptor, 0)
                sleeps()


def spoils_the_next() -> Any:
    """Decodes, but whoever comes after it meets a process in ruins."""
    spoilt.append(True)
    return None


spoilt: list[bool] = []


def instead_of(real: Callable[..., Any], prefixes: tuple[str, ...]) -> Callable[..., Any]:
    def decoder(data: bytes, place: Place, *arguments: Any, **more: Any) -> Any:
        if spoilt:
            segfaults()
        for prefix in prefixes:
            name = place.path.stem.removeprefix(prefix)
            if place.path.stem.startswith(prefix) and (trick := globals().get(name)) is not None:
                answer = trick()
                return real(data, place, *arguments, **more) if answer is None else answer
        return real(data, place, *arguments, **more)

    return decoder


if __name__ == "__main__":
    video.decode = instead_of(video.decode, ("", "decode_"))
    video.examine = instead_of(video.examine, ("",))
    decoder_child.main(sys.argv[1:])
