"""A launch by DeepSpeed's own launcher: two processes of it, and 2 ranks below; for the few tests in which it is what is hit."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.faults.runs import lines_logged
from tests.integration.launches import PATIENCE, ROOT, environment, free_port, kill_family


class RealLaunch:
    """A context manager; what still runs at its end is killed.

    Args:
        arguments: Of train.py.
        folder: The run folder.

    Attributes:
        runner: The ``deepspeed`` command.
        launcher: ``deepspeed.launcher.launch``, which it starts and which starts the ranks.
        ranks: All processes below: supervisors, trainers, loader workers.
    """

    def __init__(self, arguments: list[str], folder: Path) -> None:
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]
        script = str(ROOT / "rdtf_ds" / "train.py")
        self._folder = folder
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._command = subprocess.Popen([*command, script, *arguments], cwd=ROOT, env=environment(), **quiet)
        self.runner = psutil.Process(self._command.pid)

    def __enter__(self) -> RealLaunch:
        return self

    def __exit__(self, *_: object) -> None:
        kill_family(self._command)
        for process in getattr(self, "ranks", []):
            if process.is_running():
                process.kill()

    def wait_for(self, lines: int) -> None:
        """Until so many steps are logged; then every process is known."""
        deadline = time.monotonic() + PATIENCE
        while lines_logged(self._folder) < lines:
            assert self._command.poll() is None, "the launch ended by itself"
            assert time.monotonic() < deadline, "the launch is too slow"
            time.sleep(0.01)
        (self.launcher,) = [child for child in self.runner.children() if "deepspeed.launcher.launch" in child.cmdline()]
        self.ranks = self.launcher.children(recursive=True)
        assert len(self.ranks) >= 4

    def seconds_to_end(self, patience: float) -> float:
        """How long until no process of it is left.

        Raises:
            AssertionError: Some are, after ``patience`` seconds.
        """
        began = time.monotonic()
        while self._command.poll() is None or any(process.is_running() for process in (self.launcher, *self.ranks)):
            assert time.monotonic() - began < patience, "it goes on"
            time.sleep(0.01)
        return time.monotonic() - began
