"""Signals and files that ask a run to save or to stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from rdtf_ds.errors import UserError
from rdtf_ds.exit_codes import DONE, RESTART
from rdtf_ds.training.interruptions import Interruptions, Wishes, ctrl_c_waits

NOTHING, STOPPING, SAVING = Wishes(save=False, stop=False), Wishes(save=False, stop=True), Wishes(save=True, stop=False)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def _unharmed() -> Iterator[None]:
    """A test that fails must not leave pytest with other handlers than it had."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_nobody_asked(tmp_path):
    with Interruptions(tmp_path) as asked:
        assert asked.poll(0) == asked.poll(1) == NOTHING
        assert (asked.stopped_by, asked.exit_code) == (None, DONE)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("rank", [0, 3])
def test_a_signal_stops_the_rank_it_reached_and_says_restart(tmp_path, number, rank):
    with Interruptions(tmp_path) as asked:
        assert asked.poll(rank) == NOTHING
        send(number)
        assert (asked.stopped_by, asked.exit_code) == (None, DONE)  # nothing was answered yet
        assert asked.poll(rank) == asked.poll(rank) == STOPPING
        assert (asked.stopped_by, asked.exit_code) == (number.name, RESTART)


def test_a_second_signal_changes_nothing(tmp_path):
    with Interruptions(tmp_path) as asked:
        send(signal.SIGUSR1)
        asked.poll(0)
        send(signal.SIGTERM)
        assert asked.poll(0) == STOPPING
        assert (asked.stopped_by, asked.exit_code) == ("SIGUSR1", RESTART)


def test_a_signal_after_the_last_poll_does_not_ask_a_done_run_to_restart(tmp_path):
    with Interruptions(tmp_path) as asked:
        asked.poll(0)
        send(signal.SIGTERM)
    assert (asked.stopped_by, asked.exit_code) == (None, DONE)


def test_handlers_are_those_of_before_once_it_ends(tmp_path):
    seen = []
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    mine = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), Interruptions(tmp_path):
        send(signal.SIGTERM)
        raise KeyError
    assert seen == []
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == (mine, signal.SIG_IGN)
    send(signal.SIGTERM)
    assert seen == [signal.SIGTERM]


def test_ctrl_c_still_interrupts(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), Interruptions(tmp_path):
            send(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_touching_stop_ends_the_run_for_good(tmp_path):
    with Interruptions(tmp_path) as asked:
        (tmp_path / "stop").touch()
        assert asked.poll(0) == STOPPING
        assert (asked.stopped_by, asked.exit_code) == (str(tmp_path / "stop"), DONE)
        (tmp_path / "stop").unlink()
        assert asked.poll(0) == STOPPING  # a wish that was seen stays
        (tmp_path / "stop").touch()
    assert not (tmp_path / "stop").exists()  # heeded


def test_touching_save_saves_once(tmp_path):
    with Interruptions(tmp_path) as asked:
        (tmp_path / "save").touch()
        assert asked.poll(0) == asked.poll(0) == SAVING
        asked.done_saving()
        assert not (tmp_path / "save").exists()
        assert asked.poll(0) == NOTHING
        (tmp_path / "save").touch()
        assert asked.poll(0) == SAVING
        assert (asked.stopped_by, asked.exit_code) == (None, DONE)


def test_a_wish_that_came_while_saving_is_answered_by_the_next_save(tmp_path):
    with Interruptions(tmp_path) as asked:
        assert asked.poll(0) == NOTHING
        (tmp_path / "save").touch()
        asked.done_saving()  # of a save nobody asked for
        assert asked.poll(0) == SAVING


def test_both_may_be_asked_and_the_person_decides_how_it_ends(tmp_path):
    with Interruptions(tmp_path) as asked:
        (tmp_path / "save").touch()
        (tmp_path / "stop").touch()
        send(signal.SIGTERM)
        assert asked.poll(0) == Wishes(save=True, stop=True)
        assert (asked.stopped_by, asked.exit_code) == (str(tmp_path / "stop"), DONE)


def test_other_ranks_look_for_no_files(tmp_path):
    with Interruptions(tmp_path) as asked:
        (tmp_path / "save").touch()
        (tmp_path / "stop").touch()
        assert asked.poll(1) == NOTHING
        asked.done_saving()
        assert (asked.stopped_by, asked.exit_code) == (None, DONE)
    assert (tmp_path / "save").exists() and (tmp_path / "stop").exists()  # rank 0's to answer


@pytest.mark.parametrize("name", ["save", "stop"])
def test_what_was_left_from_before_is_removed_with_a_line(tmp_path, name, capsys):
    (tmp_path / name).touch()
    with Interruptions(tmp_path) as asked:
        assert asked.poll(0) == NOTHING
        assert not (tmp_path / name).exists()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(tmp_path / name) in said and f"touch it again to {name}" in said


def test_nothing_left_nothing_said(tmp_path, capsys):
    with Interruptions(tmp_path):
        pass
    assert capsys.readouterr().err == ""


def test_a_leftover_that_cannot_be_removed_is_a_users_error_before_any_handler_is_set(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    (tmp_path / "stop").mkdir()
    with pytest.raises(UserError, match=r"stop asks this run to stop and cannot be removed .*by hand"), Interruptions(tmp_path):
        pass
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_save_that_cannot_be_removed_is_answered_once(tmp_path):
    """As in a folder that became read-only; a directory stands for it, which unlink refuses too."""
    with Interruptions(tmp_path) as asked:
        (tmp_path / "save").mkdir()
        assert asked.poll(0) == SAVING
        asked.done_saving()
        assert asked.poll(0) == asked.poll(0) == NOTHING
        (tmp_path / "save").rmdir()
        assert asked.poll(0) == NOTHING
        (tmp_path / "save").touch()
        assert asked.poll(0) == SAVING


def test_a_run_that_failed_to_stop_well_keeps_the_file(tmp_path):
    with pytest.raises(KeyError), Interruptions(tmp_path) as asked:
        (tmp_path / "stop").touch()
        asked.poll(0)
        raise KeyError
    assert (tmp_path / "stop").exists()


def test_a_rank_notices_what_another_one_heard(tmp_path):
    with Interruptions(tmp_path) as first, Interruptions(tmp_path) as second:
        assert not first.noticed() and not second.noticed()
        first._note(signal.SIGTERM, None)
        assert first.noticed() and second.noticed()
        assert not second.poll(1).stop, "ranks agree on it between two steps"
    with Interruptions(tmp_path) as later:
        assert not later.noticed()
        (tmp_path / "stop").touch()
        assert later.noticed()


def test_ctrl_c_waits_for_the_end_of_a_save():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    reached = []
    try:
        with pytest.raises(KeyboardInterrupt), ctrl_c_waits():
            signal.raise_signal(signal.SIGINT)
            reached.append("the end")
        assert reached == ["the end"]
        with pytest.raises(KeyboardInterrupt), ctrl_c_waits():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            reached.append("too late")
        assert reached == ["the end"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with ctrl_c_waits():
            pass
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with ctrl_c_waits():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
