"""Numbers gone bad on one rank of two: skipped, gone back from, and the second time the end, with a code of its own."""

from __future__ import annotations

import json
import math

import pytest

from rdtf_ds.exit_codes import DIVERGED, DONE
from tests.faults.runs import STEPS, TRIALS, commits, learned, step_of
from tests.faults.saboteur import FAULT

SAMPLE, STEP = 21, 10
"""Of a global batch of 2, so the second rank's; three checkpoints lie behind it, the last after 9 steps."""


def launch(fork_server, clips, folder, trial, fault, *settings):
    arguments = TRIALS[trial].arguments(clips, folder, *settings)
    launched = fork_server.launch(arguments, 2, folder / "logs", {FAULT: fault})
    return launched, launched.wait()


def incidents(folder):
    return [json.loads(line) for line in (folder / "incidents.jsonl").read_text().splitlines()]


def pid_is_finite(lines):
    return all(math.isfinite(value) for line in lines for value in (*line["pid"].values(), line["target_level"]))


@pytest.mark.parametrize("trial", ["fp16"])
def test_once_is_a_step_skipped_and_told(fork_server, clips, tmp_path, trial):
    launched, code = launch(fork_server, clips, tmp_path, trial, f"nan sample={SAMPLE}")
    assert code == DONE, launched.said[-3000:]
    lines = learned(tmp_path)
    assert lines[STEP]["loss"] is None and lines[STEP]["skipped"] and lines[STEP]["sample_losses"].count(None) == 1
    assert [line["step"] for line in lines if line["loss"] is None] == [STEP] and len(lines) == STEPS
    assert pid_is_finite(lines)
    assert f"ALARM: Step {STEP} was skipped" in launched.said and "on rank 1" in launched.said
    assert not (tmp_path / "incidents.jsonl").exists()


@pytest.mark.parametrize("trial", ["fp32"])
def test_at_the_limit_the_run_goes_back_and_passes_over_the_sample(fork_server, clips, undisturbed, tmp_path, trial):
    launched, code = launch(fork_server, clips, tmp_path, trial, f"nan sample={SAMPLE}", "rdtf.watchdog.bad_steps=1")
    assert code == DONE, launched.said[-3000:]
    (incident,) = incidents(tmp_path)
    assert (incident["checkpoint_step"], incident["first_step"], incident["last_step"]) == (9, STEP, STEP)
    assert incident["sample_numbers"] == [SAMPLE] and "on rank 1" in incident["where"] and len(incident["clips"]) == 1
    assert "Resumed after 9 steps" in launched.said and "Going back to the checkpoint of step 9" in launched.said
    lines, alone = learned(tmp_path), learned(undisturbed(trial, 2))
    assert [line["step"] for line in lines] == list(range(STEPS)) and None not in [line["loss"] for line in lines[STEP:]]
    assert lines[:STEP] == alone[:STEP], "what was before is as if nothing had happened"
    ids, planned = ([clip for line in run for clip in line["sample_ids"]] for run in (lines, alone))
    assert [number for number in range(len(ids)) if ids[number] != planned[number]] == [SAMPLE]
    assert pid_is_finite(lines)


@pytest.mark.soak
def test_the_count_of_bad_numbers(fork_server, clips, tmp_path, fault_table):
    """NaN once, up to the limit, at it, twice at it, in fp32 and fp16 on one of two ranks."""
    ends, steps = [], 16
    for trial in TRIALS:
        for fault, limit in (("nan sample=21", 2), ("nan sample=21", 1), ("nan sample=21 attempts=99", 1)):
            folder = tmp_path / f"{trial}{len(ends)}"
            arguments = TRIALS[trial].arguments(clips, folder, f"rdtf.watchdog.bad_steps={limit}", steps=steps)
            launched = fork_server.launch(arguments, 2, folder / "logs", {FAULT: fault})
            ends.append((launched.wait(), pid_is_finite(learned(folder)), (folder / "incidents.jsonl").exists()))
    codes = [code for code, _, _ in ends]
    fault_table(
        "NaN on one rank of two: once, at the limit of bad steps, at the limit again after going back (fp32 and fp16)",
        f"skipped and told; gone back past the sample; ended with {DIVERGED}; the PID never sees it",
        f"{len(ends)} runs: exit codes {codes}, {sum(went_back for _, _, went_back in ends)} went back, "
        f"{sum(finite for _, finite, _ in ends)} with a finite PID throughout",
    )
    assert codes == 2 * [DONE, DONE, DIVERGED] and all(finite for _, finite, _ in ends)
    assert [went_back for _, _, went_back in ends] == 2 * [False, True, True]


def test_twice_from_the_same_checkpoint_ends_the_run(fork_server, clips, tmp_path):
    for start in (1, 2):
        launched, code = launch(fork_server, clips, tmp_path, "fp32", f"nan sample={SAMPLE} attempts=99", "rdtf.watchdog.bad_steps=1")
        assert json.loads((tmp_path / "outcome.json").read_text())["exit_code"] == DIVERGED, "whichever rank left first"
        assert code == DIVERGED, launched.said[-3000:]
        told = " ".join(launched.said.split())
        assert "Error: Numbers went bad in step 10" in told and "rdtf.optimizer.learning_rate" in told and "Traceback" not in told
        assert len(incidents(tmp_path)) == 1 and step_of(commits(tmp_path)[0]) == 9, f"start {start} leaves what there was"


def test_bad_from_the_first_step_on_goes_back_to_the_beginning(fork_server, clips, tmp_path):
    launched, code = launch(fork_server, clips, tmp_path, "fp32", "nan sample=0", "rdtf.watchdog.bad_steps=1")
    assert code == DONE, launched.said[-3000:]
    assert incidents(tmp_path)[0]["checkpoint_step"] == 0 and "Resumed after 0 steps" in launched.said
