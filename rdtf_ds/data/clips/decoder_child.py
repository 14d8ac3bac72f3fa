"""The process that decodes what may hang, crash or want all memory: it serves one request after the other and can be killed at any time.

Protocol. A request is one line of JSON on standard input. An answer is one line of JSON on standard output; its arrays lie one after the
other in memory that the parent shares, of fixed size. What does not fit, or comes bit by bit, makes several lines: after each but the
last the child waits for an empty line, as the parent has to take the arrays out first. While it reads a long video it says so, a line for
each MiB or more: the deadline holds from one line to the next.

    {"ready": true}                                   the child's first line; or {"unable": "why", "remedy": "what to do"}, and it ends
    {"id": 7, "do": "examine", "path": ..., "offset": 0, "length": null, "limits": {...}, "seconds": 20.0, ...}
    {"id": 7, "arrays": [], "read": 1048576, "last": false}
    {"id": 7, "arrays": [["thumbnails", "|u1", [9, 192]]], "answer": {...}, "last": true}
    {"id": 7, "arrays": [], "error": "it has no frames", "memory": false, "transient": false, "last": true}

Run as ``python -m rdtf_ds.data.clips.decoder_child FD BYTES PARENT``: the shared memory, the most memory it may have, the process to end
with (0: none).
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import math
import mmap
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rdtf_ds.data.clips.clip import ClipError, DecodeLimits, ExaminedClip, Place, Window
from rdtf_ds.data.clips.decoder_process import LEFT_TO_THE_PARENT
from rdtf_ds.data.clips.headers import SNIFFED_BYTES, VIDEO_FORMATS, sniff_format
from rdtf_ds.data.clips.places import open_regular, read_at, read_place
from rdtf_ds.processes import die_with_parent

Colour = tuple[int, int, int]
Answer = tuple[dict[str, Any], dict[str, np.ndarray]]
_GRACE_S = 5  # the parent kills at the deadline; this long after it the kernel does, should the parent be gone


def serve(requests: BinaryIO, answers: BinaryIO, memory: mmap.mmap) -> None:
    """Answer requests until the parent closes the pipe."""
    for line in requests:
        request = json.loads(line)
        channel = _Channel(request["id"], float(request["seconds"]), requests, answers, memory)
        channel.begin_deadline()
        try:
            channel.send_all(_perform(request, channel.tell_read))
        except ClipError as error:
            channel.fail(error.reason, memory=isinstance(error.__cause__, MemoryError), transient=error.transient)
        except _ParentLeft:
            return
        except Exception as error:  # decord and FFmpeg raise whatever they like: all of it means a broken clip, or no memory
            memory_short = _wants_memory(error)
            channel.fail(_words(error) if memory_short else f"does not decode: {_words(error)}", memory=memory_short)
        signal.alarm(0)


def _perform(request: dict[str, Any], tell_read: Callable[[int], None]) -> Iterator[Answer]:
    """The answers to a request."""
    place = Place(Path(request["path"]), request["offset"], request["length"])
    limits = DecodeLimits(**request["limits"])
    background: Colour = tuple(request["background"])
    video = _is_video(place)
    if request["do"] == "measure" or request["window"] or (request["do"] == "windows" and video):
        yield from _perform_on_long_video(request, place, limits, background, tell_read)
        return
    data = read_place(place, limits.max_bytes)
    decode: Callable[..., np.ndarray]
    examine: Callable[..., ExaminedClip]
    if video:
        from rdtf_ds.data.clips.video import decode, examine
    else:
        from rdtf_ds.data.clips.decoding import decode_image as decode
        from rdtf_ds.data.clips.decoding import examine_image as examine
    if request["do"] != "decode":
        yield _describe(examine(data, place, limits, background, request["describe_size"]))
    elif request["content"] not in (None, hashlib.sha256(data).hexdigest()):
        raise ClipError(place, "has changed since it was indexed")
    else:
        yield {}, {"frames": decode(data, place, request["size"], background, limits, frames=request["frames"])}


def _perform_on_long_video(
    request: dict[str, Any], place: Place, limits: DecodeLimits, background: Colour, tell_read: Callable[[int], None]
) -> Iterator[Answer]:
    from rdtf_ds.data.clips import video_windows

    video_windows.tell_reads_to(tell_read)
    if request["do"] == "measure":
        yield asdict(video_windows.measure(place)), {}
    elif request["do"] == "windows":
        seconds, most = request["window_seconds"], request["most_windows"]
        for clip in video_windows.examine_windows(place, limits, background, seconds, most, request["describe_size"]):
            yield _describe(clip)
    else:
        window = Window(*request["window"])
        wanted, content = request["frames"], request["content"]
        yield {}, {"frames": video_windows.decode_window(place, window, request["size"], background, limits, wanted, content)}


def _is_video(place: Place) -> bool:
    descriptor = open_regular(place.path)
    try:
        return sniff_format(read_at(descriptor, place.offset, SNIFFED_BYTES)) in VIDEO_FORMATS
    finally:
        os.close(descriptor)


def _describe(clip: ExaminedClip) -> Answer:
    info = asdict(clip.info)
    arrays = {"durations_ms": np.asarray(info.pop("durations_ms"), np.int64), "thumbnails": clip.thumbnails}
    if clip.frames is not None:
        arrays["frames"] = clip.frames
    return {"content": clip.content, "info": info, "window": asdict(clip.window) if clip.window else None}, arrays


class _ParentLeft(Exception):
    """No more requests will come."""


class _Channel:
    """Where the answers to one request go."""

    def __init__(self, number: int, seconds: float, requests: BinaryIO, answers: BinaryIO, memory: mmap.mmap) -> None:
        self._number, self._seconds, self._requests, self._answers, self._memory = number, seconds, requests, answers, memory
        self._arrays: list[tuple[str, str, tuple[int, ...]]] = []
        self._used = 0

    def begin_deadline(self) -> None:
        """From now on so many seconds of time, and as many of the processor. The parent keeps the time too; this holds without it."""
        signal.alarm(math.ceil(self._seconds) + _GRACE_S)
        used = resource.getrusage(resource.RUSAGE_SELF)
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        most = math.ceil(used.ru_utime + used.ru_stime + self._seconds + 1)
        resource.setrlimit(resource.RLIMIT_CPU, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))

    def send_all(self, answers: Iterator[Answer]) -> None:
        """Send every answer as it is made, at least one; only the last says that it is the last.

        Raises:
            ClipError: One row of an array is larger than the shared memory; and whatever making an answer raises.
            _ParentLeft: The parent closed the pipe before it had all.
        """
        pending = next(answers)
        for following in answers:
            self._send(pending, last=False)
            pending = following
        self._send(pending, last=True)

    def tell_read(self, count: int) -> None:
        """So many bytes of a long video were read: what reads on does not hang. Comes while an answer is made, when none is half sent.

        Raises:
            _ParentLeft: The parent closed the pipe.
        """
        self._line({"read": count, "last": False})

    def fail(self, reason: str, memory: bool = False, transient: bool = False) -> None:
        """End the request without an answer; arrays that were not sent yet are dropped.

        Args:
            reason: Without the clip's name, which the parent knows.
            memory: There was not enough memory.
            transient: As of `ClipError`.
        """
        self._arrays, self._used = [], 0
        self._line({"error": reason, "memory": memory, "transient": transient, "last": True})

    def _send(self, answer: Answer, last: bool) -> None:
        head, arrays = answer
        for name, array in arrays.items():
            self._put(name, np.ascontiguousarray(array))
        self._line({"answer": head, "last": last})

    def _put(self, name: str, array: np.ndarray) -> None:
        """Copy an array into the shared memory, by as many rows as there is room for at a time."""
        row = array[:1].nbytes
        if row > len(self._memory):
            raise ClipError("", f"one of its frames takes {row} bytes, and the decoder hands over {len(self._memory)} at most")
        while len(array):
            rows = (len(self._memory) - self._used) // row
            if rows == 0:
                self._line({"last": False})
                continue
            part, array = array[:rows], array[rows:]
            self._memory[self._used : self._used + part.nbytes] = part.tobytes()
            self._used += part.nbytes
            self._arrays.append((name, part.dtype.str, part.shape))

    def _line(self, line: dict[str, Any]) -> None:
        _write(self._answers, {"id": self._number, "arrays": self._arrays, **line})
        self._arrays, self._used = [], 0
        if not line["last"]:
            signal.alarm(0)  # the parent may take its time
            if not self._requests.readline():
                raise _ParentLeft
            self.begin_deadline()


def _write(answers: BinaryIO, line: dict[str, Any]) -> None:
    answers.write(json.dumps(line).encode() + b"\n")
    answers.flush()


def _words(error: Exception) -> str:
    """One line that is the same at any time; decord puts the hour and its source file in front."""
    text = (getattr(error, "strerror", None) or str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"^(\[[\d:]+\] \S+:\d+: )+", "", text)[:300]


def _wants_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM or "alloc" in str(error).lower()


class _Unable(Exception):
    """This process cannot decode any clip. Arguments: why, and what to do about it."""


def _limit_memory(most_bytes: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY and hard < most_bytes:  # with less, sound clips would be called too large
        why = f"it may have {hard >> 20} MiB of address space, and needs {most_bytes >> 20}"
        raise _Unable(why, f"Raise the limit: `ulimit -v unlimited` or at least `ulimit -v {most_bytes >> 10}`.")
    resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _load_decoders() -> None:
    """Before any clip is at hand that a broken library could be blamed on."""
    try:
        for name in ("decoding", "video", "video_windows"):
            importlib.import_module(f"rdtf_ds.data.clips.{name}")
    except Exception as error:  # ImportError, OSError of a library, RuntimeError of decord: none of them is about a clip
        why = f"a library cannot be loaded ({type(error).__name__}: {_words(error)})"
        raise _Unable(why, "Install the packages anew: `make clean venv`.") from error


def main(arguments: list[str]) -> None:
    """Limit this process and serve."""
    descriptor, most_bytes, parent = (int(argument) for argument in arguments)
    if parent:
        die_with_parent(parent)
    for number in LEFT_TO_THE_PARENT:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, LEFT_TO_THE_PARENT)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever decoders print must not enter the protocol
    try:
        _limit_memory(most_bytes)
        _load_decoders()
    except _Unable as error:
        why, remedy = error.args
        _write(answers, {"unable": why, "remedy": remedy})
        sys.exit(1)
    with mmap.mmap(descriptor, os.fstat(descriptor).st_size) as memory:
        _write(answers, {"ready": True})
        serve(sys.stdin.buffer, answers, memory)


if __name__ == "__main__":
    main(sys.argv[1:])
