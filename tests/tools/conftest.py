"""What tests of the commands share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Callable[..., tuple[int, str, str]]]:
    """Makes a function of a command: its words as a person types them give exit code, standard output, standard error."""

    def command_of(tool: ModuleType, *first: object) -> Callable[..., tuple[int, str, str]]:
        def call(*words: object) -> tuple[int, str, str]:
            monkeypatch.setattr(sys, "argv", [Path(str(tool.__file__)).name, *map(str, (*first, *words))])
            capsys.readouterr()
            code = tool.main()
            captured = capsys.readouterr()
            return code, captured.out, captured.err

        return call

    return command_of
