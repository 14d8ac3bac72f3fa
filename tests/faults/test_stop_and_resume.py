"""Stopped and started again at any step, a run is bit for bit what it would have been: weights, moments, loss scale, PID, plans, log."""

from __future__ import annotations

import pytest

from rdtf_ds.exit_codes import DONE
from tests.faults.runs import STEPS, TRIALS, commit_of, differences, learned, resumed_after

EVERYTHING = "stop and resume at every step of 40: losses, sample ids, weights, moments, scaler, PID, plans"
_ran: list[str] = []


def in_legs(stops, trial, ranks, fork_server, clips, undisturbed, folder):
    """Runs up to each of ``stops`` in a process of its own; after each the state is that of the run left alone."""
    alone = undisturbed(trial, ranks)
    came_from = None
    for stop in stops:
        launched = fork_server.launch(TRIALS[trial].arguments(clips, folder, steps=stop), ranks, folder / "logs")
        assert launched.wait() == DONE, launched.said[-3000:]
        assert resumed_after(launched.said) == came_from
        assert differences(commit_of(folder, stop), commit_of(alone, stop)) == []
        assert learned(folder) == learned(alone)[:stop]
        came_from = stop


@pytest.mark.parametrize(("trial", "ranks"), [("fp32", 1), ("fp16", 2)])
def test_a_few_stops_change_nothing(trial, ranks, fork_server, clips, undisturbed, tmp_path):
    in_legs((1, 2, 5, 12), trial, ranks, fork_server, clips, undisturbed, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("trial", TRIALS)
def test_a_stop_at_every_step_changes_nothing(trial, ranks, fork_server, clips, undisturbed, tmp_path, fault_table):
    in_legs(range(1, STEPS + 1), trial, ranks, fork_server, clips, undisturbed, tmp_path)
    _ran.append(f"{trial} on {ranks}")
    fault_table(EVERYTHING, "bit-equal, tolerance 0", f"{STEPS * len(_ran)} stops, 0 bits differ ({', '.join(_ran)} rank(s))")
