"""The supervisor, on real processes: exit codes, signals, and what happens when one of the processes dies."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rdtf_ds.exit_codes import BUG, DISK, DONE, INTERRUPTED, RESTART, USER_ERROR
from rdtf_ds.processes import read_process
from tests.training.supervised import ROOT, TRAINER
from tests.waiting import gone, until

# --- Codes


@pytest.mark.parametrize("code", [DONE, BUG, USER_ERROR, DISK, RESTART, INTERRUPTED, 3])
def test_the_trainers_exit_code_is_the_runs(start, code):
    run = start(TRAINER + f"sys.exit({code})")
    assert run.code() == code
    assert run.complaint == ""


def test_the_trainer_is_a_child_of_the_process_that_was_started(start):
    run = start(TRAINER)
    assert run.code() == DONE
    assert run.said.split()[0] == "trainer" and run.said.split()[2] == str(run.process.pid)
    assert run.said.count("trainer") == 1  # the parent never goes on


def test_importing_it_takes_nothing_heavy():
    code = "import sys; import rdtf_ds.training.supervisor; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    ours = {name for name in loaded.stdout.split() if name.startswith("rdtf_ds.")}
    assert ours == {f"rdtf_ds.{name}" for name in (
        "checkpoints", "checkpoints.durable", "errors", "exit_codes", "processes", "training", "training.heartbeat", "training.supervisor",
    )}  # fmt: skip
    assert not {"torch", "numpy", "pydantic", "asyncio", "multiprocessing"} & set(loaded.stdout.split())


@pytest.mark.parametrize(("name", "code"), [("SIGKILL", 137), ("SIGSEGV", 139), ("SIGABRT", 134)])
def test_a_killed_trainer_ends_the_run_with_a_line(start, name, code):
    run = start(TRAINER + "beat.watch(FOLDER, 0, 0)\nbeat.beat('save')\nsay('ready')\ntime.sleep(1000)")
    run.wait_for("ready")
    os.kill(run.pid(), signal.Signals[name])
    assert run.code() == code
    assert re.fullmatch(rf"Rank 0: killed by {name} in phase 'save', .*same command.*\n", run.complaint)
    if name == "SIGKILL":
        assert "memory" in run.complaint
    else:
        assert str(run.folder / "stacks_rank0000.txt") in run.complaint
        assert "trainer.py" in run.stacks  # faulthandler's, in the file that the line names


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("to_trainer", [True, False])
def test_a_stop_before_there_is_a_handler_says_restart(start, name, to_trainer):
    run = start(TRAINER + "time.sleep(1000)")
    trainer = run.pid()
    os.kill(trainer if to_trainer else run.process.pid, signal.Signals[name])
    assert run.code() == RESTART
    assert f"ended by {name}" in run.complaint
    assert gone(trainer)


@pytest.mark.parametrize("broken", [False, True])
def test_leaving_flushes_and_takes_nothing_apart(start, broken):
    run = start("from rdtf_ds.training.supervisor import leave", TRAINER, f"""
    import atexit, threading
    atexit.register(say, "taken apart")
    threading.Thread(target=time.sleep, args=(1000,)).start()  # would be waited for
    child = subprocess.Popen(["sleep", "1000"])
    say("child", child.pid)
    read, write = os.pipe()
    os.close(read)
    sys.stdout = open(write if {broken} else FOLDER / "out.txt", "w", buffering=1000)
    print("last words")
    leave(75)
    """)  # fmt: skip
    assert run.code() == RESTART
    assert "taken apart" not in run.said and run.complaint == ""
    assert gone(run.pid("child"))
    assert broken or (run.folder / "out.txt").read_text() == "last words\n"


@pytest.mark.parametrize(("rank", "end", "meaning"), [
    ("0", "sys.exit(0)", "done"), ("0", "sys.exit(75)", "run the same command again"), ("0", "os.kill(os.getpid(), 9)", "signal 9"),
    ("1", "sys.exit(75)", None),
])  # fmt: skip
def test_rank_zero_leaves_word_of_how_the_run_ended(start, monkeypatch, rank, end, meaning):
    monkeypatch.setenv("RANK", rank)
    run = start(TRAINER, f"beat.watch(FOLDER, 0, 0)\nbeat.claim()\n{end}")
    code, path = run.code(), run.folder / "outcome.json"
    assert path.exists() == (meaning is not None)
    if meaning is not None:
        word = json.loads(path.read_text())
        assert word["exit_code"] == code and meaning in word["meaning"]


def test_a_folder_that_was_not_claimed_keeps_the_word_of_its_own_run(start):
    """A second trainer, refused because a first one is under way."""
    run = start(TRAINER, "(FOLDER / 'outcome.json').write_text('of another run')\nbeat.watch(FOLDER, 0, 0)\nsys.exit(2)")
    assert run.code() == 2 and (run.folder / "outcome.json").read_text() == "of another run"


# --- Signals


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_stop_is_handed_on_and_the_trainer_ends_in_its_own_time(start, name):
    run = start(TRAINER, """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, note)
    say("ready")
    signal.pause()
    time.sleep(0.5)
    say("saved")
    sys.exit(75)
    """)
    run.wait_for("ready")
    run.process.send_signal(signal.Signals[name])
    assert run.code() == RESTART
    assert run.said.split()[-2:] == [name, "saved"] and run.said.count("SIG") == 1
    assert run.complaint == ""


def test_ctrl_c_from_another_process_is_handed_on(start):
    run = start(TRAINER, """
    try:
        say("ready")
        time.sleep(1000)
    except KeyboardInterrupt:
        sys.exit(130)
    """)
    run.wait_for("ready")
    run.process.send_signal(signal.SIGINT)
    assert run.code() == INTERRUPTED and run.complaint == ""


def test_ctrl_c_at_a_terminal_arrives_once(start, tmp_path):
    """The terminal sends it to both."""
    controller, terminal = pty.openpty()
    run = start(
        f"import fcntl, termios; fcntl.ioctl({terminal}, termios.TIOCSCTTY, 0)",
        TRAINER,
        """
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    say("ready")
    while (received := signal.sigtimedwait([signal.SIGINT], 1.0 if "code" in (FOLDER / "said.txt").read_text() else 60)) is not None:
        say("code", received.si_code)
    """,
        pass_fds=(terminal,),
    )
    run.wait_for("ready")
    os.write(controller, b"\x03")
    assert run.code() == DONE
    os.close(controller)
    os.close(terminal)
    assert re.findall(r"code (\d+)", run.said) == ["128"]


def test_the_trainer_hears_signals_its_launcher_had_blocked_or_ignored(start):
    def deaf() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD])
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does

    run = start(TRAINER, """
    signal.signal(signal.SIGTERM, note)
    say(signal.pthread_sigmask(signal.SIG_BLOCK, []), signal.getsignal(signal.SIGHUP).name, subprocess.run(["true"]).returncode)
    signal.pause()
    sys.exit(75)
    """, preexec_fn=deaf)  # fmt: skip
    run.wait_for("set() SIG_IGN 0")
    run.process.send_signal(signal.SIGTERM)
    assert run.code() == RESTART and "SIGTERM" in run.said


# --- Deaths of others


def test_the_trainer_dies_with_its_supervisor(start):
    run = start(TRAINER + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nsay('ready')\ntime.sleep(1000)")
    run.wait_for("ready")
    run.process.kill()
    until(lambda: gone(run.pid()), lambda: "the trainer's end")


def test_a_trainer_whose_supervisor_died_at_the_fork_ends_at_once(start):
    run = start("""
    from rdtf_ds.processes import die_with_parent
    parent = os.getpid()
    if os.fork() == 0:
        while os.getppid() == parent:
            time.sleep(0.01)
        say("orphan", os.getpid())
        die_with_parent(parent)
        say("alive")
        time.sleep(1000)
    """)
    run.code()
    until(lambda: gone(run.pid("orphan")), lambda: "the orphan's end")
    assert "alive" not in run.said


def test_what_the_trainer_leaves_behind_is_killed(start):
    run = start(TRAINER, """
    middle = subprocess.Popen(["sh", "-c", f"trap '' TERM HUP; sleep 1000 & echo leaf $! >> {FOLDER}/said.txt"])  # the leaf has no parent
    middle.wait()
    child = subprocess.Popen(["sleep", "1000"])
    os.kill(child.pid, signal.SIGSTOP)
    say("child", child.pid)
    sys.exit(0)
    """)
    assert run.code() == DONE
    assert gone(run.pid("leaf")) and gone(run.pid("child"))


LAUNCHED = f"""{TRAINER}
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, note)
say("ready")
while "SIGTERM" not in (FOLDER / "said.txt").read_text():
    time.sleep(0.02)
time.sleep(1)
say("saved")
"""
LAUNCHER = """
import subprocess, sys
child = subprocess.Popen([sys.executable, *sys.argv[int(sys.argv[1]):]])
with open("said.txt", "a") as file:
    print("launcher", child.pid, file=file, flush=True)
child.wait()
"""


@pytest.fixture
def launcher(tmp_path: Path) -> str:
    path = tmp_path / "launcher.py"
    path.write_text(LAUNCHER)
    return str(path)


@pytest.mark.parametrize("name", ["deepspeed.launcher.launch", "/opt/bin/deepspeed", "/opt/bin/torchrun"])
def test_a_lost_launcher_stops_the_run_once(start, launcher, name):
    run = start(LAUNCHED, command=(launcher, "3", name))
    run.wait_for("ready")
    trainer = run.pid()
    run.process.kill()
    run.wait_for("saved")
    until(lambda: gone(trainer), lambda: "the trainer's end")
    assert run.said.count("SIGTERM") == 1
    assert run.complaint.count("\n") == 1 and f"process {run.process.pid}) is gone" in run.complaint


def test_a_lost_launchers_launcher_stops_the_run(start, launcher):
    run = start(LAUNCHED, command=(launcher, "3", "deepspeed.launcher.runner", launcher, "3", "deepspeed.launcher.launch"))
    run.wait_for("ready")
    inner = run.pid("launcher")
    run.process.kill()
    run.wait_for("saved")
    until(lambda: gone(inner), lambda: "the launcher's end, whose rank has ended")
    assert f"process {run.process.pid}) is gone" in run.complaint


def test_a_lost_shell_stops_nothing(start, launcher):
    """nohup, disown, or a terminal multiplexer that crashed."""
    run = start(LAUNCHED, command=(launcher, "3", "sh -c 'bin/deepspeed; deepspeed.launcher.launch'"))
    run.wait_for("ready")
    trainer = run.pid()
    supervisor = read_process(trainer)
    assert supervisor is not None
    run.process.kill()
    run.process.wait()
    time.sleep(1.5)  # several looks
    assert not gone(trainer) and "SIGTERM" not in run.said and run.complaint == ""
    os.kill(supervisor.parent, signal.SIGTERM)  # it still listens
    run.wait_for("saved")
