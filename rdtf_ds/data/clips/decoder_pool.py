"""Decodes clips in children that can be killed: what may hang, crash or want all memory does so there.

A clip is blamed only for what it does to a fresh child: where a child that has decoded other clips before dies, the clip at hand is tried
once more in a new one, so that what becomes of a clip never depends on those before it.
"""

from __future__ import annotations

import atexit
import itertools
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from rdtf_ds.data.clips import decoder_process
from rdtf_ds.data.clips.clip import ClipError, ClipInfo, DecodeLimits, ExaminedClip, Place, VideoLength, Window, as_place
from rdtf_ds.data.clips.decoder_process import Answer, ChildFailed, DecoderProcess
from rdtf_ds.data.clips.frame_features import THUMBNAIL_DIM
from rdtf_ds.data.clips.places import place_size

_Colour = tuple[int, int, int]
MAX_WINDOWS = 10_000
"""The most clips that one video is split into."""
_WHITE = (255, 255, 255)
_READ_TIMES = 64  # that a long video may be read: a few times from end to end, and again and again where it is badly interleaved


class PoolClosed(RuntimeError):
    """A request to a pool that was closed before or meanwhile."""


class DecoderPool:
    """Up to ``size`` children, started when they are needed. Thread-safe: requests beyond that wait their turn. A context manager.

    Requests raise :class:`ClipError`, ``transient`` where a deadline or the machine is to blame, not the clip; `DecoderUnavailable`
    where no child works, which says nothing of any clip; and :class:`PoolClosed`.

    Args:
        command: starts a child; None: the decoder of this package.
        memory_bytes: the most address space of a child.
    """

    def __init__(self, size: int = 1, command: tuple[str, ...] | None = None, memory_bytes: int = 2 * 2**30) -> None:
        self._size, self._command, self._memory_bytes = size, command, memory_bytes
        self._lock, self._turn = threading.Lock(), threading.BoundedSemaphore(size)
        self._idle: list[DecoderProcess] = []
        self._children: set[DecoderProcess] = set()
        self._closed = False
        _pools.add(self)

    def examine(
        self, where: str | Path | Place, limits: DecodeLimits, background: _Colour = _WHITE, describe_size: int | None = None
    ) -> ExaminedClip:
        """Decode every frame of a clip of any format once.

        Args:
            describe_size: also keep the thinned frames, letterboxed to this side, as ``frames``.
        """
        place = as_place(where)
        request = {"do": "examine", "background": background, "describe_size": describe_size}
        return _examined(place, self._ask_once(place, request, limits, _examined_bytes(limits, describe_size)))

    def examine_windows(
        self, where: str | Path | Place, limits: DecodeLimits, background: _Colour, seconds: float, describe_size: int | None = None
    ) -> Iterator[ExaminedClip]:
        """Decode a video from end to end, once, and yield each stretch of ``seconds`` of it, as soon as it is known; of images, the whole.

        The deadline and the limits apply to each stretch, ``limits.max_bytes`` does not. The deadline is counted anew from each MiB that is
        read, as all of the file is before the first stretch.
        Pixels are PyAV's; those of whole videos are decord's.
        """
        place = as_place(where)
        request = {"do": "windows", "background": background, "describe_size": describe_size, "window_seconds": seconds}
        request["most_windows"] = MAX_WINDOWS
        most_bytes = _examined_bytes(limits, describe_size)
        for number, answer in enumerate(self._ask(place, request, limits, most_bytes, _READ_TIMES * place_size(place))):
            if number == MAX_WINDOWS:
                raise _nonsense(place)
            yield _examined(place, answer)

    def measure(self, where: str | Path | Place, limits: DecodeLimits) -> VideoLength:
        """How long a video is; nothing of it is decoded."""
        place = as_place(where)
        head = self._ask_once(place, {"do": "measure"}, limits, 0, _READ_TIMES * place_size(place)).head
        try:
            return VideoLength(int(head["frames"]), float(head["seconds"]))
        except (KeyError, TypeError, ValueError):
            raise _nonsense(place) from None

    def decode(
        self, where: str | Path | Place, size: int, background: _Colour, limits: DecodeLimits,
        frames: Sequence[int] | None = None, content: str | None = None, window: Window | None = None,
    ) -> np.ndarray:  # fmt: skip
        """uint8 (n, size, size, 3): a clip's thinned frames, letterboxed.

        Args:
            frames: positions among the thinned frames, in any order, repeats allowed; None: all.
            content: SHA-256 that the bytes must have; of a window, over that of the file and where it lies (`ExaminedClip.content`).
            window: of a long video, the stretch that is the clip. A child that meets a file reads all of it; the deadline is counted anew
                from each MiB of that.
        """
        place = as_place(where)
        request: dict[str, Any] = {"do": "decode", "size": size, "background": background, "content": content}
        request["frames"] = None if frames is None else [int(frame) for frame in frames]
        request["window"] = None if window is None else [window.first, window.count]
        most = limits.max_frames if frames is None else len(frames)
        most_read = 0 if window is None else _READ_TIMES * place_size(place)
        pixels = self._ask_once(place, request, limits, most * 3 * size**2, most_read).arrays.get("frames")
        if pixels is None or pixels.shape[1:] != (size, size, 3) or (frames is not None and len(pixels) != len(frames)):
            raise _nonsense(place)
        return pixels

    def close(self) -> None:
        """End all children, those at work and those being started too: no request is served any more."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            busy = self._children - set(idle)
            self._children = busy
        for child in idle:
            child.kill()
        for child in busy:
            child.strike()  # whoever uses it notices, and clears up

    def __enter__(self) -> DecoderPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _abandon(self) -> None:
        """In a process forked from the one that has the children: leave them to it."""
        for child in self._children:
            child.forget()
        self._lock, self._turn = threading.Lock(), threading.BoundedSemaphore(self._size)
        self._idle, self._children = [], set()

    def _ask_once(self, place: Place, request: dict[str, Any], limits: DecodeLimits, most_bytes: int, most_read: int = 0) -> Answer:
        answers = list(itertools.islice(self._ask(place, request, limits, most_bytes, most_read), 2))
        if len(answers) != 1:
            raise _nonsense(place)
        return answers[0]

    def _ask(self, place: Place, request: dict[str, Any], limits: DecodeLimits, most_bytes: int, most_read: int) -> Iterator[Answer]:
        where = {"path": os.path.abspath(place.path), "offset": place.offset, "length": place.length}
        request = {**where, "limits": asdict(limits), "background": _WHITE, "window": None, **request}
        with self._turn:
            while True:
                child, heard = self._take_child(), False
                fresh = child.served == 0
                try:
                    for answer in child.ask(request, limits.timeout_s, most_bytes, most_read):
                        if answer.error is not None:
                            raise ClipError(place, answer.error, answer.transient)
                        heard = True
                        yield answer
                    return
                except ChildFailed as failure:
                    if self._closed:
                        raise PoolClosed(f"the decoder was closed while it read '{place}'") from None
                    if fresh or heard or failure.outside:
                        raise ClipError(place, failure.reason, transient=failure.outside) from None
                finally:
                    self._return_child(child)

    def _take_child(self) -> DecoderProcess:
        """A child that nobody else uses. A death between requests is no clip's fault."""
        while True:
            with self._lock:
                if self._closed:
                    raise PoolClosed("the decoder is closed")
                child = self._idle.pop() if self._idle else None
            if child is None:
                child = DecoderProcess(self._command or decoder_process.COMMAND, self._memory_bytes)
                with self._lock:
                    closed = self._closed  # meanwhile
                    if not closed:
                        self._children.add(child)
                if not closed:
                    return child
                child.kill()
                raise PoolClosed("the decoder is closed")
            if child.alive:
                return child
            self._return_child(child)

    def _return_child(self, child: DecoderProcess) -> None:
        """For the next request, or into the ground if it is dead or was left in the middle of an answer."""
        usable = child.alive and not child.busy
        with self._lock:
            usable = usable and not self._closed
            if usable:
                self._idle.append(child)
            else:
                self._children.discard(child)
        if not usable:
            child.kill()


def _examined(place: Place, answer: Answer) -> ExaminedClip:
    head, arrays = answer.head, answer.arrays
    try:
        durations, thumbnails, window = arrays["durations_ms"], arrays["thumbnails"], head["window"]
        info = ClipInfo(**head["info"], durations_ms=tuple(durations.tolist()))
        if len(durations) != info.num_frames or thumbnails.shape[1:] != (THUMBNAIL_DIM,):
            raise ValueError("lengths")
        return ExaminedClip(str(head["content"]), info, thumbnails, None if window is None else Window(**window), arrays.get("frames"))
    except (KeyError, TypeError, ValueError):
        raise _nonsense(place) from None


def _examined_bytes(limits: DecodeLimits, describe_size: int | None) -> int:
    """The most that an honest child says of a clip."""
    return 8 * limits.max_source_frames + limits.max_frames * (THUMBNAIL_DIM + 3 * (describe_size or 0) ** 2)


def _nonsense(place: Place) -> ClipError:
    return ClipError(place, "the decoder answered nonsense: not what was asked for")


_pools: weakref.WeakSet[DecoderPool] = weakref.WeakSet()
_own: DecoderPool | None = None


def process_pool() -> DecoderPool:
    """This process's own, with one child."""
    global _own
    pool = _own
    if pool is None:
        pool = _own = DecoderPool()
    return pool


def close_process_pool() -> None:
    """End this process's child, if it has one; the next video makes another pool."""
    global _own
    pool, _own = _own, None
    if pool is not None:
        pool.close()


def _after_fork() -> None:
    for pool in list(_pools):
        pool._abandon()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(close_process_pool)
