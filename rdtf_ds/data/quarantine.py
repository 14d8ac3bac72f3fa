"""Files that cannot be decoded: listed with their reasons, counted once each, and too many of them stop the run.

The list is a JSONL file in the run folder, one line for each bad file in the order they were met. It outlives the run: a resumed
run goes on counting what training met, while the index, made anew at each start, enters what it finds again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from rdtf_ds.data.writing import write_atomically
from rdtf_ds.errors import UserError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Problem:
    """One clip that could not be used: path relative to the data folder; ``sample_number`` is None if indexing found it."""

    path: str
    reason: str
    sample_number: int | None = None


class TooManyBadFiles(UserError):
    """More of the data folder is broken than the run allows."""

    everywhere = True  # every rank merges the same problems


class Quarantine:
    """The bad files of a run.

    Every rank holds one and merges the problems of all ranks, so that all stop together; only one of them writes.

    Args:
        path: the JSONL file; entries of an earlier start that training met still count.
        max_bad_fraction: of all files indexed; more than this raises.
        total: files indexed.
        write: whether this rank writes the file.
    """

    def __init__(self, path: str | Path, max_bad_fraction: float, total: int, write: bool = True) -> None:
        self.path = Path(path)
        self.max_bad_fraction = max_bad_fraction
        self.total = total
        self._write = write
        self._problems = {problem.path: problem for problem in _load(self.path)}
        if write and self.path.exists():
            write_atomically(self.path, _lines(self._problems.values()))

    @property
    def problems(self) -> tuple[Problem, ...]:
        """The first problem of each bad file, in the order they were met."""
        return tuple(self._problems.values())

    @property
    def bad_fraction(self) -> float:
        """Distinct bad files over files indexed."""
        return len(self._problems) / max(self.total, 1)

    def add(self, problem: Problem) -> None:
        """Enter one problem. Raises :class:`TooManyBadFiles` past the limit, after the file is written."""
        self.merge([problem])

    def merge(self, problems: Iterable[Problem]) -> None:
        """Enter problems of all ranks; files already listed are not listed again. Raises :class:`TooManyBadFiles`."""
        new: dict[str, Problem] = {}
        for problem in problems:
            if problem.path not in self._problems:
                new.setdefault(problem.path, problem)
        self._problems.update(new)
        if new and self._write:
            self._save(new.values())
        if new and self.bad_fraction > self.max_bad_fraction:
            first = next(iter(self._problems.values()))
            raise TooManyBadFiles(
                f"{len(self._problems)} of {self.total} data files cannot be decoded ({self.bad_fraction:.1%}), more than "
                f"rdtf.data.max_bad_fraction ({self.max_bad_fraction:g}) allows, the first one '{first.path}': {first.reason}. A run lists "
                f"them all in '{self.path}'. Mend or remove them and delete that list, or raise the limit."
            )

    def _save(self, problems: Iterable[Problem]) -> None:
        try:
            self._append(problems)
        except OSError as error:  # every checkpoint holds a copy
            _log.error("'%s' could not be written (%s); free some space or see that it may be written", self.path, error.strerror)

    def _append(self, problems: Iterable[Problem]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(_lines(problems))


def _lines(problems: Iterable[Problem]) -> bytes:
    return "".join(json.dumps(asdict(problem)) + "\n" for problem in problems).encode()


def _load(path: Path) -> list[Problem]:
    """What training met before an earlier start ended; a line torn by a kill is left out, and its file will be met again."""
    if not path.exists():
        return []
    problems = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            problem = Problem(**json.loads(line))
        except (json.JSONDecodeError, TypeError):
            continue
        if problem.sample_number is not None:
            problems.append(problem)
    return problems
