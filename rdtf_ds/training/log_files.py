"""Files of a run's log that outlast a full disk: what the disk refuses waits in memory, in order, until it takes it.

TensorBoard's own writer is not used: it writes from a thread of its own, and is of no more use after an error.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import scalar, text


class GrowingFile:
    """A file that is appended to, each record whole or not at all.

    Args:
        path: Made if it is not there, its folder too.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._waiting = path, b""
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  open for the whole run
        self._size = path.stat().st_size

    def write(self, record: bytes) -> None:
        """Append a record at the next `pass_on`."""
        self._waiting += record

    def pass_on(self, sync: bool = False) -> str | None:
        """Hand what waits to the system, or put it on the disk; returns why that is not possible, or None."""
        try:
            written = self._file.write(self._waiting) if self._waiting else 0
            if written != len(self._waiting):
                self._file.truncate(self._size)
                return f"'{self._path}' cannot be written: no space left"
            self._size, self._waiting = self._size + written, b""
            if sync:
                os.fsync(self._file.fileno())
        except OSError as error:
            return f"'{self._path}' cannot be written: {error.strerror}"
        return None

    def close(self) -> None:
        """Without another `pass_on`: what still waits is lost."""
        self._file.close()


class Board:
    """TensorBoard's event file of one start.

    Args:
        folder: Of the event files.
        first_step: What earlier starts logged from there on is not shown.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self.file = GrowingFile(folder / name)
        self._records = RecordWriter(self.file)
        self._add(Event(step=first_step, file_version="brain.Event:2"))
        self._add(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def scalar(self, tag: str, value: float, step: int) -> None:
        """A point of a curve; in the file once `GrowingFile.pass_on` of ``file`` succeeds, as everything here."""
        self._add(Event(step=step, summary=scalar(tag, value)))

    def text(self, tag: str, markdown: str, step: int) -> None:
        """A page of Markdown that stands under its tag."""
        self._add(Event(step=step, summary=text(tag, markdown)))

    def picture(self, tag: str, data: bytes, height: int, width: int, step: int) -> None:
        """An image file as it is: a GIF moves."""
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
        self._add(Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, image=image)])))

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
