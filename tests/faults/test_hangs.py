"""A rank, a loader worker or a decoder that hangs: noticed from outside within the limit, ended with "restart me", resumed exactly."""

from __future__ import annotations

import signal
import time

import pytest

from rdtf_ds.exit_codes import DONE, RESTART
from tests.faults.runs import STEPS, TRIALS, commit_of, commits, differences, learned, lines_logged, resumed_after, step_of
from tests.faults.saboteur import FAULT

LIMIT_S, SLACK_S = 4.0, 12.0
"""The limit set, and what a busy machine may add to it: stacks are asked for, processes are killed, the launcher ends the other rank."""
LIMITED = f"rdtf.watchdog.stall_timeout_s={LIMIT_S}"
SAMPLE = 21
"""At which a decoder hangs: of step 10, behind three checkpoints."""
_noticed: dict[str, float] = {}


def ends_and_resumes(launched, since, arguments, ranks, fork_server, alone, folder):
    """The hang is noticed; the same command, with ``arguments``, then ends as the run left alone. Returns the seconds it took to notice.

    ``arguments`` have the usual limit again: a busy machine may take 4 s for a step in which nothing hangs.
    """
    assert launched.wait(LIMIT_S + SLACK_S) == RESTART, launched.said[-3000:]
    seconds = time.monotonic() - since
    assert launched.gone_within(5)
    assert "rdtf.watchdog.stall_timeout_s" in launched.said and "Traceback" not in launched.said
    newest = step_of(commits(folder)[0])
    again = fork_server.launch(arguments, ranks, folder / "logs")
    assert again.wait() == DONE, again.said[-3000:]
    assert resumed_after(again.said) == newest
    assert learned(folder) == learned(alone)
    assert differences(commit_of(folder, STEPS), commit_of(alone, STEPS)) == []
    return seconds


def stop_a_process(victim, trial, fork_server, clips, undisturbed, folder):
    """SIGSTOP to the trainer of a rank, or to one of its loader workers, amid a run of 2 ranks."""
    launched = fork_server.launch(TRIALS[trial].arguments(clips, folder, LIMITED), 2, folder / "logs")
    while lines_logged(folder) < 8:
        assert launched.poll() is None, launched.said[-3000:]
        time.sleep(0.01)
    _, trainer, *workers = launched.family(launched.ranks[1])
    launched.signal(workers[0] if victim == "loader worker" else trainer, signal.SIGSTOP)
    again = TRIALS[trial].arguments(clips, folder)
    return ends_and_resumes(launched, time.monotonic(), again, 2, fork_server, undisturbed(trial, 2), folder)


def hold_the_gil(workers, trial, fork_server, clips, undisturbed, folder):
    """A decoder sleeps with the GIL, in a loader worker or in the training process itself."""
    few = f"rdtf.data.workers={workers}"
    launched = fork_server.launch(TRIALS[trial].arguments(clips, folder, LIMITED, few), 1, folder / "logs", {FAULT: f"gil sample={SAMPLE}"})
    while lines_logged(folder) < SAMPLE // 2:
        assert launched.poll() is None, launched.said[-3000:]
        time.sleep(0.01)
    again = TRIALS[trial].arguments(clips, folder, few)
    seconds = ends_and_resumes(launched, time.monotonic(), again, 1, fork_server, undisturbed(trial, 1), folder)
    stacks = (folder / "stacks_rank0000.txt").read_text()
    assert "in decode" in stacks or "in __getitem__" in stacks, "the stacks show where it hangs"
    return seconds


def enter(table, what, seconds):
    _noticed[what] = seconds
    told = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in _noticed.items())
    table(
        "SIGSTOP of one rank or of its loader worker; decoder sleeping with the GIL",
        f"noticed within the configured limit (here {LIMIT_S:g} s, + {SLACK_S:g} s to end), exit code {RESTART}, resumed run exact",
        f"until the launch had ended: {told}; 0 bits differ",
    )


def test_a_stopped_rank_is_noticed(fork_server, clips, undisturbed, tmp_path):
    stop_a_process("rank", "fp16", fork_server, clips, undisturbed, tmp_path)


def test_a_decoder_that_holds_the_gil_is_noticed(fork_server, clips, undisturbed, tmp_path):
    hold_the_gil(1, "fp32", fork_server, clips, undisturbed, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("trial", TRIALS)
@pytest.mark.parametrize("victim", ["rank", "loader worker"])
def test_every_stopped_process_is_noticed(victim, trial, fork_server, clips, undisturbed, tmp_path, fault_table):
    enter(fault_table, f"{victim} ({trial})", stop_a_process(victim, trial, fork_server, clips, undisturbed, tmp_path))


@pytest.mark.soak
@pytest.mark.parametrize("workers", [0, 1])
def test_every_held_gil_is_noticed(workers, fork_server, clips, undisturbed, tmp_path, fault_table):
    where = "loader worker" if workers else "trainer"
    enter(fault_table, f"GIL of a {where}", hold_the_gil(workers, "fp32", fork_server, clips, undisturbed, tmp_path))
