"""One trainer in a folder: real processes that hold, wait and die."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rdtf_ds.errors import UserError
from rdtf_ds.training.run_lock import FolderInUse, RunLock

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import os, sys, time
from pathlib import Path
from rdtf_ds.training.run_lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
print("released", flush=True)
sys.stdin.readline()
"""


@contextmanager
def holder(folder: Path, code: str = HOLDER) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock, until it is told a line or killed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def taken(folder: Path) -> bool:
    """Whether another process finds the lock held."""
    code = "import sys; from pathlib import Path; from rdtf_ds.training.run_lock import RunLock; RunLock(Path(sys.argv[1]), 0).__enter__()"
    ended = subprocess.run(
        [sys.executable, "-c", code, str(folder)], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert ended.returncode == 0 or "FolderInUse" in ended.stderr
    return ended.returncode != 0


def test_a_second_trainer_is_told_who_holds_the_folder_and_what_to_do(tmp_path, capsys):
    with holder(tmp_path) as process:
        with pytest.raises(FolderInUse) as caught, RunLock(tmp_path, wait_s=0.3):
            pass
        assert not process.poll()
    signed = json.loads((tmp_path / ".lock").read_text())
    assert signed["pid"] == process.pid and signed["host"] == socket.gethostname()
    assert abs(time.mktime(time.strptime(signed["since"][:19], "%Y-%m-%d %H:%M:%S")) - time.time()) < 3600
    who = f"process {process.pid} on {socket.gethostname()} since {signed['since']}"
    for part in (f"{tmp_path} is in use", who, "`kill`", f"touch {tmp_path / 'stop'}", "--output_dir"):
        assert part in str(caught.value)
    assert capsys.readouterr().err == f"{tmp_path} is in use by {who}, perhaps about to end: waiting up to 0.3 s.\n"


def test_without_patience_it_is_refused_at_once_and_without_a_line(tmp_path, capsys):
    with holder(tmp_path), pytest.raises(FolderInUse), RunLock(tmp_path, wait_s=0):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("killed", [False, True])
def test_a_trainer_about_to_end_is_waited_for(tmp_path, capsys, killed):
    with holder(tmp_path) as process:
        assert process.stdin is not None
        end = process.kill if killed else lambda: os.write(process.stdin.fileno(), b"\n")
        threading.Timer(0.5, end).start()
        with RunLock(tmp_path, wait_s=60):
            assert taken(tmp_path)
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert capsys.readouterr().err.count("\n") == 1


def test_a_free_folder_is_made_taken_and_given_back(tmp_path, capsys):
    folder = tmp_path / "runs" / "new"
    lock = RunLock(folder)
    for _ in range(2):
        with lock as entered:
            assert entered is lock and taken(folder)
        assert not taken(folder)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("left", ['{"pid": 1, "host": "elsewhere", "since": "long ago", "more": "' + "x" * 5000 + '"}\n', "", "garbage"])
def test_what_a_killed_trainer_left_means_nothing(tmp_path, left):
    (tmp_path / ".lock").write_text(left)
    with RunLock(tmp_path, wait_s=0):
        assert set(json.loads((tmp_path / ".lock").read_text())) == {"pid", "host", "since"}


def test_loader_workers_neither_hold_nor_drop_the_lock(tmp_path):
    """A forked worker closes what it inherited, and another outlives the trainer."""
    code = HOLDER.replace(
        'print("held"', 'pid = os.fork()\n    if pid == 0:\n        os.closerange(3, 100)\n        os._exit(0)\n    os.waitpid(pid, 0)\n'
        '    if os.fork() == 0:\n        os.close(0)\n        os.close(1)\n        time.sleep(3)\n        os._exit(0)\n    print("held"',
    )  # fmt: skip
    with holder(tmp_path, code) as process:
        assert taken(tmp_path)
        process.kill()
        process.wait()
        assert not taken(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", "{"])
def test_a_holder_that_has_not_signed_yet_is_named_as_such(tmp_path, text):
    with holder(tmp_path):
        (tmp_path / ".lock").write_text(text)
        with pytest.raises(FolderInUse, match="another trainer, a process that has just started"), RunLock(tmp_path, wait_s=0):
            pass


def test_a_folder_that_cannot_be_used_is_a_users_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be opened .*--output_dir"), RunLock(tmp_path / "file"):
        pass


def test_the_lock_follows_no_link(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("text")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(precious)
    with pytest.raises(UserError, match="cannot be opened"), RunLock(tmp_path / "run"):
        pass
    assert precious.read_text() == "text"


def test_a_file_system_without_locks_is_told_and_used(tmp_path, capsys, monkeypatch):
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with RunLock(tmp_path):
        assert "without locks (No locks available)" in capsys.readouterr().err


def test_any_other_error_is_not_taken_for_a_held_lock(tmp_path, monkeypatch):
    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "lockf", fail)
    with pytest.raises(OSError, match="Input/output"), RunLock(tmp_path):
        pass


def test_ranks_without_the_lock_hear_of_an_error_and_hold_nothing(tmp_path):
    def not_here(take: object) -> None:
        pass

    with RunLock(tmp_path / "run", on_rank_zero=not_here):
        assert not (tmp_path / "run").exists()

    def told(take: object) -> None:
        raise FolderInUse("rank 0 says so")

    with pytest.raises(FolderInUse, match="rank 0"), RunLock(tmp_path / "run", on_rank_zero=told):
        pass
