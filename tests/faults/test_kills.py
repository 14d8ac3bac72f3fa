"""kill -9 at random instants, half of them inside a save: nothing that was committed is ever lost, and nothing is learned differently."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from rdtf_ds.exit_codes import DONE
from tests.faults.fork_server import Launched
from tests.faults.real_launcher import RealLaunch
from tests.faults.runs import (
    STEPS,
    TRIALS,
    Trial,
    commit_of,
    commits,
    cut_saves,
    differences,
    learned,
    lines_logged,
    resumed_after,
    started_training,
    step_of,
)

ROW = "kill -9 at random instants, half aimed inside a save; victim one rank (trainer or supervisor), all ranks, the launcher"
BAR = "≥ 100 kills, ≥ 30 on 2 ranks; 0 restarts from step 0, 0 resumes older than the last commit, final state bit-equal"
LONGEST_S = 5.0
"""A run of 40 steps takes about seven seconds: most instants lie within it."""
A_SAVE_S = 0.06
GONE_S = 40.0
"""What is left of a launch without its launcher must be gone by then."""


@dataclass
class Tally:
    """What came of the kills."""

    victims: Counter[str] = field(default_factory=Counter)
    ranks: Counter[int] = field(default_factory=Counter)
    cut: int = 0
    runs: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return sum(self.victims.values())

    def __str__(self) -> str:
        victims = ", ".join(f"{victim} {count}" for victim, count in sorted(self.victims.items()))
        told = f"{self.kills} kills ({victims}), {self.ranks[2]} on 2 ranks, {self.cut} cut a save; {self.runs} runs done; "
        good = "0 from step 0, 0 from an older commit, 0 bits differ"
        return told + (f"{len(self.wrong)} WRONG: {'; '.join(self.wrong)}" if self.wrong else good)


class Campaign:
    """One run of a trial, killed again and again until it is done."""

    def __init__(self, fork_server, clips: Path, folder: Path, trial: Trial, ranks: int, tally: Tally, seed: int) -> None:
        self._server, self._clips, self._folder, self._trial, self._ranks = fork_server, clips, folder, trial, ranks
        self._tally, self._random = tally, random.Random(seed)
        self._last_commit: int | None = None

    def run(self, most_kills: int) -> None:
        """Kills up to ``most_kills`` times; the last start is left to finish."""
        for _ in range(most_kills):
            launched = self._launch()
            self._wait_for_the_instant(launched)
            if launched.poll() is None:
                victim = self._strike(launched)
                assert launched.gone_within(GONE_S), f"{victim} was killed, and these live on: {launched.orphans()}"
                launched.wait()
                self._tally.victims[victim] += 1
                self._tally.ranks[self._ranks] += 1
                self._tally.cut += cut_saves(self._folder)
            self._judge(launched)
            if launched.poll() == DONE:
                break
        last = self._launch()
        assert last.wait() == DONE, last.said[-3000:]
        self._judge(last)
        self._tally.runs += 1

    def _launch(self) -> Launched:
        newest = commits(self._folder)
        self._last_commit = step_of(newest[0]) if newest else None
        return self._server.launch(self._trial.arguments(self._clips, self._folder), self._ranks, self._folder / "logs")

    def _wait_for_the_instant(self, launched: Launched) -> None:
        if self._random.random() < 0.5:
            deadline = time.monotonic() + self._random.uniform(0, LONGEST_S)
            while launched.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
            return
        saves, seen = self._random.randint(1, 4), self._unfinished()
        while launched.poll() is None and saves:
            time.sleep(0.002)
            if (now := self._unfinished()) - seen:
                saves -= 1
            seen = now
        time.sleep(self._random.uniform(0, A_SAVE_S))

    def _unfinished(self) -> set[tuple[str, int]]:
        found = set()
        for path in (self._folder / "checkpoints").glob("step*.partial"):
            try:
                found.add((path.name, path.stat().st_ino))
            except FileNotFoundError:
                continue
        return found

    def _strike(self, launched: Launched) -> str:
        victims = ["one rank", "all ranks", "launcher"] if self._ranks > 1 else ["one rank", "launcher"]
        victim = self._random.choices(victims, [6, 3, 1] if self._ranks > 1 else [5, 1])[0]
        if victim == "launcher":
            launched.signal(launched.pid, signal.SIGKILL)
        elif victim == "all ranks" or not launched.ranks:
            launched.kill()
            victim = "all ranks"
        else:
            supervisor_and_trainer = launched.family(self._random.choice(launched.ranks))[:2]
            if supervisor_and_trainer:
                launched.signal(self._random.choice(supervisor_and_trainer), signal.SIGKILL)
        return victim

    def _judge(self, launched: Launched) -> None:
        """What this start said of where it went on, against what lay on the disk before it."""
        resumed, before = resumed_after(launched.said), self._last_commit
        if before is None or not started_training(launched.said):
            return
        if resumed is None:
            self._tally.wrong.append(f"started from step 0 with step {before} on disk")
        elif resumed < before:
            self._tally.wrong.append(f"resumed after {resumed} with step {before} on disk")


def campaigns(trial, ranks, kills, fork_server, clips, undisturbed, folder, seed=0) -> Tally:
    """As many runs as so many kills take; each ends in the state of the run left alone."""
    tally, alone = Tally(), undisturbed(trial, ranks)
    while tally.kills < kills:
        run = folder / f"run{tally.runs}"
        Campaign(fork_server, clips, run, TRIALS[trial], ranks, tally, seed + 1000 * tally.runs).run(kills - tally.kills)
        different = differences(commit_of(run, STEPS), commit_of(alone, STEPS))
        tally.wrong += [f"{trial} on {ranks} rank(s) ended otherwise: {different[:3]}"] if different else []
        tally.wrong += [f"{trial} on {ranks} rank(s) logged otherwise"] if learned(run) != learned(alone) else []
    return tally


@pytest.mark.parametrize(("trial", "ranks"), [("fp32", 1), ("fp16", 2)])
def test_a_few_kills_lose_nothing(trial, ranks, fork_server, clips, undisturbed, tmp_path):
    tally = campaigns(trial, ranks, 4, fork_server, clips, undisturbed, tmp_path)
    assert tally.wrong == []


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_hundred_kills_lose_nothing(fork_server, clips, undisturbed, tmp_path, fault_table):
    total = Tally()
    for seed, (trial, ranks, kills) in enumerate([("fp32", 1, 33), ("fp16", 1, 33), ("fp32", 2, 20), ("fp16", 2, 20)]):
        tally = campaigns(trial, ranks, kills, fork_server, clips, undisturbed, tmp_path / f"{trial}{ranks}", seed=seed)
        total.victims, total.ranks = total.victims + tally.victims, total.ranks + tally.ranks
        total.cut, total.runs, total.wrong = total.cut + tally.cut, total.runs + tally.runs, total.wrong + tally.wrong
    fault_table(ROW, BAR, str(total))
    assert total.wrong == []
    assert total.kills >= 100 and total.ranks[2] >= 30 and total.cut >= 20


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_ranks_outlive_the_real_launcher_only_to_save(fork_server, clips, undisturbed, tmp_path, fault_table):
    arguments = TRIALS["fp32"].arguments(clips, tmp_path)
    for lines in (4, 17):
        with RealLaunch(arguments, tmp_path) as launch:
            launch.wait_for(lines)
            launch.runner.kill()
            launch.launcher.kill()
            launch.seconds_to_end(GONE_S)
        assert step_of(commits(tmp_path)[0]) == lines_logged(tmp_path), "the step at hand is saved before the ranks end"
    launched = fork_server.launch(arguments, 2, tmp_path / "logs")
    assert launched.wait() == DONE, launched.said[-3000:]
    assert differences(commit_of(tmp_path, STEPS), commit_of(undisturbed("fp32", 2), STEPS)) == []
    fault_table("kill -9 of the `deepspeed` launcher itself", "ranks save and end, final state bit-equal", "2 kills, 0 bits differ")
