"""The supervisor, on real processes: small scripts that stand for train.py and for launchers."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from rdtf_ds.exit_codes import BUG, DISK, DONE, INTERRUPTED, RESTART, USER_ERROR
from rdtf_ds.processes import descendants, read_process
from rdtf_ds.training.heartbeat import Heartbeat, Silence, heartbeat, shared_memory

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60
"""Seconds for something that takes a fraction of one on an idle machine."""

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


def until(condition: Callable[[], bool], what: Callable[[], str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"never came: {what()}"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    process = read_process(pid)
    return process is None or process.ended


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs = []

    def make(*parts: str, **options: Any) -> Run:
        runs.append(Run(tmp_path, *parts, **options))
        return runs[-1]

    yield make
    for run in runs:
        run.end()


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


# --- Hangs

BEATING = TRAINER + "beat.watch(FOLDER, {start}, {stall})\n"


def test_a_stopped_trainer_is_noticed_and_killed(start):
    run = start(BEATING.format(start=0, stall=2), """
    subprocess.Popen(["sleep", "1000"])
    beat.beat("step")
    say("ready")
    while True:
        beat.beat("step")
        time.sleep(0.05)
    """)
    run.wait_for("ready")
    trainer = run.pid()
    os.kill(trainer, signal.SIGSTOP)
    stopped = time.monotonic()
    assert run.code() == RESTART
    assert time.monotonic() - stopped > 1.9
    assert re.fullmatch(
        r"Rank 0: silent for \d s in phase 'step', rdtf\.watchdog\.stall_timeout_s is 2 \(0: no limit\)\. "
        rf"What its processes were doing is in {run.folder}/stacks_rank0000\.txt\. The same command .*\n",
        run.complaint,
    )
    assert re.search(rf"^ +{trainer}  T ", run.stacks, re.MULTILINE)
    assert f"stacks of process {trainer}" not in run.stacks  # it cannot give them
    assert re.search(r"^ +\d+  S .* sleep$", run.stacks, re.MULTILINE)
    assert gone(trainer) and descendants(run.process.pid) == []


GIL_HELD = """
import ctypes
def decode_for_ever():
    while True:
        ctypes.PyDLL(None).sleep(1000)
"""


def test_the_stacks_of_a_trainer_that_holds_the_gil_are_written(start):
    run = start(BEATING.format(start=0, stall=1), GIL_HELD, "beat.beat('data')\ndecode_for_ever()")
    assert run.code() == RESTART
    assert f"--- stacks of process {run.pid()} (" in run.stacks
    assert "in decode_for_ever" in run.stacks
    assert "rank 0, silent for 1 s in phase 'data'" in run.stacks


def test_the_stacks_of_forked_workers_are_written_each_under_its_own_title(start):
    run = start(BEATING.format(start=0, stall=1), GIL_HELD, """
    def work():
        decode_for_ever()
    def wait():
        os.waitpid(worker, 0)
    worker = os.fork()
    if worker == 0:
        work()
    say("worker", worker)
    beat.beat("data")
    wait()
    """)
    assert run.code() == RESTART
    _, trainers, workers = re.split(r"^--- stacks of process .* ---\n", run.stacks, flags=re.MULTILINE)
    assert "in wait" in trainers and "decode_for_ever" not in trainers
    assert "in decode_for_ever" in workers and "in work" in workers
    assert gone(run.pid("worker"))


def test_a_stall_is_told_where_the_stacks_cannot_be_written(start):
    run = start(BEATING.format(start=0, stall=1), """
    (FOLDER / "stacks_rank0000.txt").unlink()
    (FOLDER / "stacks_rank0000.txt").mkdir()
    beat.beat("save")
    time.sleep(1000)
    """)
    assert run.code() == RESTART
    assert "cannot be written (Is a directory)" in run.complaint
    assert re.search(rf"^ +{run.pid()}  S ", run.complaint, re.MULTILINE)


def test_the_start_has_a_limit_of_its_own(start):
    run = start(BEATING.format(start=2.5, stall=0.5) + "time.sleep(1.5)\nsay('still here')\ntime.sleep(1000)")
    assert run.code() == RESTART
    assert "still here" in run.said
    assert "in phase 'start', rdtf.watchdog.start_timeout_s is 2.5 " in run.complaint


@pytest.mark.parametrize("limits", [{"start": 0, "stall": 0.5}, {"start": 0, "stall": 0}])
def test_zero_is_no_limit(start, limits):
    phase = "start" if limits["stall"] else "step"
    run = start(BEATING.format(**limits) + f"beat.beat({phase!r})\ntime.sleep(1.5)\nsys.exit(3)")
    assert run.code() == 3 and run.complaint == ""


def test_nothing_is_limited_before_the_limits_are_known(start):
    run = start(TRAINER + "time.sleep(3)\nbeat.watch(FOLDER, 2.5, 2.5)\ntime.sleep(0.6)\nsys.exit(3)")
    assert run.code() == 3


def test_beats_keep_a_run_alive_even_of_one_phase(start):
    run = start(BEATING.format(start=2, stall=2), """
    assert heartbeat() is beat
    for _ in range(30):
        heartbeat().beat("step")
        time.sleep(0.1)
    """)
    assert run.code() == DONE and run.complaint == ""


def test_a_run_stopped_as_a_whole_is_no_hang(start):
    """Ctrl-Z and fg, or a suspended machine."""
    run = start(BEATING.format(start=2, stall=2), """
    while "go on" not in (FOLDER / "said.txt").read_text():
        beat.beat("step")
        time.sleep(0.02)
    """)
    trainer = run.pid()
    for pid in (run.process.pid, trainer):
        os.kill(pid, signal.SIGSTOP)
    time.sleep(3)
    for pid in (run.process.pid, trainer):
        os.kill(pid, signal.SIGCONT)
    (run.folder / "said.txt").write_text("go on")
    assert run.code() == DONE and run.complaint == ""


def test_sigusr2_shows_the_stacks_of_a_run_and_ends_nothing(start):
    run = start(TRAINER, """
    def here():
        while "enough" not in (FOLDER / "said.txt").read_text():
            time.sleep(0.02)
    while "early" not in (FOLDER / "said.txt").read_text():
        time.sleep(0.02)
    beat.watch(FOLDER, 0, 0)
    say("watched")
    here()
    """)
    run.pid()
    run.process.send_signal(signal.SIGUSR2)  # there is no handler yet: it must not end the trainer
    time.sleep(0.5)
    with open(run.folder / "said.txt", "a") as said:
        said.write("early\n")
    run.wait_for("watched")
    assert run.stacks == ""
    run.process.send_signal(signal.SIGUSR2)
    until(lambda: "in here" in run.stacks, lambda: "the stacks")
    with open(run.folder / "said.txt", "a") as said:
        said.write("enough\n")
    assert run.code() == DONE
    assert "in here" in run.stacks  # a file with something in it stays


@pytest.mark.parametrize(("code", "left"), [(DONE, False), (USER_ERROR, True)])
def test_a_run_that_is_done_leaves_no_empty_file(start, code, left):
    run = start(BEATING.format(start=0, stall=0) + f"assert (FOLDER / 'stacks_rank0000.txt').exists()\nsys.exit({code})")
    assert run.code() == code
    assert (run.folder / "stacks_rank0000.txt").exists() == left


def test_the_stacks_are_named_by_rank_and_so_is_the_line(start, monkeypatch):
    monkeypatch.setenv("RANK", "12")
    run = start(BEATING.format(start=0, stall=1) + "beat.beat('step')\ntime.sleep(1000)")
    assert run.code() == RESTART
    assert run.complaint.startswith("Rank 12: ") and "rank 12, silent" in (run.folder / "stacks_rank0012.txt").read_text()


def test_a_folder_that_cannot_be_written_is_a_users_error(start):
    run = start(TRAINER, """
    from rdtf_ds.errors import UserError
    (FOLDER / "file").touch()
    try:
        beat.watch(FOLDER / "file", 1, 1)
    except UserError as error:
        say(error)
    """)
    assert run.code() == DONE
    assert "file/stacks_rank0000.txt cannot be written" in run.said and "--output_dir" in run.said


# --- In one process


def test_unsupervised_the_heartbeat_is_silent(tmp_path):
    heartbeat().watch(tmp_path, 0.001, 0.001)
    heartbeat().beat("step")
    assert list(tmp_path.iterdir()) == []


def test_silence_is_counted_by_the_supervisors_own_clock(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    memory = shared_memory()
    memory[8:24] = struct.pack("=dd", 5.0, 2.0)
    beat, silence = Heartbeat(memory), Silence(memory)
    for seconds, silent in ((0.75, 0.75), (100.0, 1.75), (0.125, 1.875)):  # a gap counts as one second
        now += seconds
        assert not silence.look()
        assert silence.seconds == silent
    assert (silence.phase, silence.limit, silence.stacks) == ("start", 5.0, None)
    beat.beat("validation")
    now += 0.5
    assert not silence.look()
    assert (silence.seconds, silence.phase, silence.limit) == (0.0, "validation", 2.0)
    for _ in range(2):
        assert not silence.look()
        now += 1.0
    assert silence.look()  # reached, not passed


def test_a_silence_is_not_measured_by_the_limit_of_the_phase_that_ends_it(monkeypatch):
    """A step begins between two reads of the supervisor, after a start longer than a step may be silent."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    class Interleaved:
        """Shared memory where the other side beats between the reads of one look."""

        def __init__(self) -> None:
            self.memory, self.reads, self.at = shared_memory(), 0, -1

        def __getitem__(self, key: slice) -> bytes:
            self.reads += 1
            value = self.memory[key]
            if self.reads == self.at:
                Heartbeat(self.memory).beat("step")  # type: ignore[arg-type]
            return value

    for at in (1, 2, 3):
        memory = Interleaved()
        memory.memory[8:24] = struct.pack("=dd", 100.0, 2.0)
        silence = Silence(memory)  # type: ignore[arg-type]
        for _ in range(10):
            now += 1.0
            assert not silence.look()
        memory.at = memory.reads + at
        now += 1.0
        assert not silence.look(), at
