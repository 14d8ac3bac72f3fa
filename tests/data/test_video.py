"""The video child: real clips through decord, and hostile children in its place."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rdtf_ds.data.clip import ClipError, DecodeLimits
from rdtf_ds.data.decoding import decode_clip, probe_clip
from rdtf_ds.data.video import VideoChild, child_reader, close_child_reader
from rdtf_ds.data.writing import write_clip

LIMITS = DecodeLimits()
WHITE = (255, 255, 255)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine grey frames, each brighter than the one before."""
    path = tmp_path_factory.mktemp("video") / "steps.webm"
    frames = np.zeros((9, 64, 80, 3), np.uint8) + (np.arange(9, dtype=np.uint8) * 25 + 20)[:, None, None, None]
    write_clip(frames, path, 80)
    return path


@pytest.fixture(autouse=True)
def _no_child_stays() -> Iterator[None]:
    yield
    close_child_reader()


def hostile(tmp_path: Path, body: str) -> VideoChild:
    """A child that runs ``body`` for each request line."""
    script = tmp_path / "child.py"
    script.write_text(f"import os, sys, time, signal\nfor line in sys.stdin:\n    {body}\n    sys.stdout.flush()\n")
    return VideoChild((sys.executable, str(script)))


def test_frames_are_thinned_in_order_and_letterboxed(clip: Path) -> None:
    frames = decode_clip(clip, 40, (255, 0, 0), DecodeLimits(max_frames=3))
    assert frames.shape == (3, 40, 40, 3)
    assert np.abs(frames[:, 20, 20].astype(int) - np.array([20, 120, 220])[:, None]).max() <= 4
    assert (frames[:, :4] == (255, 0, 0)).all() and (frames[:, 36:] == (255, 0, 0)).all()


def test_probe_says_what_the_file_is(clip: Path) -> None:
    info = probe_clip(clip, LIMITS)
    assert (info.format, info.num_frames, info.width, info.height, info.has_alpha) == ("webm", 9, 80, 64, False)
    assert len(info.durations_ms) == 9 and all(abs(duration - 80) <= 2 for duration in info.durations_ms)


@pytest.mark.parametrize("side", [8, 16, 24, 48, 72])
def test_pictures_too_narrow_for_decord_come_out_right(tmp_path: Path, side: int) -> None:
    frames = np.full((3, side, side, 3), (40, 90, 200), np.uint8)
    write_clip(frames, tmp_path / "small.mp4")
    assert probe_clip(tmp_path / "small.mp4", LIMITS).width == side
    assert np.abs(decode_clip(tmp_path / "small.mp4", 16, WHITE, LIMITS).astype(int) - (40, 90, 200)).max() <= 6


def test_decord_is_never_imported_here(clip: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from rdtf_ds.data.decoding import *; "
        f"decode_clip(Path({str(clip)!r}), 16, (0, 0, 0), DecodeLimits()); print('decord' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=120, check=True)
    assert result.stdout.strip() == "False"


def test_one_child_serves_many_clips_and_broken_ones_do_not_end_it(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "junk.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(range(256)) * 20)
    (tmp_path / "cut.webm").write_bytes(clip.read_bytes()[:60])
    decode_clip(clip, 16, WHITE, LIMITS)
    process = child_reader()._process
    assert process is not None
    for broken in ("junk.mp4", "cut.webm"):
        with pytest.raises(ClipError, match="decord"):
            decode_clip(tmp_path / broken, 16, WHITE, LIMITS)
    assert len(decode_clip(clip, 16, WHITE, LIMITS)) == 9
    assert child_reader()._process is process


def test_a_hanging_child_is_killed_at_the_deadline_and_replaced(tmp_path: Path) -> None:
    child = hostile(tmp_path, "print('x', end='', flush=True); time.sleep(100)")
    for _ in range(2):
        started = time.monotonic()
        with pytest.raises(ClipError, match="decode_timeout_s .1.5 s."):
            child.decode(tmp_path / "a.mp4", 16, WHITE, DecodeLimits(timeout_s=1.5))
        assert 1.4 < time.monotonic() - started < 10
        assert child._process is None


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("os._exit(3)", "exit code 3"),
        ("print('not json')", "nonsense"),
        ("print('{\"info\": {}, \"bytes\": 10}xx'); os._exit(0)", "nonsense|exit code 0"),
        ("print('{\"info\": {}, \"bytes\": 10}'); print('x', flush=True); os._exit(0)", "exit code 0"),
    ],
)
def test_a_dying_or_lying_child_is_the_clips_error(tmp_path: Path, body: str, message: str) -> None:
    child = hostile(tmp_path, body)
    with pytest.raises(ClipError, match=message):
        child.decode(tmp_path / "a.mp4", 16, WHITE, LIMITS)
    child.close()


def test_a_child_killed_between_requests_is_no_clips_fault(clip: Path) -> None:
    decode_clip(clip, 16, WHITE, LIMITS)
    process = child_reader()._process
    assert process is not None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(decode_clip(clip, 16, WHITE, LIMITS)) == 9


def test_the_child_ignores_termination_and_ends_with_its_parent(clip: Path) -> None:
    decode_clip(clip, 16, WHITE, LIMITS)
    process = child_reader()._process
    assert process is not None and process.stdin is not None
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGINT)
    assert len(decode_clip(clip, 16, WHITE, LIMITS)) == 9
    assert child_reader()._process is process
    process.stdin.close()  # as when the parent is gone
    assert process.wait(timeout=10) == 0


def test_a_request_is_one_line_of_json_whatever_the_name(tmp_path: Path) -> None:
    child = hostile(tmp_path, "print(line.strip().replace('path', 'error'))")
    with pytest.raises(ClipError) as caught:
        child.probe(tmp_path / 'odd\n"name".mp4', LIMITS)
    assert caught.value.reason.endswith('odd\n"name".mp4')
    assert json.loads(json.dumps(caught.value.path)) == caught.value.path
    child.close()
