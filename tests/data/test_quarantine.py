"""The quarantine of bad files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rdtf_ds.data.indexing.problem import Problem
from rdtf_ds.data.quarantine import NOTHING, Quarantine, TooManyBadFiles
from rdtf_ds.errors import UserError


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_file_is_listed_and_counted_once(tmp_path: Path) -> None:
    path = tmp_path / "run" / "quarantine.jsonl"
    quarantine = Quarantine(path, 0.5, total=4)
    quarantine.merge([Problem("猫.gif", "torn", 7)])
    quarantine.merge([Problem("猫.gif", "again", 9), Problem("b.gif", "empty"), Problem("b.gif", "empty", 3)])
    assert quarantine.bad_fraction == 0.5
    assert lines(path) == [
        {"path": "猫.gif", "reason": "torn", "sample_number": 7, "content": ""},
        {"path": "b.gif", "reason": "empty", "sample_number": None, "content": ""},
    ]
    assert quarantine.problems == (Problem("猫.gif", "torn", 7), Problem("b.gif", "empty"))


def test_past_the_limit_it_says_the_numbers_the_key_and_the_file_and_has_written(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(path, 0.2, total=10)
    quarantine.merge([Problem("a", "x"), Problem("b", "x")])  # exactly at the limit
    with pytest.raises(TooManyBadFiles) as caught:
        quarantine.merge([Problem("c", "x")])
    message = str(caught.value)
    assert isinstance(caught.value, UserError)
    assert "3 of 10" in message and "30.0%" in message and "rdtf.data.max_bad_fraction (0.2)" in message and str(path) in message
    assert len(lines(path)) == 3
    quarantine.merge([Problem("c", "x")])  # nothing new: no second shout


def test_a_resumed_run_counts_what_training_met_and_the_index_enters_its_own(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    first = Quarantine(path, 1.0, total=10)
    first.merge([Problem("mended", "was broken"), Problem("late", "gone", 5)])
    with path.open("a") as file:
        file.write('{"path": "torn li')
    second = Quarantine(path, 0.1, total=10)
    assert second.problems == (Problem("late", "gone", 5),)
    assert lines(path) == [{"path": "late", "reason": "gone", "sample_number": 5, "content": ""}]
    with pytest.raises(TooManyBadFiles, match="2 of 10"):
        second.merge([Problem("new", "bad")])


def test_other_ranks_count_but_do_not_write(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    other = Quarantine(path, 0.1, total=10, write=False)
    other.merge([Problem("a", "x")])
    with pytest.raises(TooManyBadFiles):
        other.merge([Problem("b", "x")])
    assert not path.exists()


def test_what_the_index_calls_broken_is_listed_first_counted_once_and_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    Quarantine(path, 1.0, total=10).merge([Problem("late", "gone", 5, "aa")])
    quarantine = Quarantine(path, 0.3, total=10)
    quarantine.enter_index(iter([Problem("late", "is broken now"), Problem("x", "torn", content="bb"), Problem("y", "torn")]))
    assert quarantine.bad == 3 and quarantine.problems == (Problem("late", "gone", 5, "aa"),)
    assert [line["path"] for line in lines(path)] == ["late", "x", "y"]
    with pytest.raises(TooManyBadFiles, match=r"4 of 10 .* the first one 'late': gone"):
        quarantine.merge([Problem("z", "torn", 6)])
    again = Quarantine(path, 0.1, total=10, write=False)
    with pytest.raises(TooManyBadFiles, match="4 of 10"):
        again.enter_index([Problem("x", "torn"), Problem("y", "torn")])
    fresh = Quarantine(tmp_path / "other.jsonl", 0.1, total=10, write=False)
    with pytest.raises(TooManyBadFiles, match="2 of 10 .* the first one 'x': torn"):
        fresh.enter_index([Problem("x", "torn"), Problem("y", "torn")])
    assert not (tmp_path / "other.jsonl").exists()


def test_a_disk_that_refuses_the_list_is_told_and_nothing_is_left_uncounted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    quarantine = Quarantine(tmp_path / "run" / "quarantine.jsonl", 0.2, total=10)
    (tmp_path / "run").write_text("a file where the folder should be")
    with pytest.raises(TooManyBadFiles, match="3 of 10"):
        quarantine.enter_index([Problem(name, "torn") for name in "abc"])
    assert "could not be written" in caplog.text


def struck(*samples: int, step: int = 10, delay: int = 4, tmp: Path) -> Quarantine:
    quarantine = Quarantine(tmp / "quarantine.jsonl", 1.0, total=10, delay=delay)
    quarantine.merge([Problem("a", "torn", sample, "aa") for sample in samples], step)
    return quarantine


def test_two_samples_bar_a_content_once_nothing_planned_is_touched(tmp_path: Path) -> None:
    assert struck(1, 1, tmp=tmp_path).barred(1000) == frozenset(), "one sample, met twice"
    quarantine = struck(1, tmp=tmp_path)
    quarantine.merge([Problem("copy of a", "torn", 2, "aa"), Problem("b", "torn", 2, "bb")], 12)
    quarantine.merge([Problem("a", "torn", 3, "aa")], 20)  # planned before
    assert [step for step in range(30) if quarantine.barred(step) == {"aa"}] == list(range(17, 30))
    assert all(not quarantine.barred(step) for step in range(17))
    quarantine.merge([Problem("c", "torn", None, "cc"), Problem("c", "torn", None, "cc"), Problem("d", "x", 1), Problem("d", "x", 2)], 0)
    assert quarantine.barred(100) == {"aa"}, "neither the index's own nor what has no hash"


def test_strikes_come_back_from_a_checkpoint_alone(tmp_path: Path) -> None:
    saved = struck(1, 2, tmp=tmp_path)
    saved.merge([Problem("b", "torn", 3, "bb")], 11)
    state = json.loads(json.dumps(saved.to_json()))
    other = Quarantine(tmp_path / "quarantine.jsonl", 1.0, total=10, delay=4)
    assert other.problems == saved.problems and not other.barred(1000), "the list feeds the count"
    other.merge([Problem("c", "torn", 7, "cc"), Problem("c", "torn", 8, "cc")], 3)
    other.restore(state)
    assert other.barred(15) == {"aa"} and not other.barred(14), "what was struck since is forgotten, with its steps"
    assert {problem.path for problem in other.problems} == {"a", "b", "c"}
    other.merge([Problem("b", "torn", 4, "bb")], 20)
    assert other.barred(25) == {"aa", "bb"} and other.barred(24) == {"aa"}
    elsewhere = Quarantine(tmp_path / "elsewhere.jsonl", 0.1, total=10)
    with pytest.raises(TooManyBadFiles, match="2 of 10"):
        elsewhere.restore(state)
    assert [line["path"] for line in lines(tmp_path / "elsewhere.jsonl")] == ["a", "b"]


def test_a_checkpoint_of_before_there_were_strikes_counts(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", 1.0, total=10)
    old = [{"path": "a", "reason": "x", "sample_number": None}, {"path": "b", "reason": "x", "sample_number": 4}]
    quarantine.restore(old)
    assert quarantine.problems == (Problem("b", "x", 4),) and not quarantine.barred(99)


def test_what_is_barred_is_told_in_an_order_that_never_changes(tmp_path: Path) -> None:
    quarantine = struck(1, 2, step=10, tmp=tmp_path)  # barred from 15 on
    quarantine.merge([Problem(name, "torn", sample, name) for name in ("c", "b") for sample in (3, 4)], 12)
    assert [quarantine.barred_since(step, 0) for step in (14, 15, 16, 17)] == [(), ("aa",), ("aa",), ("aa", "c", "b")]
    assert quarantine.barred_since(17, 1) == ("c", "b") and quarantine.barred_since(17, 3) == () == quarantine.barred_since(16, 1)
    restored = Quarantine(tmp_path / "other.jsonl", 1.0, total=10, delay=4)
    restored.restore(json.loads(json.dumps(quarantine.to_json())))
    assert all(restored.barred_since(step, 0) == quarantine.barred_since(step, 0) for step in range(20))
    restored.restore(NOTHING)
    assert restored.barred_since(99, 0) == () and not restored.barred(99) and restored.to_json()["strikes"] == {}


def test_indexed_anew_what_training_met_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    Quarantine(path, 1.0, total=10).merge([Problem("mended", "torn", 1), Problem("still", "torn", 2)])
    anew = Quarantine(path, 0.1, total=10, anew=True)
    anew.enter_index([Problem("still", "torn")])
    anew.restore(NOTHING)
    assert anew.bad == 1 and [line["path"] for line in lines(path)] == ["still"]
    with pytest.raises(TooManyBadFiles, match=r"--reindex.*tools/index_data.py --retry"):
        anew.merge([Problem("new", "gone", 3)])
