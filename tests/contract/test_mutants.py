"""The wrongs of ``make mutants`` still fit the code, and its runner tells a noticed wrong from a missed one."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import tests.mutants
from rdtf_ds.errors import UserError
from tests.mutants import MUTANTS, Mutant
from tools.mutants import check_that_wrongs_fit, judge, verdict_of

TEST = "def test_four():\n    from code_under_test import four\n    assert four() == 4\n"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_wrong_fits_the_code(mutant: Mutant, project_root: Path) -> None:
    source = (project_root / mutant.file).read_text(encoding="utf-8")
    changed = mutant.applied_to(source)
    assert changed != source
    compile(changed, mutant.file, "exec")
    assert mutant.tests
    for test in mutant.tests:
        assert (project_root / test).is_file(), f"{mutant.name}: {test} does not exist"


def test_names_are_distinct_and_many() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 15


def test_a_wrong_stands_in_the_file_of_its_package() -> None:
    names = [found.name for found in pkgutil.iter_modules(tests.mutants.__path__) if found.name != "mutant"]
    areas = {name: vars(import_module(f"tests.mutants.{name}"))[name.upper()] for name in names}
    for area, mutants in areas.items():
        for mutant in mutants:
            _, *packages, _ = Path(mutant.file).parts
            assert area == (packages[0] if packages else "modules"), mutant.name
    assert {mutant.name for mutant in MUTANTS} == {mutant.name for mutants in areas.values() for mutant in mutants}


def test_a_wrong_must_fit_exactly_once() -> None:
    mutant = Mutant("twice", "x.py", old="a", new="b", tests=("tests/x.py",))
    assert mutant.applied_to("cat") == "cbt"
    for source in ("dog", "banana"):
        with pytest.raises(ValueError, match="must stand there once"):
            mutant.applied_to(source)


@pytest.mark.parametrize(
    ("new", "noticed", "reason"),
    [
        ("5", True, "assert 5 == 4"),
        ("2 + 2", False, "all tests passed"),
        ("unknown", False, "the changed code cannot run"),
    ],
)
def test_a_wrong_is_noticed_by_a_failing_test_only(tmp_path: Path, new: str, noticed: bool, reason: str) -> None:
    pristine = small_project(tmp_path)
    verdict = judge(Mutant("wrong", "code_under_test.py", old="4", new=new, tests=("test_it.py",)), pristine, tmp_path / "copy")
    assert (verdict.noticed_by == "test_it.test_four") is noticed, verdict
    assert reason in verdict.reason
    assert (pristine / "code_under_test.py").read_text() == "def four():\n    return 4\n"


def test_tests_that_cannot_be_collected_notice_nothing(tmp_path: Path) -> None:
    pristine = small_project(tmp_path)
    (pristine / "test_it.py").write_text("import code_under_test\n" + TEST)
    verdict = judge(Mutant("wrong", "code_under_test.py", old="4", new="(", tests=("test_it.py",)), pristine, tmp_path / "copy")
    assert verdict.noticed_by is None and "the tests did not run" in verdict.reason


def test_code_that_moved_away_is_named_before_anything_runs(tmp_path: Path) -> None:
    pristine = small_project(tmp_path)
    with pytest.raises(UserError, match=r"tests/mutants/: stale: '5' stands 0 times in code_under_test\.py"):
        check_that_wrongs_fit(pristine, [Mutant("stale", "code_under_test.py", old="5", new="6", tests=("test_it.py",))])


@pytest.mark.parametrize("exit_code", [2, 3, 4, 5])
def test_other_exit_codes_are_no_failed_test(exit_code: int, tmp_path: Path) -> None:
    assert verdict_of(exit_code, tmp_path / "absent.xml")[0] is None


def test_list_as_json_is_all_that_stands_on_standard_output(project_root: Path) -> None:
    command = [sys.executable, "tools/mutants.py", "--list", "--json", "--only", "delay + 1"]
    done = subprocess.run(command, cwd=project_root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (listed,) = json.loads(done.stdout)
    assert listed["name"] == "delay + 1" and listed["file"] == "rdtf_ds/data/step_plan.py"


def small_project(folder: Path) -> Path:
    project = folder / "pristine"
    project.mkdir()
    (project / "pytest.ini").write_text("[pytest]\nmarkers =\n    soak: as in the project\n")
    (project / "code_under_test.py").write_text("def four():\n    return 4\n")
    (project / "test_it.py").write_text(TEST)
    return project
