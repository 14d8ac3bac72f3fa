"""Silence and its limits: hangs on real processes under the supervisor, whose stacks are written, and how silence is counted."""

from __future__ import annotations

import os
import re
import signal
import struct
import time

import pytest

from rdtf_ds.exit_codes import DONE, RESTART, USER_ERROR
from rdtf_ds.processes import descendants
from rdtf_ds.training.heartbeat import Heartbeat, Silence, heartbeat, shared_memory
from tests.training.supervised import BEATING, TRAINER
from tests.waiting import gone, until

# --- Hangs


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
