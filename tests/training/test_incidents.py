"""Bad steps counted to the limit and no other, samples to blame, and incidents that outlive kills, checkpoints and torn files."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from rdtf_ds.data.step_plan import SamplePlan, StepPlan
from rdtf_ds.diffusion.masks import Task
from rdtf_ds.errors import UserError
from rdtf_ds.exit_codes import DIVERGED
from rdtf_ds.training import incidents as module
from rdtf_ds.training.engine import StepOutcome
from rdtf_ds.training.incidents import BadSteps, Diverged, Incident, Incidents, NumbersWentBad, go_back

NAN, INF = float("nan"), float("inf")
FIRST = Incident(10, 12, 14, (25, 28, 29), "output of a (Conv2d) is inf", ("x/a.gif", "b.webp", "a.gif"))
SECOND = Incident(20, 21, 23, (43, 28), "weight w holds nan", ("c.png", "b.webp"))


def plan(step: int, samples: int = 3) -> StepPlan:
    """Sample n has clip 100 + n."""
    numbers = range(samples * step, samples * (step + 1))
    return StepPlan(step, 3, tuple(SamplePlan(n, 100 + n, 3, Task.GENERATION, (True, False, False), True) for n in numbers))


def outcome(losses: tuple[float, ...] = (1.0, 2.0, 3.0), applied: bool = False, bad: bool = False) -> StepOutcome:
    return StepOutcome(
        applied=applied, bad=bad, loss=1.0, sample_losses=losses, timesteps=(1, 2, 3), grad_norm=1.0, learning_rate=1.0, loss_scale=1.0
    )


GOOD, OVERFLOW, BAD = outcome(applied=True), outcome(), outcome(bad=True)


def bad(*losses: float) -> StepOutcome:
    return outcome(losses, bad=True)


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_it_is_raised_at_the_limit_exactly(limit: int) -> None:
    steps = BadSteps(limit)
    for step in range(limit - 1):
        steps.observe(plan(step), BAD)
        assert steps.count == step + 1
    with pytest.raises(NumbersWentBad, match=rf"{limit} bad step\(s\) in a row") as caught:
        steps.observe(plan(limit - 1), BAD)
    assert (caught.value.first_step, caught.value.last_step) == (0, limit - 1)
    assert caught.value.sample_numbers == tuple(range(3 * limit))
    assert caught.value.clip_ids == tuple(range(100, 100 + 3 * limit))
    assert isinstance(caught.value, UserError) and caught.value.everywhere


def test_a_good_step_ends_the_row_and_an_overflow_says_nothing() -> None:
    steps = BadSteps(3)
    counts = []
    for step, result in enumerate([OVERFLOW, BAD, BAD, OVERFLOW, OVERFLOW, GOOD, BAD, OVERFLOW, BAD, GOOD, GOOD, BAD]):
        steps.observe(plan(step), result)
        counts.append(steps.count)
    assert counts == [0, 1, 2, 2, 2, 0, 1, 1, 2, 0, 0, 1]
    steps.observe(plan(12), OVERFLOW)
    steps.observe(plan(13), BAD)
    with pytest.raises(NumbersWentBad, match="steps 11 to 14 were not finite: 3 bad") as caught:
        steps.observe(plan(14), BAD)
    assert (caught.value.first_step, caught.value.last_step) == (11, 14)
    assert caught.value.sample_numbers == (33, 34, 35, 39, 40, 41, 42, 43, 44)  # neither of the steps before nor of the overflow


def test_the_samples_to_blame_are_those_whose_loss_is_bad_or_all() -> None:
    steps = BadSteps(4)
    steps.observe(plan(0), bad(1.0, NAN, 2.0))
    steps.observe(plan(1), bad(INF, 1.0, -INF))
    steps.observe(plan(2), bad(1.0, 2.0, 3.0))
    with pytest.raises(NumbersWentBad) as caught:
        steps.observe(plan(3), bad(1.0, 2.0, NAN))
    assert caught.value.sample_numbers == (1, 3, 5, 6, 7, 8, 11)
    assert caught.value.clip_ids == (101, 103, 105, 106, 107, 108, 111)


def test_losses_must_be_those_of_the_plan() -> None:
    with pytest.raises(ValueError, match="zip"):
        BadSteps(2).observe(plan(0), bad(NAN, 1.0))


def test_a_row_can_be_forgotten_or_taken_up() -> None:
    steps, other = BadSteps(3), BadSteps(3)
    for step in (4, 5):
        steps.observe(plan(step), bad(1.0, NAN, 1.0))
    other.restore(json.loads(json.dumps(steps.to_json())))
    assert other.count == 2 and other.to_json() == steps.to_json()
    with pytest.raises(NumbersWentBad) as caught:
        other.observe(plan(6), bad(NAN, 1.0, 1.0))
    assert (caught.value.first_step, caught.value.sample_numbers, caught.value.clip_ids) == (4, (13, 16, 18), (113, 116, 118))
    steps.reset()
    assert steps.count == 0 and steps.to_json() == BadSteps(3).to_json()
    steps.observe(plan(6), BAD)
    assert steps.count == 1


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        BadSteps(0)


def open_incidents(folder: Path, write: bool = True) -> Incidents:
    return Incidents(folder / "incidents.jsonl", write)


def test_incidents_outlive_the_process(tmp_path: Path) -> None:
    incidents = open_incidents(tmp_path)
    assert incidents.all == () and incidents.passed_over == {} and not incidents.path.exists()
    incidents.add(FIRST)
    assert open_incidents(tmp_path).all == (FIRST,)
    incidents.add(SECOND)
    again = open_incidents(tmp_path)
    assert again.all == incidents.all == (FIRST, SECOND)
    assert again.passed_over == {25: 1, 28: 2, 29: 1, 43: 1}
    assert [again.since(step) for step in (9, 10, 12, 20, 21)] == [0, 1, 0, 1, 0]
    lines = [json.loads(line) for line in incidents.path.read_text().splitlines()]
    assert lines == incidents.to_json() and lines[0] == {
        "checkpoint_step": 10,
        "first_step": 12,
        "last_step": 14,
        "sample_numbers": [25, 28, 29],
        "where": "output of a (Conv2d) is inf",
        "clips": ["x/a.gif", "b.webp", "a.gif"],
    }


def test_only_the_rank_that_writes_writes(tmp_path: Path) -> None:
    silent = open_incidents(tmp_path, write=False)
    silent.add(FIRST)
    silent.merge([FIRST.to_json(), SECOND.to_json()])
    assert silent.all == (FIRST, SECOND) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept", [1, 30, -2])
def test_a_torn_last_line_is_left_out(tmp_path: Path, kept: int, caplog: pytest.LogCaptureFixture) -> None:
    incidents = open_incidents(tmp_path)
    incidents.add(FIRST)
    whole = incidents.path.read_bytes()
    incidents.add(SECOND)
    incidents.path.write_bytes(whole + incidents.path.read_bytes()[len(whole) :][:kept])
    again = open_incidents(tmp_path)
    assert again.all == (FIRST,) and "cut short" in caplog.text
    again.add(SECOND)
    assert open_incidents(tmp_path).all == (FIRST, SECOND)


@pytest.mark.parametrize(
    "line",
    [
        '{"checkpoint_step": 1',
        "[]",
        "7",
        "{}",
        json.dumps({**FIRST.to_json(), "first_step": "12"}),
        json.dumps({**FIRST.to_json(), "sample_numbers": [1.5]}),
        json.dumps({**FIRST.to_json(), "more": 1}),
    ],
)
def test_anything_else_in_the_file_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "incidents.jsonl"
    path.write_text(f"{json.dumps(FIRST.to_json())}\n{line}\n{json.dumps(SECOND.to_json())}\n")
    with pytest.raises(UserError, match=r"Line 2 of '.*incidents.jsonl' cannot be read .*delete the file"):
        open_incidents(tmp_path)


def test_the_longer_of_file_and_checkpoint_wins(tmp_path: Path) -> None:
    copies: list[list[dict[str, Any]]] = [[], [FIRST.to_json()], [FIRST.to_json(), SECOND.to_json()]]
    for mine, copy in enumerate(copies):
        for theirs, other in enumerate(copies):
            incidents = open_incidents(tmp_path / f"{mine}{theirs}")
            incidents.path.parent.mkdir()
            for entry in copy:
                incidents.add(Incident.from_json(entry))
            incidents.merge(json.loads(json.dumps(other)))
            expected = copies[max(mine, theirs)]
            assert incidents.to_json() == expected
            assert open_incidents(incidents.path.parent).to_json() == expected


@pytest.mark.parametrize("other", [[SECOND], [SECOND, FIRST], [FIRST, FIRST, SECOND]])
def test_another_runs_incidents_are_refused(tmp_path: Path, other: list[Incident]) -> None:
    incidents = open_incidents(tmp_path)
    incidents.add(FIRST)
    incidents.add(SECOND)
    with pytest.raises(UserError, match=r"incidents.jsonl' tells of other incidents .*delete it") as caught:
        incidents.merge([incident.to_json() for incident in other])
    assert caught.value.everywhere
    assert incidents.all == open_incidents(tmp_path).all == (FIRST, SECOND)


def test_a_disk_that_refuses_is_an_alarm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    incidents = open_incidents(tmp_path)
    with monkeypatch.context() as patched:

        def refuse(path: Path, data: bytes) -> None:
            raise OSError(28, "No space left on device")

        patched.setattr(module, "replace_file", refuse)
        incidents.add(FIRST)
    assert incidents.all == (FIRST,) and "No space left" in caplog.text and caplog.records[-1].levelno == logging.ERROR
    incidents.add(SECOND)
    assert open_incidents(tmp_path).all == (FIRST, SECOND)


def numbers_went_bad(first: int = 12, last: int = 14) -> NumbersWentBad:
    return NumbersWentBad("bad", first, last, (25, 28), (7, 9))


def test_the_first_time_it_goes_back(tmp_path: Path) -> None:
    incidents = open_incidents(tmp_path)
    files = {7: "a.gif", 9: "sub/b.webp"}
    incident = go_back(incidents, numbers_went_bad(), 10, "weight w holds nan", files.__getitem__)
    assert incident == Incident(10, 12, 14, (25, 28), "weight w holds nan", ("a.gif", "sub/b.webp"))
    assert open_incidents(tmp_path).all == (incident,)
    later = go_back(incidents, NumbersWentBad("bad", 30, 30, [90]), 20, "nothing was found")
    assert later == Incident(20, 30, 30, (90,), "nothing was found") and open_incidents(tmp_path).all == (incident, later)


def test_the_second_time_from_one_checkpoint_it_stops(tmp_path: Path) -> None:
    incidents = open_incidents(tmp_path)
    go_back(incidents, NumbersWentBad("bad", 12, 12, [25]), 10, "output of a is inf")
    go_back(incidents, numbers_went_bad(23, 24), 20, "output of b is inf")
    with pytest.raises(Diverged) as caught:
        go_back(incidents, numbers_went_bad(13, 17), 10, "output of c is nan", {7: "a.gif", 9: "b.webp"}.__getitem__)
    told = str(caught.value)
    for part in (
        "steps 13 to 17 (output of c is nan)",
        "checkpoint of step 10",
        "step 12 (output of a is inf)",
        "a.gif, b.webp",
        "rdtf.optimizer.learning_rate",
        "rdtf.optimizer.warmup_steps",
        str(tmp_path / "incidents.jsonl"),
    ):
        assert part in told
    assert "output of b" not in told
    assert caught.value.exit_code == DIVERGED == 76 and caught.value.everywhere and isinstance(caught.value, UserError)
    assert len(incidents.all) == len(open_incidents(tmp_path).all) == 2  # another start would end in the same way


def test_of_many_clips_some_are_named_once_each(tmp_path: Path) -> None:
    incidents = open_incidents(tmp_path)
    clip_ids = [1, 1, *range(2, 16)]
    bad_numbers = NumbersWentBad("bad", 1, 1, range(16), clip_ids)
    go_back(incidents, bad_numbers, 0, "where")
    with pytest.raises(Diverged, match=r"Clips this time: clip 1, clip 2, .*clip 12 and 3 more\."):
        go_back(incidents, bad_numbers, 0, "where")
    with pytest.raises(Diverged, match="Clips this time: not known"):
        go_back(incidents, NumbersWentBad("bad", 1, 1, [1]), 0, "where")
