"""Decodes WebM and MP4 with decord, in a child process that can be killed.

decord's FFmpeg is of 2018 and its decoding is known to hang for ever, so no training process ever imports it. Each process that
reads videos owns one child, started at the first video and used for all that follow. A child that misses its deadline or dies is
replaced, and the clip at hand becomes a :class:`ClipError`. decord gives RGB: a WebM's alpha channel is dropped.

Protocol: one JSON line in, one JSON line out; a decoded clip's bytes follow the answer.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from rdtf_ds.data.clip import ClipError, ClipInfo, DecodeLimits, check_shape, letterbox
from rdtf_ds.data.headers import sniff_format
from rdtf_ds.diffusion.masks import evenly_spaced

_CHILD_MEMORY_BYTES = 4 * 2**30
_LONGEST_ANSWER = 2**20
_NARROWEST = 128  # pixels a row must have for decord to tell its channels right: it errs at 24, 48 and 72
_PACKAGE_ROOT = Path(__file__).resolve().parents[2]


class VideoChild:
    """The parent's side: one child process, started when needed. Safe to use from several threads, one request at a time.

    Args:
        command: starts the child; tests put a hostile one in its place.
    """

    def __init__(self, command: tuple[str, ...] = (sys.executable, "-m", "rdtf_ds.data.video")) -> None:
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def probe(self, path: Path, limits: DecodeLimits) -> ClipInfo:
        """Decode every frame once and keep none. Raises :class:`ClipError`."""
        answer, _ = self._request(path, {"limits": asdict(limits)}, limits.timeout_s)
        return ClipInfo(**{**answer["info"], "durations_ms": tuple(answer["info"]["durations_ms"])})

    def decode(self, path: Path, size: int, background: tuple[int, int, int], limits: DecodeLimits) -> np.ndarray:
        """uint8 (F, size, size, 3), thinned and letterboxed as in :func:`rdtf_ds.data.decoding.decode_clip`. Raises :class:`ClipError`."""
        request = {"limits": asdict(limits), "size": size, "background": list(background)}
        _, data = self._request(path, request, limits.timeout_s)
        return np.frombuffer(data, np.uint8).reshape(-1, size, size, 3)

    def close(self) -> None:
        """End the child, if there is one."""
        with self._lock:
            self._kill()

    def _request(self, path: Path, request: dict[str, Any], timeout_s: float) -> tuple[dict[str, Any], bytes]:
        with self._lock:
            if self._process is None or self._process.poll() is not None:  # a death between requests is no clip's fault
                self._kill()
                self._start()
            deadline = time.monotonic() + timeout_s
            try:
                answer, data = self._exchange({"path": str(path.absolute()), **request}, deadline)
            except TimeoutError:
                self._kill()
                raise ClipError(path, f"decoding took longer than rdtf.data.decode_timeout_s ({timeout_s:g} s)") from None
            except (EOFError, BrokenPipeError):
                code = self._kill(grace_s=1.0)
                raise ClipError(path, f"the video decoder died ({_death(code)})") from None
            except ValueError as error:
                self._kill()
                raise ClipError(path, f"the video decoder answered nonsense: {error}") from None
        if "error" in answer:
            raise ClipError(path, answer["error"])
        return answer, data

    def _start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, bufsize=0
        )

    def _exchange(self, request: dict[str, Any], deadline: float) -> tuple[dict[str, Any], bytes]:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        line = bytearray()
        while b"\n" not in line:
            if len(line) > _LONGEST_ANSWER:
                raise ValueError("an answer without end")
            line += self._read(deadline)
        head, _, rest = bytes(line).partition(b"\n")
        answer = json.loads(head)
        expected = int(answer.get("bytes", 0))
        data = bytearray(rest)
        while len(data) < expected:
            data += self._read(deadline)
        return answer, bytes(data)

    def _read(self, deadline: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError
        data = os.read(descriptor, 2**18)
        if not data:
            raise EOFError
        return data

    def _kill(self, grace_s: float = 0.0) -> int | None:
        """End the child for certain and return its exit code, its own if it ends within ``grace_s``."""
        process, self._process = self._process, None
        if process is None:
            return None
        try:
            code = process.wait(grace_s)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        return code


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


_children: dict[int, VideoChild] = {}  # by process: a forked loader worker must not share its parent's pipes


def child_reader() -> VideoChild:
    """This process's own child."""
    return _children.setdefault(os.getpid(), VideoChild())


def close_child_reader() -> None:
    """End this process's child; the next video starts another."""
    child = _children.pop(os.getpid(), None)
    if child is not None:
        child.close()


atexit.register(close_child_reader)


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """The child's side: answer requests until the parent closes the pipe."""
    for line in requests:
        request = json.loads(line)
        limits = DecodeLimits(**request["limits"])
        signal.alarm(int(limits.timeout_s) + 5)  # a hung child ends even if its parent was killed and cannot end it
        data = b""
        try:
            info, frames = _decode(request["path"], request.get("size"), tuple(request.get("background", ())), limits)
            answer: dict[str, Any] = {"info": asdict(info)}
            if frames:
                data = np.stack(frames).tobytes()
                answer["bytes"] = len(data)
        except ClipError as error:
            answer = {"error": error.reason}
        except Exception as error:  # decord raises DECORDError, RuntimeError, MemoryError, ...: all mean a broken clip
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            answer = {"error": f"decord: {first_line[:300]}"}
        signal.alarm(0)
        answers.write(json.dumps(answer).encode() + b"\n" + data)
        answers.flush()


def _decode(path: str, size: int | None, background: tuple[int, ...], limits: DecodeLimits) -> tuple[ClipInfo, list[np.ndarray]]:
    """Decode every frame in order; keep the thinned, letterboxed ones if a size is given."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    with open(path, "rb") as file:
        format = sniff_format(file.read(16))
    reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
    total = len(reader)
    check_shape(path, 1, 1, total, limits)
    height, width = reader.next().asnumpy().shape[:2]
    check_shape(path, width, height, total, limits)
    # decord rounds rows up to 64 bytes and then takes them for more channels if they are short: it is told to enlarge small pictures
    scale = -(-_NARROWEST // width)
    reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1, width=width * scale, height=height * scale)
    wanted = set(evenly_spaced(total, min(total, limits.max_frames)).tolist())
    kept: list[np.ndarray] = []
    for number in range(total):
        frame = reader.next().asnumpy()
        if frame.shape != (height * scale, width * scale, 3):
            raise ClipError(path, f"frame {number} has shape {frame.shape}, not {(height * scale, width * scale, 3)}")
        if size is not None and number in wanted:
            red, green, blue = background
            kept.append(letterbox(Image.fromarray(frame), size, (red, green, blue)))
    spans = reader.get_frame_timestamp(range(total))
    durations = tuple(max(1, round(1000 * float(end - start))) for start, end in spans)
    return ClipInfo(str(format), total, width, height, False, durations), kept


def _main() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (_CHILD_MEMORY_BYTES, _CHILD_MEMORY_BYTES))
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # the run ends children itself, after its checkpoint
        signal.signal(name, signal.SIG_IGN)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever decord prints must not enter the protocol
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    _main()
