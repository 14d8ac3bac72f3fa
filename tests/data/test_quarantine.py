"""The quarantine of bad files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rdtf_ds.data.quarantine import Problem, Quarantine, TooManyBadFiles
from rdtf_ds.errors import UserError


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_file_is_listed_and_counted_once(tmp_path: Path) -> None:
    path = tmp_path / "run" / "quarantine.jsonl"
    quarantine = Quarantine(path, 0.5, total=4)
    quarantine.add(Problem("猫.gif", "torn", 7))
    quarantine.merge([Problem("猫.gif", "again", 9), Problem("b.gif", "empty"), Problem("b.gif", "empty", 3)])
    assert quarantine.bad_fraction == 0.5
    assert lines(path) == [
        {"path": "猫.gif", "reason": "torn", "sample_number": 7},
        {"path": "b.gif", "reason": "empty", "sample_number": None},
    ]
    assert quarantine.problems == (Problem("猫.gif", "torn", 7), Problem("b.gif", "empty"))


def test_past_the_limit_it_says_the_numbers_the_key_and_the_file_and_has_written(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(path, 0.2, total=10)
    quarantine.merge([Problem("a", "x"), Problem("b", "x")])  # exactly at the limit
    with pytest.raises(TooManyBadFiles) as caught:
        quarantine.add(Problem("c", "x"))
    message = str(caught.value)
    assert isinstance(caught.value, UserError)
    assert "3 of 10" in message and "30.0%" in message and "rdtf.data.max_bad_fraction (0.2)" in message and str(path) in message
    assert len(lines(path)) == 3
    quarantine.add(Problem("c", "x"))  # nothing new: no second shout


def test_a_resumed_run_counts_what_training_met_and_the_index_enters_its_own(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    first = Quarantine(path, 1.0, total=10)
    first.merge([Problem("mended", "was broken"), Problem("late", "gone", 5)])
    with path.open("a") as file:
        file.write('{"path": "torn li')
    second = Quarantine(path, 0.1, total=10)
    assert second.problems == (Problem("late", "gone", 5),)
    assert lines(path) == [{"path": "late", "reason": "gone", "sample_number": 5}]
    with pytest.raises(TooManyBadFiles, match="2 of 10"):
        second.add(Problem("new", "bad"))


def test_other_ranks_count_but_do_not_write(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    other = Quarantine(path, 0.1, total=10, write=False)
    other.add(Problem("a", "x"))
    with pytest.raises(TooManyBadFiles):
        other.add(Problem("b", "x"))
    assert not path.exists()
