"""Validation on two ranks that take turns in one process: what is done, in which order, within which bound, and what a failure does."""

from __future__ import annotations

import threading
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from rdtf_ds.errors import UserError
from rdtf_ds.training import validation, validation_units
from rdtf_ds.training.validation import Validation
from rdtf_ds.training.validation_clips import Request
from tests.training.timed_ranks import FVD, Clock, Log, Losses, Meeting, Pipeline

MEMORY = SimpleNamespace(phase=lambda name: nullcontext(), report=lambda log, done: None)


@pytest.fixture
def world(monkeypatch, tmp_path):
    """Two ranks that validate after each of ``steps``; the log, the collectives and the prompts asked by each."""
    clock = Clock()
    monkeypatch.setattr(validation, "time", clock)
    monkeypatch.setattr(validation_units, "time", clock)

    def run(
        steps=(100,), *, trained=1e9, max_share=1.0, broken=None, losses=True, fvd=False, hurry=lambda rank, asked: False, count=5,
        lose=None, fvd_fails=None, keep=None,
    ):  # fmt: skip
        meeting, log = Meeting(clock), Log(trained) if keep is None else keep
        pipelines, errors = [Pipeline(clock, broken or {}) for _ in range(2)], []
        monkeypatch.setattr(validation, "gather_objects", lambda value: meeting.gather(clock.local.rank, value))

        def on_rank_zero(make):
            value = make() if clock.local.rank == 0 else None
            told = meeting.gather(clock.local.rank, value, "told")[0]
            return value if clock.local.rank == 0 else told

        monkeypatch.setattr(validation, "on_rank_zero", on_rank_zero)

        def rank_of(rank):
            clock.local.rank = rank
            engine = SimpleNamespace(rank=rank, world_size=2, model="live")

            @contextmanager
            def applied_to(engine):
                meeting.gather(rank, None, "show")
                engine.model = "mean"
                yield
                engine.model = "live"
                meeting.gather(rank, None, "show")

            validate = Validation(
                engine, SimpleNamespace(applied_to=applied_to), log if rank == 0 else Log(0), MEMORY, tmp_path, pipelines[rank],
                [Request(f"{n}", f"p{n}", {0: np.zeros((4, 4, 3), np.uint8)}, 3, n) for n in range(count)], 1,
                Losses(clock, rank, lose if rank == 1 else None) if losses else None,
                FVD(clock, rank, fvd_fails if rank == 1 else None) if fvd else None, 200 if fvd else 0, True, 100, 1000, max_share,
                lambda: hurry(rank, pipelines[rank].asked),
            )  # fmt: skip
            try:
                for step in steps:
                    validate(step)
                    assert engine.model == "live"
            except BaseException as error:
                errors.append(error)
                meeting.barrier.abort()

        threads = [threading.Thread(target=rank_of, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        if errors:
            raise errors[0]
        assert meeting.calls[0] == meeting.calls[1], "every rank comes to every collective, in the same order"
        return log, meeting.calls[0], [pipeline.asked for pipeline in pipelines]

    return run


def test_everything_is_measured_made_and_told(world, tmp_path):
    log, calls, asked = world()
    assert calls[:3] == ["told", "told", "show"] and calls[-1] == "show" and calls.count("gather") == 3
    assert asked == [["p0", "p2", "p4"], ["p1", "p3"]], "each rank every second"
    (line,) = log.validations
    assert line["losses"] == {"loss": 2.5, "loss_PDT": 2.5, "loss_t0500": 2.5} and line["clips"] == ["0", "1", "2", "3", "4"]
    assert log.values == [{"validation/loss": 2.5, "validation/loss_PDT": 2.5, "validation/loss_t0500": 2.5}]
    assert line["seconds"] == pytest.approx(10 + 4 + 3 * 2) and line["put_off"] == [] and line["fvd"] is None
    assert line["costs"] == {"overhead": 0.0, "losses": 4.0, "clips": 2.0, "fvd": None, "preparing": 10.0}
    assert [tag for tag in log.shown] == [f"samples/{n}" for n in range(5)]
    assert (tmp_path / "samples" / "step00000100" / "prompts.txt").read_text().count("\n") == 5
    assert log.said == ["Validation after 100 steps: loss 2.5000 (PDT 2.5000) on 4 held-out clips; 5 clips; 20.0 s."]


def test_a_clip_that_fails_on_one_rank_is_a_warning_and_all_ranks_meet(world):
    log, _, asked = world(broken={"p1": UserError("p1 made NaN"), "p2": ZeroDivisionError("by what"), "p3": MemoryError()})
    assert [tag for tag in log.shown] == ["samples/0", "samples/4"] and asked[0] == ["p0", "p2", "p4"]
    assert log.said[:3] == [
        "Warning: after step 100 no validation clip 1: p1 made NaN",
        "Warning: after step 100 no validation clip 2: ZeroDivisionError: by what",
        "Warning: after step 100 no validation clip 3: MemoryError: ",
    ]
    assert log.validations[0]["losses"] is not None and len(log.validations[0]["failures"]) == 3


def test_losses_are_measured_whole_or_not_at_all(world):
    log, _, asked = world(lose=RuntimeError("no such kernel\nand a long trace"))
    assert log.validations[0]["losses"] is None and log.values == [{}] and len(asked[0]) == 3
    assert log.said[0] == "Warning: after step 100 no held-out loss: rank 1: RuntimeError: no such kernel"
    assert log.validations[0]["put_off"] == [], "it was tried"


def test_nothing_fits_nothing_is_swapped(world):
    log, calls, _ = world((100,), trained=200.0, max_share=0.05)  # unknown costs: the losses and one round
    assert log.validations[0]["seconds"] == pytest.approx(16.0) and log.validations[0]["clips"] == ["0", "1"]
    assert log.validations[0]["put_off"] == ["3 of 5 clips"] and "Put off, to keep to 5.0% of the time" in log.said[-1]
    again, calls, asked = world((200,), trained=200.0, max_share=0.05, keep=log)
    assert calls == ["told", "told"] and asked == [[], []]
    assert again.validations[1]["seconds"] == 0.0 and again.validations[1]["put_off"] == ["the losses", "5 of 5 clips"]
    assert again.validations[1]["costs"] == again.validations[0]["costs"]


def test_clips_that_did_not_fit_come_next_time(world):
    log, asked = None, []
    for step, trained in ((100, 200.0), (200, 620.0), (300, 970.0), (400, 1400.0)):
        if log is not None:
            log.trained_s = trained
        log, _, made = world((step,), trained=trained, max_share=0.05, keep=log)
        asked.append(sorted(made[0] + made[1]))
        assert step == 100 or log.validated_s <= 0.05 * (log.validated_s + log.trained_s)
    assert asked == [["p0", "p1"], ["p2", "p3"], ["p0", "p1", "p2", "p4"], ["p0", "p1", "p2", "p3", "p4"]]
    assert [line["next_clip"] for line in log.validations] == [2, 4, 3, 3], "all made: the next begins where this one did"


def test_a_stop_ends_it_with_what_is_made(world):
    log, calls, asked = world(hurry=lambda rank, asked: len(asked) >= 2)
    assert asked == [["p0", "p2"], ["p1", "p3"]] and calls[-1] == "show"
    assert log.said == [
        "Validation after 100 steps: loss 2.5000 (PDT 2.5000) on 4 held-out clips; 4 clips; 18.0 s. Put off, the run was asked to stop: "
        "1 of 5 clips."
    ]
    assert log.validations[0]["next_clip"] == 4 and log.validations[0]["failures"] == []
    assert log.validations[0]["costs"]["clips"] == pytest.approx(2.0), "a clip that was cut short makes the others no cheaper"


def test_a_stop_before_anything_is_no_lack_of_time(world):
    log, calls, asked = world(hurry=lambda rank, asked: True, max_share=0.05)
    assert calls == ["told", "told"] and asked == [[], []]
    assert log.said == ["Validation after 100 steps: 0.0 s. Put off, the run was asked to stop: the losses, 5 of 5 clips."]


def test_clips_that_fail_say_nothing_of_what_whole_ones_cost(world):
    log, _, _ = world((100,), broken={"p0": UserError("no"), "p1": UserError("no"), "p3": UserError("no")})
    assert log.validations[0]["clips"] == ["2", "4"] and log.validations[0]["costs"]["clips"] == pytest.approx(2.0)
    log.validations[0]["costs"]["clips"] = 9.0
    log, _, _ = world((200,), broken={f"p{n}": UserError("no") for n in range(5)}, keep=log)
    assert log.validations[1]["clips"] == [] and log.validations[1]["costs"]["clips"] == 9.0, "nothing new is known"


def test_a_stop_that_one_rank_sees_first(world):
    log, _, asked = world(hurry=lambda rank, asked: rank == 1)
    assert log.validations[0]["losses"] is None and asked == [[], []] and log.validations[0]["put_off"] == ["the losses", "5 of 5 clips"]


# FVD among the rest.


NO_OTHER_CLIPS = {"max_share": 0.05, "fvd": True, "count": 0, "losses": False}


def test_fvd_comes_after_one_round_and_the_rest_after_it(world):
    log, calls, asked = world((100, 200, 300, 400), fvd=True)
    measured = [line["fvd"] is not None for line in log.validations]
    assert measured == [False, True, False, True], "every 200 steps"
    assert log.validations[1]["fvd"]["variant"] == "I3D of a test" and log.validations[1]["fvd"]["fvd"] > 0
    assert log.validations[1]["fvd"] == log.validations[3]["fvd"] and log.values[1]["validation/fvd"] == log.validations[1]["fvd"]["fvd"]
    assert log.validations[1]["costs"]["fvd"] == pytest.approx(30.0), "features of real clips are made once"
    assert all(len(line["clips"]) == 5 for line in log.validations)
    assert "FVD " in log.said[1] and "(8 clips; I3D of a test)" in log.said[1]


def test_fvd_that_does_not_fit_holds_clips_back_until_it_does(world):
    log, _, _ = world((200,), trained=1200.0, max_share=0.05, fvd=True)  # 63 s allowed, 16 spent, 40 expected
    assert log.validations[0]["fvd"] is not None
    log, _, asked = world((200,), trained=900.0, max_share=0.05, fvd=True)
    assert asked == [["p0"], ["p1"]] and log.validations[0]["put_off"] == ["3 of 5 clips", "FVD, which takes about 45 s"]
    log.trained_s = 3000.0
    log, _, asked = world((300,), max_share=0.05, fvd=True, keep=log)
    assert log.validations[1]["fvd"] is not None and len(log.validations[1]["clips"]) == 5, "it was still due"


def test_fvd_that_fails_is_a_warning(world):
    log, _, _ = world((200,), fvd=True, fvd_fails=UserError("a clip is gone"))
    assert log.validations[0]["fvd"] is None and "Warning: after step 200 no FVD: rank 1: a clip is gone" in log.said
    assert len(log.validations[0]["clips"]) == 5


def test_a_failing_fvd_waits_for_its_next_turn(world):
    log, _, _ = world((200, 300, 400), fvd=True, fvd_fails=UserError("a clip is gone"))
    assert [line["failures"] for line in log.validations] == [["no FVD: rank 1: a clip is gone"], [], ["no FVD: rank 1: a clip is gone"]]
    assert [line["fvd_failed"] for line in log.validations] == [True, False, True] and all(not line["put_off"] for line in log.validations)
    log, _, _ = world((500, 600), fvd=True, keep=log)
    assert [line["fvd"] is not None for line in log.validations[3:]] == [False, True] and not log.validations[-1]["fvd_failed"]


def test_a_distance_that_cannot_be_taken_is_fvd_that_fails(world, monkeypatch):
    def singular(pairs):
        raise ValueError("features must be finite")

    monkeypatch.setattr(validation, "fvd_of", singular)
    log, _, _ = world((200, 300), fvd=True)
    assert [line["failures"] for line in log.validations] == [["no FVD: ValueError: features must be finite"], []]
    assert log.validations[0]["fvd_failed"] and log.validations[0]["put_off"] == [] and log.validations[0]["fvd"] is None


def test_fvd_without_a_bound_needs_no_estimate(world):
    log, _, _ = world((200,), **NO_OTHER_CLIPS | {"max_share": 1.0})
    assert log.validations[0]["fvd"] is not None and log.validations[0]["seconds"] == pytest.approx(30 + 5)


def test_without_other_clips_one_of_fvds_tells_what_it_costs(world):
    log, calls, _ = world((200,), trained=950.0, **NO_OTHER_CLIPS)  # 50 s allowed, 20 · 3 + 5 expected
    (line,) = log.validations
    assert line["costs"]["clips"] == pytest.approx(3.0) and line["seconds"] == pytest.approx(3.0) and calls.count("gather") == 1
    assert line["put_off"] == ["FVD, which takes about 65 s"] and not line["fvd_failed"]
    log.trained_s = 3000.0
    log, calls, _ = world((300,), **NO_OTHER_CLIPS, keep=log)
    assert log.validations[1]["fvd"] is not None and calls.count("gather") == 1, "no second trial"
    assert log.validations[1]["costs"]["fvd"] == pytest.approx(30.0)


def test_fvd_that_fits_follows_its_trial_at_once(world):
    log, _, _ = world((200,), trained=3000.0, **NO_OTHER_CLIPS)
    assert log.validations[0]["fvd"] is not None and log.validations[0]["seconds"] == pytest.approx(3 + 30 + 5)


def test_a_trial_that_fails_is_fvd_that_fails(world):
    log, _, _ = world((200, 300), trained=3000.0, **NO_OTHER_CLIPS, fvd_fails=UserError("a clip is gone"))
    assert [line["failures"] for line in log.validations] == [["no FVD: rank 1: a clip is gone"], []]
    assert log.validations[0]["fvd_failed"] and log.validations[0]["costs"]["clips"] is None


def test_a_stop_amid_the_trial_leaves_fvd_due(world):
    log, calls, _ = world((200,), trained=3000.0, **NO_OTHER_CLIPS, hurry=lambda rank, asked: rank == 1)
    assert calls.count("gather") == 1 and not log.validations[0]["fvd_failed"] and log.validations[0]["costs"]["clips"] is None
    assert log.said == ["Validation after 200 steps: 3.0 s. Put off, the run was asked to stop: FVD."]
    log, _, _ = world((300,), **NO_OTHER_CLIPS, keep=log)
    assert log.validations[1]["fvd"] is not None


# When.


def due(interval=100, last=250, lines=()):
    found = Validation(*[None] * 16)
    for name, value in {"interval": interval, "last": last, "log": SimpleNamespace(validations=[{"step": step} for step in lines])}.items():
        object.__setattr__(found, name, value)
    return found


def test_when_it_is_due():
    assert [step for step in range(300) if due().due(step)] == [100, 200, 250]
    assert not any(due(interval=0).due(step) for step in range(300))


def test_what_a_kill_cut_short_is_made_up_for(monkeypatch):
    monkeypatch.setattr(validation, "on_rank_zero", lambda make: make())
    made = []
    monkeypatch.setattr(Validation, "__call__", lambda self, done: made.append(done))
    for step, lines in ((0, ()), (100, ()), (100, (100,)), (200, (100,)), (150, (100,)), (250, (100, 200))):
        due(lines=lines).make_up(step)
    assert made == [100, 200, 250]
