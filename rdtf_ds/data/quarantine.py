"""Files that cannot be decoded: listed with their reasons, counted once each, and too many of them stop the run.

The list is a JSONL file in the run folder, one line for each bad file in the order they were met: those the index knows, then those that
training meets. It outlives the run: a resumed run goes on counting what training met.

A clip that failed two samples is barred: from some steps later on it is replaced without being tried. Strikes go by the hash of the
content, are the same on every rank, and come back from a checkpoint alone, so that a run that goes on trains on what it would have.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from rdtf_ds.data.clips.writing import write_atomically
from rdtf_ds.data.indexing.problem import Problem
from rdtf_ds.errors import UserError

_STRIKES = 2
NOTHING: Mapping[str, Any] = {"problems": [], "strikes": {}, "barred_from": {}}
"""What a checkpoint of a quarantine in which nothing is would hold."""
_log = logging.getLogger(__name__)


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
        delay: steps that may have been planned ahead when a step's problems are merged.
        anew: forget what training met in an earlier start: all clips were indexed again, which counts those that are still broken.
    """

    def __init__(
        self, path: str | Path, max_bad_fraction: float, total: int, write: bool = True, delay: int = 0, anew: bool = False
    ) -> None:
        self.path = Path(path)
        self.max_bad_fraction = max_bad_fraction
        self.total = total
        self._write = write
        self._delay = delay
        self._problems = {problem.path: problem for problem in ([] if anew else _load(self.path))}
        self._indexed_broken = 0
        self._first_indexed: Problem | None = None
        self._strikes: dict[str, list[int]] = {}  # samples that each content failed, until it is barred
        self._barred_from: dict[str, int] = {}  # steps never fall along it
        self._barred: list[tuple[int, str]] = []  # the same as a list
        if write and self.path.exists():
            write_atomically(self.path, b"".join(map(_line, self._problems.values())))

    @property
    def problems(self) -> tuple[Problem, ...]:
        """The first problem of each bad file that training met, in the order they were met."""
        return tuple(self._problems.values())

    @property
    def bad(self) -> int:
        """Distinct bad files."""
        return self._indexed_broken + len(self._problems)

    @property
    def bad_fraction(self) -> float:
        """Distinct bad files over files indexed."""
        return self.bad / max(self.total, 1)

    def barred(self, step: int) -> frozenset[str]:
        """Contents that a step does without. What is merged after it or in the ``delay`` steps before it does not change the answer."""
        return frozenset(content for content, first in self._barred_from.items() if first <= step)

    def barred_since(self, step: int, known: int) -> tuple[str, ...]:
        """What `barred` holds for a step beyond the first ``known``; its order never changes, so whoever knows those is up to date."""
        return tuple(content for _, content in takewhile(lambda entry: entry[0] <= step, islice(self._barred, known, None)))

    def enter_index(self, problems: Iterable[Problem]) -> None:
        """Enter what the index calls broken; once, before training. They are counted and written, not kept.

        Raises:
            TooManyBadFiles: past the limit, after the file is written.
        """
        new = self._counted(problems)
        if self._write:
            self._save(new)
        for _ in new:  # what was not written is counted all the same
            pass
        if self._indexed_broken:
            self._check()

    def _counted(self, problems: Iterable[Problem]) -> Iterator[Problem]:
        for problem in problems:
            if problem.path not in self._problems:  # else an earlier start met it in training
                self._first_indexed = self._first_indexed or problem
                self._indexed_broken += 1
                yield problem

    def merge(self, problems: Iterable[Problem], step: int = 0) -> None:
        """Enter problems that the samples of a step met, on all ranks; files already listed are not listed again.

        A content that fails a second sample is barred from step + ``delay`` + 1 on: nothing of those steps was planned yet.

        Raises:
            TooManyBadFiles: past the limit, after the file is written.
        """
        new: dict[str, Problem] = {}
        for problem in problems:
            self._strike(problem, step)
            if problem.path not in self._problems:
                new.setdefault(problem.path, problem)
        self._problems.update(new)
        if new:
            if self._write:
                self._save(new.values())
            self._check()

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "problems": [asdict(problem) for problem in self._problems.values()],
            "strikes": {content: list(samples) for content, samples in self._strikes.items()},
            "barred_from": dict(self._barred_from),
        }

    def restore(self, state: Mapping[str, Any] | list[dict[str, Any]]) -> None:
        """Take a checkpoint's strikes in the place of those since, and count its problems beside those that are listed.

        Args:
            state: of `to_json`.

        Raises:
            TooManyBadFiles: as `merge` does.
        """
        if isinstance(state, list):  # of a version without strikes
            state = {**NOTHING, "problems": [problem for problem in state if problem["sample_number"] is not None]}
        self._strikes = {content: [int(sample) for sample in samples] for content, samples in state["strikes"].items()}
        self._barred = sorted(((int(step), content) for content, step in state["barred_from"].items()), key=lambda entry: entry[0])
        self._barred_from = {content: step for step, content in self._barred}
        known = {**{problem["path"]: Problem(**problem) for problem in state["problems"]}, **self._problems}
        new = [problem for path, problem in known.items() if path not in self._problems]
        self._problems = known
        if new:
            if self._write:
                self._save(new)
            self._check()

    def _strike(self, problem: Problem, step: int) -> None:
        if not problem.content or problem.sample_number is None or problem.content in self._barred_from:
            return
        samples = self._strikes.setdefault(problem.content, [])
        if problem.sample_number not in samples:
            samples.append(problem.sample_number)
        if len(samples) == _STRIKES:
            del self._strikes[problem.content]
            self._barred_from[problem.content] = step + self._delay + 1
            self._barred.append((step + self._delay + 1, problem.content))

    def _check(self) -> None:
        if self.bad_fraction > self.max_bad_fraction:
            first = next(iter(self._problems.values()), self._first_indexed)
            assert first is not None
            raise TooManyBadFiles(
                f"{self.bad} of {self.total} data files cannot be decoded ({self.bad_fraction:.1%}), more than "
                f"rdtf.data.max_bad_fraction ({self.max_bad_fraction:g}) allows, the first one '{first.path}': {first.reason}. A run lists "
                f"them all in '{self.path}'. Mend or remove them and start again with --reindex, which forgets that list, or raise the "
                f"limit. What the index called broken for want of time or memory is examined again by tools/index_data.py --retry."
            )

    def _save(self, problems: Iterable[Problem]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.writelines(map(_line, problems))
        except OSError as error:  # every checkpoint holds what training met
            _log.error("'%s' could not be written (%s); free some space or see that it may be written", self.path, error.strerror)


def _line(problem: Problem) -> bytes:
    return (json.dumps(asdict(problem)) + "\n").encode()


def _load(path: Path) -> list[Problem]:
    """What training met before an earlier start ended; a line torn by a kill is left out, and its file will be met again."""
    if not path.exists():
        return []
    problems = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                problem = Problem(**json.loads(line))
            except (json.JSONDecodeError, TypeError):
                continue
            if problem.sample_number is not None:
                problems.append(problem)
    return problems
