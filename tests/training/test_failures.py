from __future__ import annotations

import pytest

from rdtf_ds.data.dataset import NoUsableClip
from rdtf_ds.errors import UserError
from rdtf_ds.training.failures import exit_code_of


def run(error: BaseException | None, folder=None, with_traceback: bool = False) -> int:
    def command() -> None:
        if error is not None:
            raise error

    return exit_code_of(command, lambda: folder, with_traceback)


def test_a_user_error_is_one_paragraph(capsys):
    assert run(UserError("key = 3: must be even")) == 2
    assert capsys.readouterr().err == "Error: key = 3: must be even\n"


def test_ranks_other_than_zero_leave_shared_errors_to_it(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run(UserError("shared")) == 2
    assert run(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == ""
    assert run(NoUsableClip("mine alone")) == 2
    assert "mine alone" in capsys.readouterr().err


def test_a_loader_workers_error_comes_without_its_traceback(capsys):
    wrapped = (
        "Caught NoUsableClip in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File \"x.py\", line 1\n"
        "rdtf_ds.data.dataset.NoUsableClip: sample 3: nothing can be decoded"
    )
    assert run(NoUsableClip(wrapped)) == 2
    assert capsys.readouterr().err == "Error: sample 3: nothing can be decoded\n"


def test_ctrl_c_is_quiet(capsys):
    assert run(KeyboardInterrupt()) == 130
    assert "Traceback" not in capsys.readouterr().err


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
