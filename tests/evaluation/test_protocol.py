"""The tasks against the paper's Table 7, and what is no task."""

from __future__ import annotations

import pytest

from rdtf_ds.errors import UserError
from rdtf_ds.evaluation.protocol import STEPS, TASKS, differences, make_tasks

# Table 7: the first mask of interpolation, prediction and generation with text
TABLE_7 = {"i2v": "10000000", "interpolation": "01010101", "prediction": "11111000"}


def test_the_masks_are_the_papers() -> None:
    assert {task.name: task.mask for task in make_tasks(list(TASKS), 8)} == TABLE_7
    assert STEPS == 25  # section "Models & Training"


def test_the_papers_figures() -> None:
    assert TASKS["i2v"].paper == {"FVD": 442.18, "VQA": 0.502, "CLIP": 0.376}  # Table 1, Ours
    assert TASKS["interpolation"].paper == {"FVD": 192.62, "VQA": 0.536}  # Table 2, left, Ours
    assert TASKS["prediction"].paper == {"FVD": 67.92, "VQA": 0.539}  # Table 2, right, Ours
    assert [task.name for task in make_tasks(list(TASKS), 8) if task.has_similarity] == ["i2v"]


@pytest.mark.parametrize(
    ("frames", "i2v", "interpolation", "prediction"),
    [(2, "10", "01", None), (3, "100", "010", "110"), (5, "10000", "01010", "11110"), (6, "100000", "010101", "111100")],
)
def test_fewer_frames(frames: int, i2v: str, interpolation: str, prediction: str | None) -> None:
    made = {task.name: task.mask for task in make_tasks(["i2v", "interpolation"], frames)}
    assert made == {"i2v": i2v, "interpolation": interpolation}
    if prediction is not None:
        assert make_tasks(["prediction"], frames)[0].mask == prediction


def test_prediction_of_two_frames_has_nothing_left_to_make() -> None:
    with pytest.raises(UserError, match="prediction gives all 2 frames.*--visible"):
        make_tasks(["prediction"], 2)


def test_tasks_come_in_the_order_of_the_paper() -> None:
    assert [task.name for task in make_tasks(["prediction", "i2v", "i2v"], 8)] == ["i2v", "prediction"]


def test_other_frames_can_be_given() -> None:
    by_name = {task.name: task for task in make_tasks(list(TASKS), 8, ["interpolation=7,0", "i2v=3"])}
    assert by_name["interpolation"].visible == (0, 7) and by_name["interpolation"].mask == "10000001"
    assert by_name["i2v"].visible == (3,) and by_name["prediction"].mask == TABLE_7["prediction"]


@pytest.mark.parametrize(
    ("names", "visible", "said"),
    [
        (["dance"], [], "--tasks dance: no such task. Choose from i2v, interpolation, prediction"),
        ([], [], "--tasks is empty"),
        (["i2v"], ["i2v=8"], "--visible i2v=8: there is no frame 8; the 8 frames are numbered 0 to 7"),
        (["i2v"], ["i2v=0,1,2,3,4,5,6,7"], "none is left to make"),
        (["i2v"], ["i2v="], "write TASK=N,N"),
        (["i2v"], ["i2v=-1"], "write TASK=N,N"),
        (["i2v"], ["i2v=0,"], "write TASK=N,N"),
        (["i2v"], ["i2v"], "write TASK=N,N"),
        (["i2v"], ["dance=1"], "with a task of i2v"),
        (["i2v"], ["prediction=1"], "--visible prediction=…: that task is not evaluated; --tasks names i2v"),
        (["i2v"], ["i2v=0", "i2v=1"], "--visible names i2v twice"),
    ],
)
def test_what_does_not_fit_is_told(names: list[str], visible: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said.replace(".", r"\.")):
        make_tasks(names, 8, visible)


def test_differences_are_told_by_name() -> None:
    kept = {"steps": 25, "eta": None, "visible": {"i2v": "10"}, "same": 1}
    assert differences(kept, dict(kept)) == []
    assert differences(kept, {**kept, "steps": 50, "eta": 0.5}) == ["eta: nothing there, 0.5 asked for", "steps: 25 there, 50 asked for"]
    assert differences(kept, {**kept, "visible": {"i2v": "01"}}) == ["visible: i2v 10 there, i2v 01 asked for"]
    assert differences({"a": 1}, {}) == ["a: 1 there, nothing asked for"] and differences({}, {"a": 1}) == ["a: nothing there, 1 asked for"]
