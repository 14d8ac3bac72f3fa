"""The index benchmark at its smallest: what it measures is what it says, and bars are held to the right figures. Times are not asserted."""

from __future__ import annotations

import argparse
import tracemalloc
from pathlib import Path
from time import thread_time
from typing import Any

import numpy as np
import pytest

from rdtf_ds.benchmarks import index, index_child
from rdtf_ds.data.clips.clip import DecodeLimits
from rdtf_ds.data.indexing.index import open_index
from rdtf_ds.data.indexing.index_segments import IndexSettings
from rdtf_ds.data.step_plan import StepPlan, StepPlanner
from rdtf_ds.errors import UserError

ROWS = 2500


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    index.add_arguments(parser)
    return parser.parse_args(list(given))


def test_fresh_processes_measure_both_ways() -> None:
    report = index.run(arguments("--rows", str(ROWS), "--peer_rows", "1000", "--steps", "100"))
    rows = {row["name"]: row for row in report["rows"]}
    assert len(rows) == len(report["rows"]) == 16 and report["rows_in_index"] == ROWS
    assert rows["open, one object a row"]["value"] == pytest.approx(2.5 * report["peer"]["open_s"])
    assert rows["plan a step"]["value"] == report["measured"]["plan_ms"] > 0
    for name in ("open", "largest resident memory", "plan a step", "plan the step at an epoch's border"):
        assert rows[name]["bar"] == 1.0 and not rows[name]["at_least"]
    assert rows["largest resident memory"]["holds"] and rows["open"]["holds"]
    assert report["measured"]["slowest_ms"] >= report["measured"]["border_ms"] >= 0


def test_too_few_rows_are_refused() -> None:
    for wrong in (("--rows", "999"), ("--peer_rows", "10"), ("--steps", "19")):
        with pytest.raises(UserError, match="at least 1000, --steps at least 20"):
            index.run(arguments(*wrong))


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"open_s": 2.1}, "open"), ({"peak_mb": 201.0}, "largest resident memory"), ({"plan_ms": 2.1}, "plan a step"),
        ({"border_ms": 2.1}, "plan the step at an epoch's border"),
        ({"again_ms": 2.1}, "slowest of the slowest thousandth when planned again, processor time"),
        ({"early_mb": 29.0}, "growth of own memory from a tenth of the steps on"),
        ({"half_mb": 38.0}, "growth of own memory from half of the steps on"),
    ],
)  # fmt: skip
def test_each_bar_is_held_to_its_figure(changed: dict[str, float], name: str) -> None:
    good: dict[str, Any] = {
        "open_s": 2.0, "opened_mb": 30.0, "peak_mb": 200.0, "early_mb": 30.0, "half_mb": 39.0, "late_mb": 40.0,
        "plan_ms": 2.0, "border_ms": 2.0, "again_ms": 2.0, "thousandth_ms": 4.0, "slowest_ms": 9.0,
        "caption_us": 1.0, "place_us": 1.0, "frame_features_us": 1.0,
    }  # fmt: skip
    peer = {"open_s": 1.0, "opened_mb": 100.0, "border_ms": 3.0}
    rows = {row.name: row for row in index.report_rows(good, peer, 9.0)}
    assert all(row.holds is not False for row in rows.values())
    assert rows["open, one object a row"].ratio == 4.5 and rows["resident memory when opened, one object a row"].value == 900.0
    assert rows["plan the step at an epoch's border, unscaled, one object a row"].ratio == 1.5
    assert [row.name for row in index.report_rows({**good, **changed}, peer, 9.0) if row.holds is False] == [name]


def test_made_up_rows_are_an_index(tmp_path: Path) -> None:
    settings = IndexSettings(tmp_path, DecodeLimits())
    index.write_made_up_index(tmp_path, settings, ROWS)
    made = open_index(tmp_path, settings.identity)
    assert made.counts() == {
        "files": 2500, "trainable": 2400, "static": 25, "broken": 25, "held_out": 25, "duplicates": 25, "without_caption": 0,
    }  # fmt: skip
    paths = [row.path for row in made.rows]
    assert paths == sorted(set(paths)) and len({row.content for row in made.rows}) == ROWS
    assert made.frame_counts.min() >= 3 and made.frame_counts.max() <= 128 and 14 < np.median(made.frame_counts) < 22
    for clip_id in made.trainable[::500].tolist():
        assert len(made.frame_features(clip_id)) == made.rows[clip_id].kept and made.caption(clip_id).count(" ") == 4


def test_plans_cross_the_border_and_the_peer_plans_from_a_list() -> None:
    clips = 16 * 40 + 5
    kinds = (StepPlanner, index_child.ListedOrder)
    planners = [kind(0, 16, np.arange(clips), np.full(clips, 8), index_child.make_curriculum()) for kind in kinds]
    for planner in planners:
        seen: list[StepPlan] = []
        figures = index_child.plan_steps(planner, clips, 20, seen.append, lambda: 7.0)
        assert [plan.step for plan in seen] == list(range(30, 50)) and set(planner._epochs) == {0, 1}
        assert figures["early_mb"] == figures["half_mb"] == figures["late_mb"] == 7.0
        assert figures["plan_ms"] <= figures["slowest_ms"] and figures["thousandth_ms"] > 0 < figures["again_ms"]
        order = [sample.clip_id for step in range(41) for sample in planner.plan(step, planner.curriculum.initial()).samples]
        assert sorted(order[:clips]) == list(range(clips)), "each clip once an epoch"
    assert isinstance(planners[1]._order(0), np.ndarray)


class BusyPlanner(StepPlanner):
    """Step ``slow`` needs 20 ms of a processor each time it is planned, those of ``once`` the first time."""

    def __init__(self, slow: int, once: frozenset[int]) -> None:
        """-1: no step is slow."""
        super().__init__(0, 16, np.arange(800), np.full(800, 8), index_child.make_curriculum())
        self.slow, self.once, self.planned = slow, once, set[int]()

    def plan(self, step: int, *arguments: Any) -> StepPlan:
        made = super().plan(step, *arguments)
        end = thread_time() + 0.02 * (step == self.slow or step in self.once - self.planned)
        self.planned.add(step)
        while thread_time() < end:
            pass
        return made


@pytest.mark.parametrize(("slow", "slow_again"), [(45, True), (-1, False)])
def test_a_step_slow_by_itself_is_told_from_one_slow_by_chance(slow: int, slow_again: bool) -> None:
    planner = BusyPlanner(slow, frozenset({47} if slow < 0 else ()))
    figures = index_child.plan_steps(planner, 800, 20, lambda plan: None, lambda: 7.0)
    assert figures["slowest_ms"] >= 20 and figures["thousandth_ms"] > 19
    assert (figures["again_ms"] >= 20) is slow_again


def test_measuring_itself_takes_no_memory_from_step_to_step() -> None:
    planner = StepPlanner(0, 16, np.arange(16), np.full(16, 8), index_child.make_curriculum())
    same = planner.plan(0, planner.curriculum.initial())
    planner.plan = lambda step, state: same  # type: ignore[method-assign]
    tracemalloc.start()
    try:
        figures = index_child.plan_steps(planner, 16, 20_000, lambda plan: None, lambda: tracemalloc.get_traced_memory()[0] / 1e6)
    finally:
        tracemalloc.stop()
    assert figures["late_mb"] - figures["half_mb"] < 0.05 and figures["late_mb"] > 0.3, "two figures a step, from the first on"


def test_own_memory_is_without_mapped_files(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(40_000_000))
    before, own_before = index_child.resident_mb(), index_child.resident_mb("RssAnon")
    mapped = np.memmap(file, np.uint8, "r")
    assert mapped.sum() == 0
    assert index_child.resident_mb() - before > 35 and abs(index_child.resident_mb("RssAnon") - own_before) < 5


def test_memory_is_of_this_process() -> None:
    before = index_child.resident_mb()
    taken = np.ones(40_000_000, np.uint8)
    now = index_child.resident_mb()
    assert 35 < now - before < 60 and index_child.resident_mb("VmHWM") >= now > taken.nbytes / 1e6
