from __future__ import annotations

import pytest

from rdtf_ds.checkpoints.store import CheckpointStore
from rdtf_ds.data.dataset import NoUsableClip
from rdtf_ds.data.quarantine import TooManyBadFiles
from rdtf_ds.errors import UserError, on_every_rank
from rdtf_ds.exit_codes import DISK, DIVERGED
from rdtf_ds.training import checkpoint, collectives
from rdtf_ds.training.checkpoint import SaveFailed
from rdtf_ds.training.failures import exit_code_of
from rdtf_ds.training.incidents import Diverged


def run(error: BaseException | None, folder=None, with_traceback: bool = False) -> int:
    def command() -> None:
        if error is not None:
            raise error

    return exit_code_of(command, lambda: folder, with_traceback)


def test_a_user_error_is_one_paragraph(capsys):
    assert run(UserError("key = 3: must be even")) == 2
    assert capsys.readouterr().err == "Error: key = 3: must be even\n"


SHARED = [on_every_rank(UserError("x")), TooManyBadFiles("x"), SaveFailed("x"), Diverged("x")]


@pytest.mark.parametrize("error", SHARED, ids=lambda error: type(error).__name__)
def test_rank_zero_speaks_for_all_that_raise_the_same(capsys, monkeypatch, error):
    monkeypatch.setenv("RANK", "1")
    codes = {SaveFailed: DISK, Diverged: DIVERGED}
    assert run(error) == codes.get(type(error), 2) and capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    assert run(error) == codes.get(type(error), 2) and capsys.readouterr().err == "Error: x\n"


@pytest.mark.parametrize("kind", [UserError, NoUsableClip])
def test_what_one_rank_meets_alone_it_tells(capsys, monkeypatch, kind):
    monkeypatch.setenv("RANK", "3")
    on_every_rank(kind("another"))  # marks that one, not its class
    assert run(kind("mine alone")) == 2
    assert capsys.readouterr().err == "Error on rank 3: mine alone\n"


def test_errors_that_ranks_agree_on_are_marked(process_group, tmp_path):
    def fail():
        raise UserError("no folder")

    with pytest.raises(UserError, match="no folder") as caught:
        collectives.on_rank_zero(fail)
    assert caught.value.everywhere
    with pytest.raises(UserError, match="rank 0: full") as caught:
        checkpoint._vote(CheckpointStore(tmp_path), None, "full")
    assert caught.value.everywhere


def test_a_loader_workers_error_comes_without_its_traceback(capsys):
    wrapped = (
        "Caught NoUsableClip in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File \"x.py\", line 1\n"
        "rdtf_ds.data.dataset.NoUsableClip: sample 3: nothing can be decoded"
    )
    assert run(NoUsableClip(wrapped)) == 2
    assert capsys.readouterr().err == "Error: sample 3: nothing can be decoded\n"


def test_ctrl_c_says_where_the_run_goes_on(capsys, monkeypatch, tmp_path):
    for folder in (None, tmp_path):
        assert run(KeyboardInterrupt(), folder) == 130
        said = capsys.readouterr().err
        assert said.startswith("\nInterrupted; no checkpoint") and "Traceback" not in said
    (tmp_path / "checkpoints" / "step00000004-0003.partial").mkdir(parents=True)
    run(KeyboardInterrupt(), tmp_path)
    assert "no checkpoint" in capsys.readouterr().err
    for name in ("step00000002-0001", "step00000003-0002"):
        (tmp_path / "checkpoints" / name).mkdir()
    run(KeyboardInterrupt(), tmp_path)
    assert "goes on from the last complete checkpoint, step00000003-0002." in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert run(KeyboardInterrupt(), tmp_path) == 130 and capsys.readouterr().err == ""


def test_a_bug_leaves_its_traceback_in_a_file(capsys, tmp_path):
    assert run(ZeroDivisionError("by zero"), tmp_path) == 1
    said = capsys.readouterr().err
    assert "ZeroDivisionError: by zero" in said and "crash_rank0.txt" in said.replace("\n", "") and "Traceback" not in said
    assert "Traceback (most recent call last)" in (tmp_path / "crash_rank0.txt").read_text()


@pytest.mark.parametrize(("error", "code"), [(UserError("x"), 2), (ValueError("x"), 1)])
def test_a_traceback_is_shown_when_asked_for(capsys, error, code):
    assert run(error, with_traceback=True) == code
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_success_is_zero():
    assert run(None) == 0
