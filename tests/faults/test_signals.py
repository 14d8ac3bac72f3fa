"""SIGTERM and SIGUSR1 at random instants, to the launcher or a rank, and files that ask the same: the step is finished and committed."""

from __future__ import annotations

import json
import random
import signal
import statistics
import time

import pytest

from rdtf_ds.exit_codes import BUG, DONE, RESTART
from tests.faults.real_launcher import RealLaunch
from tests.faults.runs import (
    STEPS,
    TRIALS,
    commit_of,
    commits,
    differences,
    learned,
    lines_logged,
    resumed_after,
    started_training,
    step_of,
)

BAR_S = 25.0
TARGETS = ((signal.SIGTERM, "launcher"), (signal.SIGTERM, "every rank"), (signal.SIGTERM, "one rank"), (signal.SIGUSR1, "one rank"))


def stop_by_signal(launched, number, target, chance):
    """Sends it; returns the seconds until everything of the launch has ended, and the code it may end with."""
    sent = time.monotonic()
    ranks = launched.ranks
    if target == "launcher" or not ranks:
        launched.signal(launched.pid, signal.SIGTERM)
    else:
        for pid in ranks if target == "every rank" else [chance.choice(ranks)]:
            launched.signal(pid, number)
    launched.wait(60)
    assert launched.gone_within(10)
    return time.monotonic() - sent, BUG if target == "launcher" or not ranks else RESTART


def told_outcome(folder):
    """What rank 0 left word of, whatever the launcher made of it."""
    return json.loads((folder / "outcome.json").read_text())["exit_code"]


def interrupted_runs(trial, ranks, signals, fork_server, clips, undisturbed, folder, seed):
    """A run stopped at random instants; returns the seconds each stop took."""
    alone, chance, took, runs = undisturbed(trial, ranks), random.Random(seed), [], 0
    arguments = TRIALS[trial].arguments(clips, folder / "run0")
    while len(took) < signals:
        run = folder / f"run{runs}"
        launched = fork_server.launch(TRIALS[trial].arguments(clips, run), ranks, run / "logs")
        number, target = TARGETS[len(took) % len(TARGETS)]
        instant = time.monotonic() + chance.uniform(0, 5)
        while launched.poll() is None and time.monotonic() < instant:
            time.sleep(0.01)
        if launched.poll() is None:
            seconds, code = stop_by_signal(launched, number, target, chance)
            done = "Done:" in launched.said
            assert launched.poll() == code or done, f"{number!r} to {target}: {launched.poll()}\n{launched.said[-3000:]}"
            assert done or not started_training(launched.said) or told_outcome(run) == RESTART
            took.append(seconds)
            if lines_logged(run):
                newest = commits(run)[0]
                assert step_of(newest) == lines_logged(run), f"{number!r} to {target}: a step was lost\n{launched.said[-3000:]}"
                assert differences(newest, commit_of(alone, step_of(newest))) == []
        assert "Traceback" not in launched.said, launched.said
        runs += lines_logged(run) == STEPS
    launched = fork_server.launch(arguments, ranks, folder / "logs")
    assert launched.wait() == DONE
    assert learned(folder / "run0") == learned(alone)
    assert differences(commit_of(folder / "run0", STEPS), commit_of(alone, STEPS)) == []
    return took


@pytest.mark.parametrize(("trial", "ranks"), [("fp16", 2)])
def test_a_few_signals_lose_no_step(trial, ranks, fork_server, clips, undisturbed, tmp_path):
    took = interrupted_runs(trial, ranks, 4, fork_server, clips, undisturbed, tmp_path, seed=1)
    assert max(took) < BAR_S


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_twenty_signals_lose_no_step(fork_server, clips, undisturbed, tmp_path, fault_table):
    took = []
    for seed, (trial, ranks) in enumerate([("fp32", 1), ("fp16", 1), ("fp32", 2), ("fp16", 2)]):
        took += interrupted_runs(trial, ranks, 5, fork_server, clips, undisturbed, tmp_path / f"{trial}{ranks}", seed=10 + seed)
    folder = tmp_path / "real"
    arguments = TRIALS["fp32"].arguments(clips, folder)
    real = [stop_the_real_launcher(which, lines, arguments, folder) for which, lines in (("runner", 3), ("launcher", 9))]
    assert differences(commits(folder)[0], commit_of(undisturbed("fp32", 2), lines_logged(folder))) == []
    took += real
    times = f"worst {max(took):.1f} s, median {statistics.median(took):.1f} s"
    through = f"through the real launcher {' and '.join(f'{seconds:.1f}' for seconds in real)} s"
    fault_table(
        "SIGTERM or SIGUSR1 at random instants, to the launcher, one rank or every rank",
        "commit of the last step and documented exit code within 25 s each",
        f"{len(took)} signals, 0 steps lost; until all processes were gone: {times}; {through}",
    )
    assert max(took) < BAR_S


def stop_the_real_launcher(which, lines, arguments, folder):
    """SIGTERM to the ``deepspeed`` command, which does not tell its ranks, or to the process below it, which does."""
    with RealLaunch(arguments, folder) as launch:
        launch.wait_for(lines)
        getattr(launch, which).terminate()
        seconds = launch.seconds_to_end(60)
    assert step_of(commits(folder)[0]) == lines_logged(folder)
    assert told_outcome(folder) == RESTART
    return seconds


def test_files_ask_for_a_save_and_a_stop(fork_server, clips, undisturbed, tmp_path):
    """``touch OUT/save`` commits at once and goes on, ``touch OUT/stop`` commits and ends; both files are taken away."""
    arguments = TRIALS["fp16"].arguments(clips, tmp_path, "rdtf.checkpoint.interval=1000")
    launched = fork_server.launch(arguments, 2, tmp_path / "logs")
    for wish, lines in (("save", 3), ("stop", 8)):
        while lines_logged(tmp_path) < lines:
            assert launched.poll() is None, launched.said[-3000:]
            time.sleep(0.005)
        (tmp_path / wish).touch()
        if wish == "save":
            while (tmp_path / "save").exists() or step_of(commits(tmp_path)[0]) == 0:
                assert launched.poll() is None, launched.said[-3000:]
                time.sleep(0.005)
    assert launched.wait() == DONE
    assert not (tmp_path / "stop").exists()
    stopped, saved, start = commits(tmp_path)
    assert 3 <= step_of(saved) < step_of(stopped) == lines_logged(tmp_path) < STEPS and step_of(start) == 0
    for checkpoint in (saved, stopped):
        assert differences(checkpoint, commit_of(undisturbed("fp16", 2), step_of(checkpoint))) == []
    again = fork_server.launch(arguments, 2, tmp_path / "logs")
    assert again.wait() == DONE and resumed_after(again.said) == step_of(stopped)
