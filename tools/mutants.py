"""Puts small wrongs into a copy of the code, one at a time, and demands that the tests notice each: ``python tools/mutants.py``.

A wrong counts as noticed when a test runs and fails. Anything else (the tests cannot be collected, a name does not exist, time runs
out) says nothing about the tests, and counts as not noticed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rdtf_ds.errors import UserError  # noqa: E402
from tests.mutants import MUTANTS, Mutant  # noqa: E402

_TIMEOUT_S = 1200
_TESTS_FAILED = 1  # pytest's exit code; 2 to 5 mean that tests did not run as they should
_BROKEN_CODE = ("SyntaxError", "ImportError", "ModuleNotFoundError", "NameError", "UnboundLocalError")


@dataclass(frozen=True)
class Verdict:
    """What became of one mutant: ``noticed_by`` is the test that failed, or None; ``reason`` how it failed, or why none did."""

    name: str
    noticed_by: str | None
    reason: str
    seconds: float


def main() -> int:
    arguments = parse_arguments()
    chosen = [mutant for mutant in MUTANTS if not arguments.only or mutant.name in arguments.only]
    if arguments.list:
        print(json.dumps([asdict(mutant) for mutant in chosen]) if arguments.json else "\n".join(mutant.name for mutant in chosen))
        return 0
    progress = sys.stderr if arguments.json else sys.stdout
    verdicts = []
    try:
        with TemporaryDirectory(prefix="mutants-") as folder:
            pristine = copy_of_the_code(Path(folder) / "pristine")
            check_that_wrongs_fit(pristine, chosen)
            print(f"{len(chosen)} wrongs; first their tests without any ...", file=progress, flush=True)
            seconds = check_that_tests_pass(pristine, chosen)
            print(f"passed in {seconds:.0f} s\n\n{'wrong':<50} {'s':>4}  noticed by", file=progress, flush=True)
            for verdict in judge_all(pristine, chosen, arguments.jobs):
                print(row(verdict), file=progress, flush=True)
                verdicts.append(verdict)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    missed = [verdict.name for verdict in verdicts if verdict.noticed_by is None]
    print(f"\n{len(verdicts) - len(missed)} of {len(verdicts)} wrongs made the tests fail", file=progress, flush=True)
    if arguments.json:
        print(json.dumps({"missed": missed, "verdicts": [asdict(verdict) for verdict in verdicts]}))
    return 1 if missed else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", metavar="NAME", choices=[mutant.name for mutant in MUTANTS], help="may be repeated")
    parser.add_argument("--list", action="store_true", help="the names, and nothing is run")
    parser.add_argument("--jobs", type=int, default=2, help="wrongs tried at the same time (default 2)")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output; progress goes to standard error")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {arguments.jobs}")
    return arguments


def copy_of_the_code(target: Path) -> Path:
    """Copies what git tracks or would track: the state of the working tree, without environments and runs."""
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        raise UserError(f"'{ROOT}' must be a git working tree, which says what belongs to the code: {listed.stderr.strip()}")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():  # a deleted file is still listed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)
    return target


def check_that_wrongs_fit(pristine: Path, mutants: Iterable[Mutant]) -> None:
    """Raises UserError if the code has moved away from under one of them."""
    for mutant in mutants:
        try:
            mutant.applied_to((pristine / mutant.file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"a wrong no longer fits the code, change it in tests/mutants/: {error}") from error


def check_that_tests_pass(pristine: Path, mutants: Iterable[Mutant]) -> float:
    """Seconds that the tests of all mutants take on the code as it is.

    Raises:
        UserError: they fail, and would with any wrong too.
    """
    started = time.monotonic()
    done = run_tests(pristine, sorted({test for mutant in mutants for test in mutant.tests}), pristine.with_name("pristine.xml"))
    if done.returncode != 0:
        raise UserError(f"the tests fail without any wrong in the code, mend that first:\n{done.stdout[-4000:]}{done.stderr[-1000:]}")
    return time.monotonic() - started


def judge_all(pristine: Path, mutants: Sequence[Mutant], jobs: int) -> Iterable[Verdict]:
    """Verdicts as they come in."""
    pool = ThreadPoolExecutor(jobs)
    try:
        copies = [pristine.with_name(f"mutant{number:02d}") for number in range(len(mutants))]
        trials = [pool.submit(judge, mutant, pristine, copy) for mutant, copy in zip(mutants, copies, strict=True)]
        for trial in as_completed(trials):
            yield trial.result()
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C must not wait for those that have not begun


def judge(mutant: Mutant, pristine: Path, copy: Path) -> Verdict:
    """Tries one mutant in a copy of its own."""
    shutil.copytree(pristine, copy)
    path = copy / mutant.file
    path.write_text(mutant.applied_to(path.read_text(encoding="utf-8")), encoding="utf-8")
    started = time.monotonic()
    report = copy.with_suffix(".xml")
    try:
        noticed_by, reason = verdict_of(run_tests(copy, mutant.tests, report, _TIMEOUT_S).returncode, report)
    except subprocess.TimeoutExpired:
        noticed_by, reason = None, f"the tests did not end within {_TIMEOUT_S} s"
    shutil.rmtree(copy)
    return Verdict(mutant.name, noticed_by, reason, time.monotonic() - started)


def run_tests(folder: Path, tests: Sequence[str], report: Path, timeout_s: float | None = None) -> subprocess.CompletedProcess[str]:
    """pytest in ``folder`` up to the first failure, with ``report`` as JUnit XML."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),  # the copy goes before the installed package, in processes that tests start too
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "RDTF_REAL_DATA": os.environ.get("RDTF_REAL_DATA", str(ROOT.parent / "shared" / "data")),
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not soak", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout_s)


def verdict_of(exit_code: int, report: Path) -> tuple[str | None, str]:
    """The test that failed and how, or None and why that is no failure of a test."""
    if exit_code == 0:
        return None, "all tests passed"
    if exit_code != _TESTS_FAILED:
        return None, f"pytest ended with {exit_code}: the tests did not run"
    for case in ElementTree.parse(report).iter("testcase"):
        failure = case.find("failure")
        if failure is not None:
            reason = failure.get("message", "").partition("\n")[0]
            if reason.startswith(_BROKEN_CODE):
                return None, f"the changed code cannot run: {reason}"
            return f"{case.get('classname', '')}.{case.get('name', '')}", reason
    return None, "no test failed, but setting one up did"


def row(verdict: Verdict) -> str:
    return f"{verdict.name:<50} {verdict.seconds:4.0f}  {verdict.noticed_by or f'NOT NOTICED: {verdict.reason}'}"


if __name__ == "__main__":
    sys.exit(main())
