"""What /proc is read to say, against processes in known states."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from rdtf_ds.processes import arguments, catches, descendants, name_this_process, read_process, waits_in
from tests.waiting import until


@contextmanager
def child(code: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A Python child that has written its first line."""
    with subprocess.Popen([sys.executable, "-c", code, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


READY = "import os, sys, signal, subprocess, time\nprint(flush=True)\n"


def state(pid: int) -> str:
    process = read_process(pid)
    assert process is not None
    return process.state


def test_a_process_is_told_by_number_parent_and_start():
    me = read_process(os.getpid())
    assert me is not None and (me.pid, me.parent) == (os.getpid(), os.getppid())
    time.sleep(0.03)  # a clock tick is 0.01 s
    with child(READY + "time.sleep(1000)") as process:
        other = read_process(process.pid)
        assert other is not None and other.parent == os.getpid() and other.started > me.started
        until(lambda: state(process.pid) == "S")
        again = read_process(process.pid)
        assert again is not None and again.started == other.started


def test_states_of_a_process_from_sleep_to_end():
    with child(READY + "time.sleep(1000)") as process:
        until(lambda: state(process.pid) == "S")
        asleep = read_process(process.pid)
        process.send_signal(signal.SIGSTOP)
        until(lambda: state(process.pid) == "T")
        stopped = read_process(process.pid)
        process.kill()
        until(lambda: state(process.pid) == "Z")  # nobody has waited for it
        ended = read_process(process.pid)
        process.wait()
        assert read_process(process.pid) is None
    assert asleep is not None and stopped is not None and ended is not None
    assert [(process.stopped, process.ended) for process in (asleep, stopped, ended)] == [(False, False), (True, False), (False, True)]


def test_a_name_with_spaces_and_brackets_hides_nothing():
    code = "import sys; sys.path[:0] = sys.argv[1:]; from rdtf_ds.processes import name_this_process as name; name(') R 1 (x')\n" + READY
    with child(code + "time.sleep(1000)", *sys.path, os.getcwd()) as process:
        odd = read_process(process.pid)
        assert odd is not None and (odd.name, odd.parent) == (") R 1 (x", os.getpid())


def test_names_are_cut_by_the_kernel():
    me = read_process(os.getpid())
    assert me is not None
    try:
        name_this_process("sixteen letters!")
        renamed = read_process(os.getpid())
        assert renamed is not None and renamed.name == "sixteen letters"
    finally:
        name_this_process(me.name)


def test_descendants_come_with_all_generations_nearest_first():
    grandparent = READY + (
        "leaf = 'import time; time.sleep(1000)'\n"
        "middle = 'import subprocess, sys, time; leaf = subprocess.Popen([sys.executable, \"-c\", sys.argv[1]]); '\n"
        "middle += 'print(leaf.pid, flush=True); time.sleep(1000)'\n"
        "process = subprocess.Popen([sys.executable, '-c', middle, leaf], stdout=subprocess.PIPE, text=True)\n"
        "print(process.pid, process.stdout.readline(), flush=True)\n"
        "time.sleep(1000)"
    )
    with child(grandparent) as process:
        assert process.stdout is not None
        numbers = [int(word) for word in process.stdout.readline().split()]
        try:
            assert [found.pid for found in descendants(process.pid)] == numbers
            assert [found.pid for found in descendants(os.getpid()) if found.pid in (process.pid, *numbers)] == [process.pid, *numbers]
        finally:
            for pid in numbers:
                os.kill(pid, signal.SIGKILL)
    assert descendants(process.pid) == []


def test_arguments_and_the_kernel_function_of_a_process_and_of_none():
    with child(READY + "sys.stdin.read()", "a b", "") as process:
        assert arguments(process.pid)[-2:] == ["a b", ""]
        until(lambda: state(process.pid) == "S")
        assert waits_in(process.pid)
    assert (arguments(process.pid), waits_in(process.pid)) == ([], "-")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM])
def test_only_a_handler_of_its_own_counts(number):
    others = "signal.signal(signal.SIGUSR2, signal.SIG_IGN); signal.signal(signal.SIGUSR1, signal.SIG_DFL); "
    code = f"import signal; {others}signal.signal({int(number)}, print); print(flush=True); input()"
    with child(code) as process:
        assert catches(process.pid, number)
        for other in {signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM} - {number}:
            assert not catches(process.pid, other)
    assert not catches(process.pid, number)
