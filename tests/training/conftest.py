"""What tests of training share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.training.supervised import Run


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Starts a `Run` of the scripts given; whatever is left of it ends with the test."""
    runs = []

    def make(*parts: str, **options: Any) -> Run:
        runs.append(Run(tmp_path, *parts, **options))
        return runs[-1]

    yield make
    for run in runs:
        run.end()
