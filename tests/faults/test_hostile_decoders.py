"""Decoders that hang, crash, lie or want everything: the clip at hand is an error with a reason in time, and nothing else happens."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rdtf_ds.data.clips.clip import ClipError, DecodeLimits
from rdtf_ds.data.clips.decoder_pool import DecoderPool, close_process_pool
from rdtf_ds.data.clips.decoder_process import DecoderUnavailable
from rdtf_ds.data.clips.writing import write_clip
from rdtf_ds.processes import descendants, read_process
from tests.faults.fork_server import ROOT
from tests.small_models import load_tool

COMMAND = (sys.executable, str(ROOT / "tests" / "faults" / "hostile_decoder.py"))
WHITE = (255, 255, 255)
TIMEOUT_S, SLACK_S = 1.0, 2.0
LIMITS = DecodeLimits(timeout_s=TIMEOUT_S)
# Trick of `hostile_decoder`: the reason that is given, and whether the machine may be to blame.
TRICKS = {
    "sleeps": (r"longer than rdtf.data.decode_timeout_s \(1 s\)", True),
    "sleeps_deaf": (r"longer than rdtf.data.decode_timeout_s \(1 s\)", True),
    "stops": (r"longer than rdtf.data.decode_timeout_s \(1 s\)", True),
    "spins": (r"longer than rdtf.data.decode_timeout_s \(1 s\)", True),
    "killed": (r"SIGKILL, which is what the kernel sends when memory is short", True),
    "segfaults": (r"the decoder died \(signal SIGSEGV\)", False),
    "aborts": (r"the decoder died \(signal SIGABRT\)", False),
    "exits": (r"the decoder died \(exit code 3\)", False),
    "allocates_10_gb": (r"takes more than 2048 MiB", False),
    "runs_out_in_c": (r"the decoder died \(signal SIGSEGV\)", False),
    "writes_garbage": (r"answered nonsense", False),
    "writes_a_list": (r"answered nonsense", False),
    "writes_without_end": (r"answered nonsense: a line without end", False),
    "writes_two_answers": (r"answered nonsense", False),
    "answers_wrongly": (r"answered nonsense", False),
    "answers_too_much": (r"answered nonsense: it answers too much", False),
    "answers_another_shape": (r"answered nonsense", False),
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "sound.mp4"
    write_clip(np.zeros((6, 64, 64, 3), np.uint8) + (np.arange(6, dtype=np.uint8) * 40)[:, None, None, None], path, 80)
    return path


@pytest.fixture
def pool() -> Iterator[DecoderPool]:
    with DecoderPool(1, COMMAND) as hostile:
        yield hostile


def named(clip: Path, trick: str) -> Path:
    path = clip.with_stem(trick)
    if not path.exists():
        path.write_bytes(clip.read_bytes())
    return path


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident_bytes(line: str) -> int:
    return next(int(text.split()[1]) * 1024 for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(line))


@pytest.mark.parametrize("trick", TRICKS)
def test_a_hostile_decoder_is_one_clips_error_and_no_more(pool: DecoderPool, clip: Path, trick: str) -> None:
    reason, transient = TRICKS[trick]
    before = open_files()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    resident = resident_bytes("VmRSS")
    for _ in range(2):  # a fresh child, and again
        started = time.monotonic()
        with pytest.raises(ClipError, match=reason) as caught:
            pool.decode(named(clip, trick), 16, WHITE, LIMITS)
        took = time.monotonic() - started
        assert caught.value.path == str(clip.with_stem(trick))
        assert caught.value.transient is transient
        if "longer than" in caught.value.reason:
            assert took >= TIMEOUT_S
        assert took < TIMEOUT_S + SLACK_S + 1  # and a start
        assert pool.decode(clip, 16, WHITE, LIMITS).shape == (6, 16, 16, 3)
    assert resident_bytes("VmHWM") - resident < 50 * 2**20
    pool.close()
    assert open_files() == before
    assert not [process for process in descendants(os.getpid()) if "hostile_decoder" in " ".join(arguments_of(process.pid))]
    assert not [process for process in descendants(os.getpid()) if process.state == "Z"]


def arguments_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return []


def test_memory_that_is_taken_bit_by_bit_is_as_limited(clip: Path) -> None:
    with DecoderPool(1, COMMAND, memory_bytes=2**30) as pool:
        with pytest.raises(ClipError, match="takes more than 1024 MiB"):
            pool.decode(named(clip, "allocates_bit_by_bit"), 16, WHITE, DecodeLimits(timeout_s=20.0))
        assert len(pool.decode(clip, 16, WHITE, LIMITS)) == 6


def test_a_child_cannot_cut_the_memory_that_the_parent_reads(pool: DecoderPool, clip: Path) -> None:
    assert len(pool.decode(named(clip, "cuts_the_memory"), 16, WHITE, LIMITS)) == 6


def test_a_clip_is_not_blamed_for_the_ruins_that_another_left(pool: DecoderPool, clip: Path) -> None:
    for _ in range(3):
        assert len(pool.decode(named(clip, "spoils_the_next"), 16, WHITE, LIMITS)) == 6
        assert len(pool.decode(clip, 16, WHITE, LIMITS)) == 6


def test_the_same_verdict_from_a_fresh_child_and_from_a_used_one(pool: DecoderPool, clip: Path) -> None:
    verdicts = []
    for warm_up in (False, True):  # the trick ends the child, so that each begins with a fresh one
        if warm_up:
            pool.decode(clip, 16, WHITE, LIMITS)
        with pytest.raises(ClipError) as caught:
            pool.decode(named(clip, "allocates_10_gb"), 16, WHITE, LIMITS)
        verdicts.append((caught.value.reason, caught.value.transient))
    assert verdicts[0] == verdicts[1]


def test_the_other_child_goes_on_meanwhile(clip: Path) -> None:
    with DecoderPool(2, COMMAND) as pool:
        failed: list[ClipError] = []

        def hang() -> None:
            try:
                pool.decode(named(clip, "sleeps"), 16, WHITE, DecodeLimits(timeout_s=6.0))
            except ClipError as error:
                failed.append(error)

        pool.decode(clip, 16, WHITE, LIMITS)
        thread = threading.Thread(target=hang)
        thread.start()
        time.sleep(0.2)
        for _ in range(20):
            assert len(pool.decode(clip, 16, WHITE, LIMITS)) == 6
        assert thread.is_alive() and not failed, "twenty clips took longer than one that hangs"
        thread.join(timeout=20)
        assert failed and failed[0].transient


@pytest.mark.parametrize(("trick", "most_s"), [("spins", 4 * (TIMEOUT_S + 1)), ("sleeps", TIMEOUT_S + 5)])
def test_a_child_whose_parent_was_killed_ends_by_itself(clip: Path, trick: str, most_s: float) -> None:
    """Started by a thread, so without a death signal: what ends it is processor time, which a busy machine stretches, or the alarm."""
    code = (
        "import sys, threading, time\n"
        "from rdtf_ds.data.clips.clip import DecodeLimits\n"
        "from rdtf_ds.data.clips.decoder_pool import DecoderPool\n"
        f"pool = DecoderPool(1, {COMMAND!r})\n"
        f"ask = lambda: pool.decode({str(named(clip, trick))!r}, 16, (0, 0, 0), DecodeLimits(timeout_s={TIMEOUT_S}))\n"
        "threading.Thread(target=ask).start()\n"
        "while not any(child.served for child in pool._children): time.sleep(0.01)\n"
        "print(next(iter(pool._children)).pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    child = read_process(pid)
    assert child is not None
    parent.kill()
    parent.wait()
    parent.stdout.close()
    started = time.monotonic()
    while (now := read_process(pid)) is not None and now.started == child.started and not now.ended:
        assert time.monotonic() - started < most_s + SLACK_S, f"it still {trick}"
        time.sleep(0.05)


def test_a_child_of_the_main_thread_dies_with_it_at_once(clip: Path) -> None:
    code = (
        "import os, signal\n"
        "from rdtf_ds.data.clips.clip import DecodeLimits\n"
        "from rdtf_ds.data.clips.decoder_pool import DecoderPool\n"
        f"pool = DecoderPool(1, {COMMAND!r})\n"
        f"pool.decode({str(clip)!r}, 16, (0, 0, 0), DecodeLimits())\n"
        "child = next(iter(pool._children))\n"
        "os.dup(child._process.stdin.fileno())\n"
        "print(child.pid, flush=True)\n"
        "if os.fork() == 0: signal.pause()\n"  # a process that keeps the pipe open, so that no end of file tells the child
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.wait()
    try:
        started = time.monotonic()
        while (now := read_process(pid)) is not None and not now.ended:
            assert time.monotonic() - started < SLACK_S
            time.sleep(0.02)
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.stdout.close()


def refusal(clip: Path, command: tuple[str, ...] | None = None, memory_bytes: int = 2**31) -> str:
    """What is said when no decoder can be started. It leaves nothing behind."""
    close_process_pool()  # of earlier tests
    before = open_files()
    with DecoderPool(1, command, memory_bytes) as pool, pytest.raises(DecoderUnavailable, match="decoder cannot be started") as caught:
        pool.decode(clip, 16, WHITE, LIMITS)
    assert open_files() == before and not decoders()
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    return str(caught.value)


def decoders() -> list[str]:
    lines = [" ".join(arguments_of(process.pid)) for process in descendants(os.getpid())]
    return [line for line in lines if "decoder" in line]


def test_a_decoder_that_cannot_be_started_says_so(clip: Path) -> None:
    assert "exit code 7. See what `" in refusal(clip, (sys.executable, "-c", "raise SystemExit(7)"))
    assert "/nonexistent/python: No such file or directory" in refusal(clip, ("/nonexistent/python",))
    assert "does not say that it is ready" in refusal(clip, (sys.executable, "-c", "print('{}', flush=True); input()"))


def test_no_memory_to_share(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> int:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", forbidden)
    assert "Operation not permitted). Allow memfd_create" in refusal(clip)
    monkeypatch.undo()
    monkeypatch.setattr(os, "ftruncate", forbidden)
    assert "Operation not permitted). Allow memfd_create" in refusal(clip)


def test_too_low_a_hard_limit_of_memory(clip: Path) -> None:
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
        "from rdtf_ds.data.clips import decoder_child; decoder_child.main(sys.argv[1:])"
    )
    assert "may have 1024 MiB of address space, and needs 2048. Raise the limit: `ulimit -v unl" in refusal(
        clip, (sys.executable, "-c", code)
    )


BROKEN = {
    "decord": ("raise OSError('libz.so.1: cannot open shared object file')", r"OSError: libz.so.1: cannot open .* `make clean venv`"),
    "av": ("raise ImportError('undefined symbol: av_frame')", r"ImportError: undefined symbol: av_frame\). Install .* `make clean venv`"),
    "PIL": ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", r"signal SIGILL. See what `"),
}


@pytest.mark.parametrize("library", BROKEN)
def test_a_broken_library_is_no_clips_fault(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], library: str
) -> None:
    code, told = BROKEN[library]
    (tmp_path / "libraries" / library).mkdir(parents=True)
    (tmp_path / "libraries" / library / "__init__.py").write_text(code)
    folder, index = tmp_path / "clips", tmp_path / "index"
    folder.mkdir()
    for name in ("a.mp4", "b.mp4"):
        (folder / name).write_bytes(clip.read_bytes())
        (folder / name).with_suffix(".txt").write_text(name)
    command = load_tool(ROOT, "index_data").main
    words = [str(folder), "--out", str(index), "--deepspeed_config", str(ROOT / "ds_configs" / "tiny_cpu.json")]
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path / "libraries"))
        assert re.search(told, refusal(clip))
        assert command(words) == 2
        assert re.search(told, capsys.readouterr().err) and not decoders()
    assert command(words) == 0
    assert "2 files examined" in capsys.readouterr().out, "nothing was kept of the build that could not decode"


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, stretches copied, cut out or zeroed, the end cut off: several of them."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        at, length = rng.randrange(len(changed)), rng.choice((1, 4, 16, 300))
        kind = rng.randrange(6)
        if kind == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at : at + length] = rng.randbytes(length)
        elif kind == 2:
            changed[at : at + length] = bytes(length)
        elif kind == 3:
            del changed[at : at + length]
        elif kind == 4:
            changed[at:at] = changed[rng.randrange(len(changed)) :][:length]
        elif len(changed) > 100:
            del changed[max(64, at) :]
    return bytes(changed)


def fuzz(real_data: Path, folder: Path, count: int) -> dict[str, float]:
    """Examine mutations of real videos, whole and split, and decode a frame of those that pass."""
    clips = sorted(path for path in (real_data / "stickers").iterdir() if path.suffix in (".mp4", ".webm"))
    assert len(clips) >= 16
    limits, passed, slowest = DecodeLimits(timeout_s=5.0), 0, 0.0
    reasons: dict[str, int] = {}
    with DecoderPool(2) as pool:
        for seed in range(count):
            rng = random.Random(seed)
            original = clips[seed % len(clips)]
            path = folder / f"{seed}{original.suffix}"
            path.write_bytes(mutated(original.read_bytes(), rng))
            started = time.monotonic()
            try:
                if seed % 4 == 3:
                    for part in pool.examine_windows(path, limits, WHITE, 0.5):
                        assert part.window is not None and len(part.thumbnails) == part.info.num_frames
                    passed += 1
                else:
                    found = pool.examine(path, limits)
                    assert len(found.thumbnails) == min(found.info.num_frames, limits.max_frames)
                    assert pool.decode(path, 32, WHITE, limits, frames=[0], content=found.content).shape == (1, 32, 32, 3)
                    passed += 1
            except ClipError as error:
                assert error.reason and "nonsense" not in error.reason
                kind = error.reason.split("(")[0][:40]
                reasons[kind] = reasons.get(kind, 0) + 1
            slowest = max(slowest, time.monotonic() - started)
            path.unlink()
    assert slowest < 2 * (limits.timeout_s + SLACK_S)
    print(json.dumps({"count": count, "passed": passed, "slowest_s": round(slowest, 2), "reasons": reasons}, indent=1))
    return {"passed": passed, "broken": sum(reasons.values())}


def test_mutations_of_real_videos_are_decoded_or_refused(real_data: Path, tmp_path: Path) -> None:
    counts = fuzz(real_data, tmp_path, 200)
    assert sum(counts.values()) == 200 and min(counts.values()) >= 10


@pytest.mark.soak
def test_a_thousand_mutations(real_data: Path, tmp_path: Path) -> None:
    counts = fuzz(real_data, tmp_path, 1000)
    assert sum(counts.values()) == 1000
