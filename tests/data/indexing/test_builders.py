"""Builders that are processes: they take turns under the lock, and what is left when one is killed or interrupted."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rdtf_ds.data.clips.clip import DecodeLimits
from rdtf_ds.data.indexing import index_building
from rdtf_ds.data.indexing.index_building import build_index
from rdtf_ds.training.run_lock import RunLock
from tests.data.indexing.building import LIMITS, Decoder, committed, many_clips
from tests.waiting import until

_BUILDER = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # started in the background, a shell has it ignored
from rdtf_ds.data.indexing import examining
from rdtf_ds.data.clips.clip import DecodeLimits
from rdtf_ds.data.indexing.index_building import build_index

root, folder, log, slow, last = sys.argv[1:]
class Decoder(examining.DecoderPool):
    def examine(self, place, *more, **options):
        clip = super().examine(place, *more, **options)
        with open(log, "a") as file:
            file.write(place.path.name + "\\n")
        if place.path.name >= last:
            time.sleep(float(slow))
        return clip
examining.DecoderPool = Decoder
examining.SEGMENT_CLIPS = 4
try:
    print(build_index(root, DecodeLimits(), folder, workers=2).fingerprint)
except KeyboardInterrupt:
    sys.exit(130)
"""


def builder(project_root: Path, root: Path, folder: Path, log: Path, slow: float = 0, last: str = "") -> subprocess.Popen[str]:
    """A process that builds, noting each clip examined, and commits every four; from clip ``last`` on it takes its time."""
    environment = {**os.environ, "PYTHONPATH": str(project_root)}
    words = [sys.executable, "-c", _BUILDER, str(root), str(folder), str(log), str(slow), last]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def noted(log: Path) -> list[str]:
    return log.read_text().split() if log.exists() else []


def test_a_killed_build_goes_on_where_it_was(tmp_path: Path, project_root: Path) -> None:
    root, folder = many_clips(tmp_path / "data", 24), tmp_path / "index"
    killed = builder(project_root, root, folder, tmp_path / "first", slow=60, last="14.gif")
    until(lambda: len(noted(tmp_path / "first")) >= 16 and len(committed(root, folder)) >= 12)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    kept, before = committed(root, folder), noted(tmp_path / "first")
    assert len(kept) == 12 and set(kept) < set(before) and len(before) == 16, "but for those of the segment that was being filled"
    assert not list(folder.glob("*.arrow")), "an index of some of the clips is none"
    second = builder(project_root, root, folder, tmp_path / "second")
    out, err = second.communicate(timeout=120)
    assert second.returncode == 0, err
    assert sorted(kept + noted(tmp_path / "second")) == [f"{number:02d}.gif" for number in range(24)], "each clip once"
    assert build_index(root, DecodeLimits(), workers=1).fingerprint == out.strip()


def test_an_interrupted_build_loses_nothing_that_was_done(tmp_path: Path, project_root: Path) -> None:
    root, folder = many_clips(tmp_path / "data", 12), tmp_path / "index"
    interrupted = builder(project_root, root, folder, tmp_path / "first", slow=3, last="06.gif")
    until(lambda: len(noted(tmp_path / "first")) >= 8)
    interrupted.send_signal(signal.SIGINT)
    _, err = interrupted.communicate(timeout=60)
    assert interrupted.returncode == 130, err
    assert sorted(committed(root, folder)) == [f"{number:02d}.gif" for number in range(6)] and "Traceback" not in err
    assert not list(folder.rglob("*.tmp"))


def test_builders_take_turns_and_the_second_finds_it_done(tmp_path: Path, project_root: Path) -> None:
    root, folder = many_clips(tmp_path / "data", 8), tmp_path / "index"
    first = builder(project_root, root, folder, tmp_path / "first", slow=0.3)
    until(lambda: len(noted(tmp_path / "first")) >= 1)
    first.send_signal(signal.SIGSTOP)  # with its lock, until the second is there: on a busy machine that takes longer than the rest
    second = builder(project_root, root, folder, tmp_path / "second")
    assert second.stderr is not None
    said = second.stderr.readline()
    first.send_signal(signal.SIGCONT)
    answers = [process.communicate(timeout=120) for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0], answers
    assert len(noted(tmp_path / "first")) == 8 and noted(tmp_path / "second") == [] and answers[0][0] == answers[1][0]
    assert "another process builds the index" in said + answers[1][1]


def test_who_waits_for_another_builder_is_alive(
    folder: Path, tmp_path: Path, decoder: type[Decoder], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(index_building, "_RETRY_S", 0.01)
    (tmp_path / "index").mkdir()
    told: list[tuple[int, int]] = []
    with open(tmp_path / "index" / ".index.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)

        def progress(*numbers: int) -> None:
            told.append(numbers)
            if len(told) == 3:
                fcntl.flock(other, fcntl.LOCK_UN)

        give_up = threading.Timer(20, fcntl.flock, (other, fcntl.LOCK_UN))
        give_up.start()
        build_index(folder, LIMITS, tmp_path / "index", on_progress=progress)
        give_up.cancel()
    assert told == [(0, 0)] * 3 + [(number, 5) for number in range(1, 6)]
    assert caplog.text.count("another process builds the index") == 1


def test_a_run_that_keeps_its_index_in_its_own_folder_keeps_its_lock(folder: Path, tmp_path: Path, decoder: type[Decoder]) -> None:
    """Closing any descriptor of a file drops the record locks that this process has on it."""
    run = tmp_path / "run"
    code = f"import fcntl; fcntl.lockf(open({str(run / '.lock')!r}, 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    with RunLock(run):
        build_index(folder, LIMITS, run)
        refused = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert "BlockingIOError" in refused.stderr
    assert json.loads((run / ".lock").read_text())["pid"] == os.getpid(), "nor does it write into it"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
