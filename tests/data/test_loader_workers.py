"""Loader workers as processes: what they do about signals, about a lost trainer, and what is seen of them when they hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rdtf_ds.exit_codes import RESTART
from rdtf_ds.processes import descendants
from tests.waiting import gone, until

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
from pathlib import Path
FOLDER, supervised = Path(sys.argv[1]), sys.argv[2] == "supervised"
from rdtf_ds.training.supervisor import heartbeat, supervise
if supervised:
    supervise()
import ctypes, os, signal, torch
from torch.utils.data import DataLoader
from rdtf_ds.data.loader import _start_worker

class Clips:
    def __getitem__(self, number):
        (FOLDER / "worker").write_text(f"{os.getpid()} {os.getppid()}\\n")
        while True:
            self.decode_for_ever()
    def __len__(self):
        return 2
    def decode_for_ever(self):
        ctypes.PyDLL(None).sleep(1000)  # holds the GIL, as a decoder without end may

heartbeat().watch(FOLDER, 0, 2)
heartbeat().beat("data")
next(iter(DataLoader(Clips(), batch_size=None, num_workers=1, worker_init_fn=_start_worker)))
"""


@contextmanager
def trainer(folder: Path, kind: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", SCRIPT, str(folder), kind]
    with open(folder / "stderr.txt", "wb") as errors:
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=errors)
    try:
        yield process
    finally:
        for pid in [process.pid, *(child.pid for child in descendants(process.pid))]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def worker(folder: Path) -> tuple[int, int]:
    """pid of the worker and of its trainer."""
    path = folder / "worker"
    until(lambda: path.exists() and path.read_text().endswith("\n"), lambda: f"a worker; {(folder / 'stderr.txt').read_text()}")
    own, parent = path.read_text().split()
    return int(own), int(parent)


def ignored(pid: int) -> set[signal.Signals]:
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigIgn:"))
    return {number for number in signal.Signals if int(line.split()[1], 16) >> (number - 1) & 1}


def test_a_stuck_worker_ignores_stop_signals_and_dies_with_its_trainer(tmp_path):
    with trainer(tmp_path, "alone") as process:
        pid, parent = worker(tmp_path)
        assert parent == process.pid
        assert {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1} <= ignored(pid)
        process.kill()
        until(lambda: gone(pid), lambda: "the worker's end")
        process.wait()


def test_a_stuck_worker_is_seen_in_the_stacks_of_the_run_it_stalls(tmp_path):
    with trainer(tmp_path, "supervised") as process:
        pid, _ = worker(tmp_path)
        assert process.wait(120) == RESTART
        assert gone(pid)
    _, _, of_worker = (tmp_path / "stacks_rank0000.txt").read_text().partition(f"--- stacks of process {pid} (")
    assert "in decode_for_ever" in of_worker
    assert "in phase 'data', rdtf.watchdog.stall_timeout_s is 2 " in (tmp_path / "stderr.txt").read_text()
