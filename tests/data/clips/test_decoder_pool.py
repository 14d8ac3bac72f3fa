"""The pool of children: what they share with the parent, who gets which, and what is left of them."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rdtf_ds.data.clips import decoder_pool, decoder_process
from rdtf_ds.data.clips.clip import ClipError, DecodeLimits
from rdtf_ds.data.clips.decoder_pool import DecoderPool, PoolClosed, close_process_pool, process_pool
from rdtf_ds.data.clips.decoder_process import DecoderProcess
from rdtf_ds.data.clips.decoding import decode_clip
from rdtf_ds.data.clips.writing import write_clip
from rdtf_ds.processes import arguments, descendants, read_process
from tests.data.moving_pictures import pictures

LIMITS = DecodeLimits()
WHITE = (255, 255, 255)
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    write_clip(pictures(12, 64, 64), path, 80)
    return path


@pytest.fixture
def pool() -> Iterator[DecoderPool]:
    with DecoderPool() as children:
        yield children


def only_child(pool: DecoderPool) -> DecoderProcess:
    (child,) = pool._children
    return child


def gone(pid: int, within_s: float = 5.0) -> bool:
    deadline = time.monotonic() + within_s
    while (process := read_process(pid)) is not None and not process.ended:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_one_child_serves_many_clips_and_broken_ones_do_not_end_it(pool: DecoderPool, clip: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[:300])
    pool.decode(clip, 16, WHITE, LIMITS)
    child = only_child(pool)
    for number in range(3):
        with pytest.raises(ClipError):
            pool.decode(tmp_path / "cut.mp4", 16, WHITE, LIMITS)
        assert len(pool.decode(clip, 16 + number, WHITE, LIMITS)) == 12
    assert only_child(pool) is child and child.served == 7


def test_any_format_is_examined_and_decoded(pool: DecoderPool, tmp_path: Path) -> None:
    for suffix in (".gif", ".webp", ".png", ".mp4", ".webm"):
        path = tmp_path / f"clip{suffix}"
        write_clip(pictures(7, 64, 64), path, 80)
        found = pool.examine(path, LIMITS, describe_size=32)
        assert (found.info.format, found.info.num_frames) == (suffix[1:], 7)
        assert found.thumbnails.shape == (7, 192) and found.frames is not None
        assert np.array_equal(pool.decode(path, 32, WHITE, LIMITS, content=found.content), found.frames)
        assert np.array_equal(decode_clip(path, 32, WHITE, LIMITS, frames=[6, 2]), found.frames[[6, 2]])


def test_answers_that_are_larger_than_the_shared_memory_come_in_parts(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with DecoderPool() as whole:
        expected, found = whole.decode(clip, 64, WHITE, LIMITS), whole.examine(clip, LIMITS, describe_size=64)
    assert found.frames is not None
    frame = 64 * 64 * 3
    for room in (frame, 3 * frame + 5, 12 * frame - 1, 12 * frame):
        monkeypatch.setattr(decoder_process, "ANSWER_BYTES", room)
        with DecoderPool() as pool:
            assert np.array_equal(pool.decode(clip, 64, WHITE, LIMITS), expected)
            again = pool.examine(clip, LIMITS, describe_size=64)
            assert again.frames is not None and np.array_equal(again.frames, found.frames)
            assert np.array_equal(again.thumbnails, found.thumbnails) and again.info == found.info
    monkeypatch.setattr(decoder_process, "ANSWER_BYTES", frame - 1)
    with DecoderPool() as pool, pytest.raises(ClipError, match=f"takes {frame} bytes, and the decoder hands over {frame - 1} at most"):
        pool.decode(clip, 64, WHITE, LIMITS)


def test_each_request_has_its_own_share_of_processor_time(pool: DecoderPool, clip: Path) -> None:
    for timeout_s in (3.0, 30.0, 7.0):
        pool.decode(clip, 16, WHITE, DecodeLimits(timeout_s=timeout_s))
        pid = only_child(pool).pid
        soft, hard = resource.prlimit(pid, resource.RLIMIT_CPU)
        assert timeout_s + 1 <= soft <= timeout_s + 5 and hard == resource.getrlimit(resource.RLIMIT_CPU)[1]
        assert resource.prlimit(pid, resource.RLIMIT_AS) == (2 * 2**30, 2 * 2**30)
        assert resource.prlimit(pid, resource.RLIMIT_CORE) == (0, 0)


def test_a_machine_that_grants_less_processor_time_than_the_deadline_blames_no_clip(clip: Path) -> None:
    limited = ("sh", "-c", 'ulimit -t 15; exec "$@"', "sh", *decoder_process.COMMAND)
    with DecoderPool(command=limited) as children:
        assert len(children.decode(clip, 16, WHITE, DecodeLimits(timeout_s=20))) == 12
        assert resource.prlimit(only_child(children).pid, resource.RLIMIT_CPU) == (15, 15)


@pytest.mark.parametrize("timeout_s", [1e7, 1e30])
def test_a_deadline_beyond_all_clocks_is_as_good_as_none(pool: DecoderPool, clip: Path, timeout_s: float) -> None:
    assert len(pool.decode(clip, 16, WHITE, DecodeLimits(timeout_s=timeout_s))) == 12


def test_a_child_killed_between_requests_is_no_clips_fault(pool: DecoderPool, clip: Path) -> None:
    pool.decode(clip, 16, WHITE, LIMITS)
    child = only_child(pool)
    child.strike()
    assert gone(child.pid)
    assert len(pool.decode(clip, 16, WHITE, LIMITS)) == 12
    assert only_child(pool) is not child


def test_the_child_ignores_termination_and_ends_with_the_pipe(pool: DecoderPool, clip: Path) -> None:
    pool.decode(clip, 16, WHITE, LIMITS)
    child = only_child(pool)
    for name in ("TERM", "INT", "USR1"):
        subprocess.run(["kill", f"-{name}", str(child.pid)], check=True)
    assert len(pool.decode(clip, 16, WHITE, LIMITS)) == 12 and only_child(pool) is child
    assert child._process.stdin is not None
    child._process.stdin.close()  # as when the parent is gone
    assert child._process.wait(timeout=10) == 0


def test_threads_share_as_many_children_as_there_are(clip: Path, tmp_path: Path) -> None:
    paths = []
    for number in range(4):
        paths.append(tmp_path / f"{number}.mp4")
        write_clip(pictures(5 + number, 64, 64), paths[-1], 80)
    with DecoderPool(2) as pool:
        expected = [pool.decode(path, 24, WHITE, LIMITS) for path in paths]
        wrong: list[object] = []

        def work(seed: int) -> None:
            rng = np.random.default_rng(seed)
            for number in rng.integers(0, 4, 12):
                try:
                    if not np.array_equal(pool.decode(paths[number], 24, WHITE, LIMITS), expected[number]):
                        wrong.append(number)
                except Exception as error:
                    wrong.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(5)]
        for thread in threads:
            thread.start()
        most = 0
        while any(thread.is_alive() for thread in threads):
            most = max(most, len(pool._children))
            time.sleep(0.005)
        for thread in threads:
            thread.join()
        assert not wrong
        assert most == 2, "two were allowed, and five threads want them"


def test_closing_ends_idle_and_busy_children_and_nothing_is_served_any_more(clip: Path) -> None:
    pool = DecoderPool(2)
    before = len(os.listdir("/proc/self/fd"))
    windows = pool.examine_windows(clip, LIMITS, WHITE, 0.2)
    next(windows)
    pool.decode(clip, 16, WHITE, LIMITS)
    pids = [child.pid for child in pool._children]
    assert len(pids) == 2
    pool.close()
    assert all(gone(pid) for pid in pids)
    with pytest.raises(PoolClosed):
        list(windows)
    with pytest.raises(PoolClosed):
        pool.decode(clip, 16, WHITE, LIMITS)
    pool.close()
    assert len(os.listdir("/proc/self/fd")) == before and not pool._children


def test_a_child_that_starts_while_the_pool_is_closed_ends(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[DecoderProcess] = []
    pool = DecoderPool()

    class Slow(DecoderProcess):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            started.append(self)
            pool.close()

    monkeypatch.setattr(decoder_pool, "DecoderProcess", Slow)
    with pytest.raises(PoolClosed):
        pool.decode(clip, 16, WHITE, LIMITS)
    assert len(started) == 1 and gone(started[0].pid) and not pool._children and not pool._idle


def test_a_child_that_comes_back_after_closing_ends(clip: Path) -> None:
    pool = DecoderPool()
    child = pool._take_child()
    pool.close()
    child._process.wait(5)
    another = DecoderProcess(decoder_process.COMMAND, 2**31)  # alive for certain
    pool._return_child(another)
    pool._return_child(child)
    assert gone(another.pid) and not pool._idle and not pool._children


def test_closing_this_process_s_pool_makes_room_for_another(clip: Path) -> None:
    first = process_pool()
    first.decode(clip, 16, WHITE, LIMITS)
    close_process_pool()
    with pytest.raises(PoolClosed):
        first.decode(clip, 16, WHITE, LIMITS)
    assert process_pool() is not first and len(process_pool().decode(clip, 16, WHITE, LIMITS)) == 12
    close_process_pool()
    close_process_pool()


def test_threads_of_a_closed_pool_end_soon_and_leave_no_child(clip: Path) -> None:
    """As on Ctrl-C: some are at work, some wait for a child, some begin."""
    close_process_pool()  # of earlier tests
    pool, ends = DecoderPool(2), []

    def work() -> None:
        try:
            while True:
                list(pool.examine_windows(clip, LIMITS, WHITE, 0.1))
        except Exception as error:
            ends.append(type(error))

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    while not pool._children:
        time.sleep(0.01)
    time.sleep(0.2)
    pool.close()
    for thread in threads:
        thread.join(10)
    assert ends == [PoolClosed] * 5 and not pool._children
    assert not [child for child in descendants(os.getpid()) if "decoder_child" in " ".join(arguments(child.pid))]


def test_a_signal_for_the_whole_group_does_not_kill_a_child_that_starts(clip: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1): os.kill(os.getpid(), number)\n"
        "from rdtf_ds.data.clips import decoder_child\n"
        "decoder_child.main(sys.argv[1:])\n"
    )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with DecoderPool(1, (sys.executable, "-c", code)) as pool:
        assert len(pool.decode(clip, 16, WHITE, LIMITS)) == 12
        status = Path(f"/proc/{only_child(pool).pid}/status").read_text()
    assert "SigBlk:\t0000000000000000" in status and signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_odd_names_reach_the_child(pool: DecoderPool, clip: Path, tmp_path: Path) -> None:
    for name in ('odd\n"name".mp4', "ünï 字.mp4", "\udcff\udc80.mp4", "a'b\\c.mp4"):
        path = tmp_path / name
        path.write_bytes(clip.read_bytes())
        assert len(pool.decode(path, 16, WHITE, LIMITS)) == 12


def test_relative_paths_are_this_process_s(pool: DecoderPool, clip: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pool.decode(clip, 16, WHITE, LIMITS)
    monkeypatch.chdir(clip.parent)
    assert len(pool.decode(clip.name, 16, WHITE, LIMITS)) == 12


def test_a_forked_process_has_its_own_child_and_leaves_the_parents_alone(clip: Path) -> None:
    close_process_pool()
    process_pool().decode(clip, 16, WHITE, LIMITS)
    child = only_child(process_pool())
    assert child._process.stdin is not None
    pipe = child._process.stdin.fileno()
    forked = os.fork()
    if forked == 0:  # pragma: no cover: in another process
        code = 1
        try:
            started_without = not process_pool()._children and not os.path.exists(f"/proc/self/fd/{pipe}")
            decoded = len(process_pool().decode(clip, 16, WHITE, LIMITS)) == 12
            other = only_child(process_pool()).pid != child.pid
            close_process_pool()
            code = 0 if started_without and decoded and other else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(forked, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert len(process_pool().decode(clip, 16, WHITE, LIMITS)) == 12
    assert only_child(process_pool()) is child and child.served == 2
    close_process_pool()
    assert gone(child.pid)


def test_this_process_s_pool_is_one_and_ends_with_the_process(clip: Path) -> None:
    assert process_pool() is process_pool()
    code = (
        "from rdtf_ds.data.clips.clip import DecodeLimits\n"
        "from rdtf_ds.data.clips.decoder_pool import process_pool\n"
        f"process_pool().decode({str(clip)!r}, 16, (0, 0, 0), DecodeLimits())\n"
        "print(next(iter(process_pool()._children)).pid)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert gone(int(result.stdout)) and result.stderr == ""


def test_the_child_imports_neither_torch_nor_what_it_does_not_need() -> None:
    heavy = {"torch", "faiss", "decord", "av", "pyarrow", "pydantic"}
    code = f"import sys, rdtf_ds.data.clips.decoder_child; print(sorted({heavy!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"


def test_a_pool_asks_for_no_more_than_a_clip_can_have() -> None:
    limits = DecodeLimits(max_frames=10, max_source_frames=20)
    assert decoder_pool._examined_bytes(limits, None) == 20 * 8 + 10 * 192
    assert decoder_pool._examined_bytes(limits, 16) == 20 * 8 + 10 * (192 + 16 * 16 * 3)
