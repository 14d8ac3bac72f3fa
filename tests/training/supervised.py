"""Runs under the supervisor: small scripts that stand for train.py and for launchers, each a process in a session of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path
from typing import Any

from rdtf_ds.processes import descendants
from tests.waiting import PATIENCE, until

ROOT = Path(__file__).resolve().parents[2]
PREFACE = """
import os, signal, subprocess, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background of a shell has it ignored
from rdtf_ds.training.supervisor import heartbeat, supervise
FOLDER = Path(sys.argv[1])
def say(*words):
    with open(FOLDER / "said.txt", "a") as file:
        print(*words, file=file, flush=True)
def note(number, frame):
    say(signal.Signals(number).name)
"""
TRAINER = "beat = supervise(); say('trainer', os.getpid(), os.getppid())\n"
BEATING = TRAINER + "beat.watch(FOLDER, {start}, {stall})\n"


class Run:
    """One script under way, in a session of its own; ``said`` is what its trainer wrote, ``complaint`` its standard error."""

    def __init__(self, folder: Path, *parts: str, command: tuple[str, ...] = (), **options: Any) -> None:
        self.folder = folder
        (folder / "trainer.py").write_text("\n".join(map(textwrap.dedent, (PREFACE, *parts))))
        words = [sys.executable, *command, str(folder / "trainer.py"), str(folder)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with open(folder / "stderr.txt", "ab") as errors:
            streams = {"stdin": subprocess.DEVNULL, "stdout": errors, "stderr": errors}
            self.process = subprocess.Popen(words, cwd=folder, env=environment, start_new_session=True, **streams, **options)

    @property
    def said(self) -> str:
        path = self.folder / "said.txt"
        return path.read_text() if path.exists() else ""

    @property
    def complaint(self) -> str:
        return (self.folder / "stderr.txt").read_text()

    @property
    def stacks(self) -> str:
        path = self.folder / "stacks_rank0000.txt"
        return path.read_text() if path.exists() else ""

    def wait_for(self, word: str) -> None:
        until(lambda: word in self.said, lambda: f"{word!r} in {self.said!r}, {self.complaint!r}")

    def pid(self, name: str = "trainer") -> int:
        self.wait_for(f"{name} ")
        found = re.search(rf"^{name} (\d+)\b.*\n", self.said, re.MULTILINE)
        assert found is not None
        return int(found[1])

    def code(self) -> int:
        """Exit code, once it has ended."""
        return self.process.wait(PATIENCE)

    def end(self) -> None:
        for pid in [self.process.pid, *(process.pid for process in descendants(self.process.pid))]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)
