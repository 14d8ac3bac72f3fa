"""One rank works for long while the others wait, without a collective that could time out, and a hang of it is not hidden."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rdtf_ds.errors import UserError
from rdtf_ds.training.collectives import patiently_on_rank_zero


class Unpicklable(Exception):
    def __init__(self, lock: object) -> None:
        super().__init__("cannot be sent")
        self.lock = lock


def test_the_work_is_done_in_another_thread_and_its_value_comes_back(process_group):
    threads: list[threading.Thread] = []

    def work(progress):
        threads.append(threading.current_thread())
        return {"answer": 42}

    assert patiently_on_rank_zero(work, lambda: None) == {"answer": 42}
    assert threads[0] is not threading.main_thread()


def test_it_beats_for_progress_and_not_for_time(process_group):
    beats: list[float] = []

    def busy(progress):
        for _ in range(6):
            time.sleep(0.1)
            progress()

    patiently_on_rank_zero(busy, lambda: beats.append(time.monotonic()), every_s=0.05)
    assert 4 <= len(beats) <= 6
    beats.clear()
    patiently_on_rank_zero(lambda progress: time.sleep(0.4), lambda: beats.append(time.monotonic()), every_s=0.05)
    assert beats == []


@pytest.mark.parametrize("error", [UserError("no clips"), ValueError("a bug"), Unpicklable(threading.Lock()), SystemExit(3)])
def test_every_error_is_raised_as_it_was(process_group, error):
    def work(progress):
        raise error

    with pytest.raises(type(error)) as caught:
        patiently_on_rank_zero(work, lambda: None)
    assert caught.value is error and getattr(error, "everywhere", True)


TWO_RANKS = """
import json, sys, threading, time
from pathlib import Path
from rdtf_ds.errors import UserError
from rdtf_ds.training.collectives import patiently_on_rank_zero
from rdtf_ds.training.engine import start_distributed, stop_distributed
from tests.training.test_collectives import Unpicklable
rank, _ = start_distributed("cpu", False)
beats, told = [], []

def slow(progress):
    assert rank == 0
    for _ in range(4):
        time.sleep(0.15)
        progress()
    return "of rank 0"

def failing(error):
    def work(progress):
        raise error
    return work

told.append(patiently_on_rank_zero(slow, lambda: beats.append(1), every_s=0.1))
for error in (UserError("no clips"), KeyError("a bug"), Unpicklable(threading.Lock())):
    try:
        patiently_on_rank_zero(failing(error), lambda: None)
    except Exception as caught:
        told.append([type(caught).__name__, str(caught), getattr(caught, "everywhere", None)])
told.append(patiently_on_rank_zero(lambda progress: "afterwards", lambda: None))
(Path(sys.argv[1]) / f"rank{rank}.json").write_text(json.dumps([told, len(beats)]))
stop_distributed()
"""


@pytest.mark.timeout(180)
def test_two_ranks_wait_together_and_hear_the_same(tmp_path, project_root):
    environment = {key: value for key, value in os.environ.items() if key not in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": os.pathsep.join([str(project_root), os.environ.get("PYTHONPATH", "")]), "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000)}
    ranks = [
        subprocess.Popen([sys.executable, "-c", TWO_RANKS, str(tmp_path)], env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in (0, 1)
    ]
    assert [rank.wait(150) for rank in ranks] == [0, 0]
    answers = [json.loads((Path(tmp_path) / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    (mine, my_beats), (other, other_beats) = answers
    assert mine[0] == other[0] == "of rank 0" and mine[-1] == other[-1] == "afterwards"
    assert my_beats == other_beats and 3 <= my_beats <= 4
    assert mine[1] == other[1] == ["UserError", "no clips", True]
    assert mine[2] == other[2] == ["KeyError", "'a bug'", None]
    assert mine[3] == ["Unpicklable", "cannot be sent", None]
    assert other[3] == ["RuntimeError", "rank 0: Unpicklable: cannot be sent", None]
