"""Launches that start in a moment: a process that has imported the trainer once forks a launcher and its ranks on request.

    this process ──pipe──> fork server ──fork──> launcher ──fork──> ranks: what `rdtf_ds/train.py` is as a script

The launcher behaves as DeepSpeed's `launch.py`: the first rank to fail ends the others, first by SIGTERM to their process trees, 30 s later
by SIGKILL, and gives the exit code; its own SIGTERM it hands on in the same way and exits with 1. Forking is safe only while the server
has no second thread, which it checks before every launch.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import psutil

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300
"""Seconds for one launch; a busy machine takes many times the five it needs."""
LAUNCHER_NAME = "deepspeed.launcher.launch"
"""By which a supervisor knows a launcher, among the first words of its command line."""
LAUNCHER_GRACE = 30
"""Seconds DeepSpeed's launcher leaves a process between SIGTERM and SIGKILL."""


class Launched:
    """A launch as its user sees it: one process to wait for, and the ranks below it."""

    def __init__(self, server: ForkServer, pid: int, log: Path) -> None:
        self._server, self.pid, self._log = server, pid, log
        self._code: int | None = None

    @property
    def ranks(self) -> list[int]:
        """The process of each rank that the launcher started; empty until all are."""
        with suppress(FileNotFoundError):
            pids: list[int] = json.loads(_ranks_file(self._log).read_text())
            return pids
        return []

    def family(self, pid: int | None = None) -> list[int]:
        """A process (the launcher) and all below it, parents first."""
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid or self.pid)
            return [process.pid, *(child.pid for child in process.children(recursive=True))]
        return []

    def poll(self) -> int | None:
        """The launcher's exit code, negative for a signal; None while it runs."""
        if self._code is None:
            self._code = self._server.ask(poll=self.pid)
        return self._code

    def wait(self, patience: float = PATIENCE) -> int:
        """The launcher's exit code, once it has ended.

        Raises:
            AssertionError: It runs longer than ``patience`` seconds; everything is killed.
        """
        deadline = time.monotonic() + patience
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"still running after {patience:g} s:\n{self.said[-3000:]}")
            time.sleep(0.01)
        return code

    def signal(self, pid: int, number: int) -> None:
        """Send a signal to one process, which may be gone by now."""
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    def kill(self) -> None:
        """SIGKILL everything of this launch, orphans too."""
        for pid in {*self.family(), *self.orphans()}:
            self.signal(pid, signal.SIGKILL)
        while self.poll() is None:
            time.sleep(0.01)
        assert self.gone_within(10)

    def orphans(self) -> list[int]:
        """Processes of this launch, by its session, that still run; the launcher not counted."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, ProcessLookupError):
                if process.pid != self.pid and os.getsid(process.pid) == self.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
        return found

    def gone_within(self, seconds: float) -> bool:
        """Whether every process of this launch ends in time."""
        deadline = time.monotonic() + seconds
        while self.orphans():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    @property
    def said(self) -> str:
        """Standard output and error of all ranks so far."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""


class ForkServer:
    """The process that forks launches; a context manager."""

    def __enter__(self) -> ForkServer:
        quiet = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        # Arrow's allocator would start a thread of its own, which no fork survives.
        quiet |= {"JE_ARROW_MALLOC_CONF": "background_thread:false", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.faults.fork_server", LAUNCHER_NAME]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **quiet}, text=True, bufsize=1, **pipes)
        self._logs = 0
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def ask(self, **request: Any) -> Any:
        """One request, one answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        answer = self._process.stdout.readline()
        assert answer, f"the fork server died with {self._process.wait(60)}"
        return json.loads(answer)

    def launch(self, arguments: Sequence[str], ranks: int, logs: Path, environment: Mapping[str, str] | None = None) -> Launched:
        """Start ``train.py`` on so many ranks.

        Args:
            arguments: Of train.py.
            logs: Folder for what the ranks print.
            environment: More of it for the ranks.
        """
        self._logs += 1
        logs.mkdir(parents=True, exist_ok=True)
        log = logs / f"launch{self._logs:04d}.log"
        more = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), **(environment or {})}
        return Launched(self, self.ask(arguments=list(arguments), ranks=ranks, environment=more, log=str(log)), log)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _ranks_file(log: Path) -> Path:
    return log.with_suffix(".ranks")


# The server's side.


def serve() -> None:
    """Answer requests until the pipe closes; in a forked process it does not return."""
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            answer: int | None = _exit_code(request["poll"])
        else:
            threads = os.listdir("/proc/self/task")
            assert len(threads) == 1, f"a fork would lose {len(threads) - 1} thread(s)"
            answer = os.fork()
            if answer == 0:
                _launcher(request["arguments"], request["ranks"], request["environment"], Path(request["log"]))
        print(json.dumps(answer), flush=True)


def _exit_code(pid: int) -> int | None:
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def _launcher(arguments: list[str], ranks: int, environment: dict[str, str], log: Path) -> NoReturn:
    """DeepSpeed's launcher; its ranks are forked instead of started."""
    os.setsid()
    _redirect(log)
    pids: list[int] = []

    def end(code: int) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for pid in pids:
            _terminate_tree(pid)
        os._exit(code)

    def passed_on(number: int, _: object) -> None:
        end(1)

    signal.signal(signal.SIGTERM, passed_on)
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            _rank({**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}, arguments)
        pids.append(pid)
    unfinished = log.with_suffix(".tmp")
    unfinished.write_text(json.dumps(pids))
    unfinished.rename(_ranks_file(log))
    waiting = set(pids)
    while waiting:
        for pid in list(waiting):
            code = _exit_code(pid)
            if code is not None:
                waiting.remove(pid)
            if code:
                end(code % 256)
        time.sleep(0.02)
    os._exit(0)


def _terminate_tree(pid: int) -> None:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        family = [*process.children(recursive=True), process]
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.terminate()
        _, alive = psutil.wait_procs(family, LAUNCHER_GRACE)
        for member in alive:
            member.kill()


def _redirect(log: Path) -> None:
    with open(os.devnull) as nothing, open(log, "ab") as file:
        os.dup2(nothing.fileno(), 0)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _rank(environment: dict[str, str], arguments: list[str]) -> NoReturn:
    """What the operating system and Python do of ``python rdtf_ds/train.py ARGUMENTS``, without the imports."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.update(environment)
    sys.argv = [str(ROOT / "rdtf_ds" / "train.py"), *arguments]

    from rdtf_ds.train import run_command
    from rdtf_ds.training.supervisor import supervise
    from tests.faults import saboteur

    supervise()
    saboteur.install(os.environ.get(saboteur.FAULT, ""))
    sys.exit(run_command(arguments))


def _import_everything() -> None:
    """What a rank imports by and by, so that no launch has to."""
    import bitsandbytes  # noqa: F401
    import deepspeed  # noqa: F401
    import faiss  # noqa: F401
    import matplotlib.backends.backend_agg  # noqa: F401
    import pyarrow.parquet  # noqa: F401

    import rdtf_ds.train  # noqa: F401
    from rdtf_ds.training.engine import quiet_deepspeed

    quiet_deepspeed()
    gc.collect()
    gc.freeze()  # or every process that ends would walk, and so copy, all of the server's memory


if __name__ == "__main__":
    _import_everything()
    serve()
