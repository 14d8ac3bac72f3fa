"""Training data of which some clips pass examination and then hang, crash or blow up the decoder: the run's batches stay exact."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from rdtf_ds.data.clips import decoder_process
from rdtf_ds.data.clips.clip import DecodeLimits
from rdtf_ds.data.clips.decoder_pool import close_process_pool
from rdtf_ds.data.clips.decoder_process import DecoderUnavailable
from rdtf_ds.data.clips.writing import write_clip
from rdtf_ds.data.indexing.problem import Problem
from rdtf_ds.data.quarantine import Quarantine
from tests.data.moving_pictures import pictures
from tests.data.test_loader import flat, make, observed
from tests.faults.fork_server import ROOT

STEPS = 2
REASONS = {
    "decode_sleeps.mp4": "decoding took longer than rdtf.data.decode_timeout_s (1.5 s)",
    "decode_segfaults.mp4": "the decoder died (signal SIGSEGV)",
    "decode_allocates_10_gb.mp4": "takes more than 2048 MiB to decode: MemoryError",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for number, name in enumerate([*REASONS, *(f"sound{number}.mp4" for number in range(5))]):
        write_clip(pictures(6 + number, 64, 64), folder / name, 80)
        (folder / name).with_suffix(".txt").write_text(f"clip number {number}")
    return folder


def run(root: Path, workers: int) -> tuple[list[Any], list[list[Problem]], Quarantine]:
    loader, queue = make(root, workers, limits=DecodeLimits(timeout_s=1.5))
    quarantine = Quarantine(root / "unused.jsonl", 1.0, 8, write=False, delay=queue.delay)
    loader._barred = quarantine.barred_since
    taken, problems = [], []
    for step, batches in loader.steps(0, STEPS):
        taken.append(batches)
        problems.append([problem for batch in batches for problem in batch.problems])
        quarantine.merge(problems[-1], step)
        queue.push(observed(queue, step))
    return flat(taken), problems, quarantine


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_whose_decoder_does_not_start_ends(root: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    loader, _ = make(root, workers, limits=DecodeLimits(timeout_s=1.5))
    monkeypatch.setattr(decoder_process, "COMMAND", (sys.executable, "-c", "raise SystemExit(7)"))
    close_process_pool()
    with pytest.raises(DecoderUnavailable, match="^Clips cannot be decoded, as the decoder cannot be started: exit code 7. See what"):
        next(loader.steps(0, STEPS))
    close_process_pool()


def test_a_run_over_clips_that_break_the_decoder_is_exact(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_process, "COMMAND", (sys.executable, str(ROOT / "tests" / "faults" / "hostile_decoder.py")))
    close_process_pool()  # whatever decoded before is not hostile
    try:
        first, problems, quarantine = run(root, workers=0)
        again, problems_again, _ = run(root, workers=0)
        in_workers, problems_in_workers, _ = run(root, workers=2)
    finally:
        close_process_pool()
    assert first == again == in_workers and len(first) == 12 * STEPS
    assert problems == problems_again == problems_in_workers
    failed = [problem for step in problems for problem in step]
    assert {problem.path: problem.reason for problem in failed} == REASONS
    shown = {entry[1] for entry in first}
    assert len(shown) == 5, "the five sound clips stand in for those that do not decode"
    assert {problem.sample_number for problem in failed} <= {entry[0] for entry in first}
    assert quarantine.barred(STEPS + 10) == {problem.content for problem in failed}
