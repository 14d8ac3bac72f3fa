"""A full disk, a read-only folder, an error on one rank: an alarm, training goes on from memory, and what was committed stays whole."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rdtf_ds.checkpoints.store import CheckpointStore
from rdtf_ds.exit_codes import DISK, DONE
from tests.faults.runs import INTERVAL, STEPS, TRIALS, commit_of, commits, differences, learned, resumed_after, step_of
from tests.faults.saboteur import FAULT

ROW = "full disk (tmpfs), read-only folder, RLIMIT_FSIZE, error on one rank only"
BAR = "training goes on, or exits with its code; previous tag intact"
ALARM = "ALARM: The checkpoint could not be written"
TRIAL, RANKS = "fp16", 2
KEEP = "rdtf.checkpoint.keep=2"
_held: list[str] = []


class Disk:
    """A tmpfs of a known size."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self._filler = folder, folder / "filler"
        folder.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], check=True, capture_output=True)

    def fill(self) -> None:
        """Take all the room there is now."""
        with open(self._filler, "ab") as file:
            free = os.statvfs(self.folder).f_bavail * os.statvfs(self.folder).f_frsize
            if free:
                os.posix_fallocate(file.fileno(), file.tell(), free)

    def empty(self) -> None:
        self._filler.unlink()

    def remount(self, mode: str) -> bool:
        """``ro`` or ``rw``; a disk that is being written to refuses ``ro``."""
        return subprocess.run(["mount", "-o", f"remount,{mode}", str(self.folder)], capture_output=True).returncode == 0

    def unmount(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True, capture_output=True)


@pytest.fixture
def make_disk(tmp_path) -> Iterator:
    """Mounts a tmpfs under the test's folder."""
    disks: list[Disk] = []

    def make(folder: Path, size: int) -> Disk:
        try:
            disks.append(Disk(folder, size))
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            pytest.skip(f"a tmpfs cannot be mounted here ({error}); the tests with RLIMIT_FSIZE take its place")
        return disks[-1]

    yield make
    for disk in disks:
        disk.unmount()


@pytest.fixture
def checkpoint_bytes(undisturbed) -> int:
    """What a checkpoint of the trial takes on a disk of 4 KiB pages."""
    sizes = [path.stat().st_size for path in commit_of(undisturbed(TRIAL, RANKS), STEPS).iterdir()]
    return sum(-(-size // 4096) * 4096 for size in sizes)


@pytest.fixture
def start(fork_server, clips, tmp_path):
    """Starts the trial in a folder."""

    def launch(folder: Path, *settings: str, fault: str = ""):
        arguments = TRIALS[TRIAL].arguments(clips, folder, KEEP, *settings)
        return fork_server.launch(arguments, RANKS, tmp_path / "logs", {FAULT: fault})

    return launch


def wait_for_alarms(launched, count, meanwhile=lambda: None):
    while launched.said.count(ALARM) < count:
        assert launched.poll() is None, launched.said[-3000:]
        meanwhile()
        time.sleep(0.005)


def wait_for_step(launched, folder, step):
    while not commits(folder) or step_of(commits(folder)[0]) < step:
        assert launched.poll() is None, launched.said[-3000:]
        time.sleep(0.005)


def all_whole(folder: Path) -> None:
    store = CheckpointStore(folder / "checkpoints")
    assert len(store.candidates()) >= 2
    assert [store.flaw(path) for path in store.candidates()] == [None] * len(store.candidates())


def is_as_if_left_alone(folder: Path, alone: Path) -> None:
    assert learned(folder) == learned(alone)
    assert differences(commit_of(folder, STEPS), commit_of(alone, STEPS)) == []


def went_on(launched, folder: Path, alone: Path) -> None:
    """To the last step, whose checkpoint is there, in spite of alarms."""
    assert launched.wait() == DONE, launched.said[-3000:]
    assert "Traceback" not in launched.said
    all_whole(folder)
    is_as_if_left_alone(folder, alone)


def ended_with_its_code(launched, start, folder: Path, alone: Path, mend=lambda: None) -> None:
    """All steps were trained and the last could not be saved; mended, the same command goes on from the last commit."""
    assert launched.wait() == DISK, launched.said[-3000:]
    assert "Traceback" not in launched.said and launched.said.count("Error") == 1
    mend()
    all_whole(folder)
    newest = step_of(commits(folder)[0])
    assert 0 < newest < STEPS
    again = start(folder)
    assert again.wait() == DONE and resumed_after(again.said) == newest
    is_as_if_left_alone(folder, alone)


def enter(table, what: str) -> None:
    _held.append(what)
    table(ROW, BAR, f"{len(_held)} of {len(_held)} held: " + "; ".join(_held))


def test_an_error_on_one_rank_is_an_alarm(start, undisturbed, tmp_path):
    launched = start(tmp_path / "run", fault="failing_save rank=1 first=3 last=5")
    went_on(launched, tmp_path / "run", undisturbed(TRIAL, RANKS))
    assert launched.said.count(ALARM) == 3 and "rank 1: " in launched.said and "No space left" in launched.said


def test_a_disk_that_fills_up_and_is_emptied(start, undisturbed, make_disk, checkpoint_bytes, tmp_path):
    disk = make_disk(tmp_path / "run", 6 * checkpoint_bytes)
    launched = start(disk.folder)
    wait_for_step(launched, disk.folder, 2 * INTERVAL)
    wait_for_alarms(launched, 2, disk.fill)
    disk.empty()
    went_on(launched, disk.folder, undisturbed(TRIAL, RANKS))


@pytest.mark.soak
def test_a_disk_that_stays_full(start, undisturbed, make_disk, checkpoint_bytes, tmp_path, fault_table):
    disk = make_disk(tmp_path / "run", 6 * checkpoint_bytes)
    launched = start(disk.folder)
    wait_for_step(launched, disk.folder, 2 * INTERVAL)
    while launched.poll() is None:
        disk.fill()
        time.sleep(0.005)
    ended_with_its_code(launched, start, disk.folder, undisturbed(TRIAL, RANKS), mend=disk.empty)
    enter(fault_table, f"disk stays full: exit code {DISK}, resumed once there is room")


@pytest.mark.soak
def test_a_disk_for_three(start, undisturbed, make_disk, checkpoint_bytes, tmp_path, fault_table):
    """Ten are to be kept and there is room for three: the oldest make room for the next, nothing fails."""
    disk = make_disk(tmp_path / "run", int(3.6 * checkpoint_bytes))
    launched = start(disk.folder, "rdtf.checkpoint.keep=10")
    went_on(launched, disk.folder, undisturbed(TRIAL, RANKS))
    assert ALARM not in launched.said and len(commits(disk.folder)) in (2, 3)
    enter(fault_table, "room for three and ten to keep: the oldest make room")


@pytest.mark.soak
def test_a_disk_that_is_emptied_in_time(start, undisturbed, make_disk, checkpoint_bytes, tmp_path, fault_table):
    test_a_disk_that_fills_up_and_is_emptied(start, undisturbed, make_disk, checkpoint_bytes, tmp_path)
    enter(fault_table, "disk full for a while: alarms, training went on")


@pytest.mark.soak
@pytest.mark.parametrize("mended", [True, False])
def test_a_folder_that_becomes_read_only(mended, start, undisturbed, make_disk, checkpoint_bytes, tmp_path, fault_table):
    run = tmp_path / "run"
    disk = make_disk(run / "checkpoints", 8 * checkpoint_bytes)
    launched = start(run)
    wait_for_step(launched, run, 2 * INTERVAL)
    while not disk.remount("ro"):
        assert launched.poll() is None, launched.said[-3000:]
    wait_for_alarms(launched, 2)
    assert "Read-only file system" in launched.said
    if mended:
        assert disk.remount("rw")
        went_on(launched, run, undisturbed(TRIAL, RANKS))
        enter(fault_table, "folder read-only for a while: alarms, training went on")
    else:
        ended_with_its_code(launched, start, run, undisturbed(TRIAL, RANKS), mend=lambda: disk.remount("rw"))
        enter(fault_table, f"folder stays read-only: exit code {DISK}, resumed once writable")


@pytest.mark.soak
@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("fault", ["small_files bytes=30000", "failing_save"])
def test_errors_of_one_rank(fault, rank, start, undisturbed, tmp_path, fault_table):
    alone = undisturbed(TRIAL, RANKS)
    for_a_while = start(tmp_path / "while", fault=f"{fault} rank={rank} first=4 last=6")
    went_on(for_a_while, tmp_path / "while", alone)
    assert for_a_while.said.count(ALARM) == 3
    for_ever = start(tmp_path / "ever", fault=f"{fault} rank={rank} first=5")
    ended_with_its_code(for_ever, start, tmp_path / "ever", alone)
    assert step_of(commits(tmp_path / "ever")[0]) == STEPS
    enter(fault_table, f"{fault.split()[0]} on rank {rank} alone, for a while and to the end")
