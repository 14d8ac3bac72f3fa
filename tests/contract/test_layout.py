"""Files and sizes that other things rely on: the layout, the locks, the schema, nothing of one machine in what is tracked."""

from __future__ import annotations

import ast
import configparser
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from rdtf_ds.experiment import json_schema
from tests.small_models import load_tool

LOCKS = ("cpu", "v100")
KEPT_KEYS = ("checkpoint.interval", "data.max_bad_fraction", "curriculum.mode")


def pins(root: Path, lock: str) -> dict[str, str]:
    """Distribution → version; every line but comments must be an exact pin."""
    found = {}
    for line in (root / "requirements" / f"{lock}.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][0-9A-Za-z.]*)", line)
            assert match, f"{lock}.txt: {line!r} is no exact pin"
            name = canonicalize_name(match[1])
            assert name not in found, f"{lock}.txt: {name} twice"
            found[name] = match[2]
    return found


def declared(root: Path) -> list[Requirement]:
    """All but the extra `bench`: what a benchmark is measured beside is in no lock."""
    parser = configparser.ConfigParser()
    parser.read(root / "setup.cfg")
    extras = [text for extra, text in parser["options.extras_require"].items() if extra != "bench"]
    texts = [parser["options"]["install_requires"], *extras]
    return [Requirement(line) for text in texts for line in text.splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_meets_every_declared_range(lock: str, project_root: Path) -> None:
    pinned = pins(project_root, lock)
    for requirement in declared(project_root):
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} of setup.cfg is not in {lock}.txt"
        assert requirement.specifier.contains(pinned[name]), (
            f"{lock}.txt pins {name}=={pinned[name]}, setup.cfg wants {requirement.specifier}"
        )


def test_locks_differ_in_torch_alone(project_root: Path) -> None:
    cpu, v100 = pins(project_root, "cpu"), pins(project_root, "v100")
    assert {name for name in cpu if cpu[name] != v100.get(name)} == {"torch"}
    # Later wheels of PyPI carry no sm_70, which is what a V100 is.
    assert v100["torch"] == "2.10.0"
    assert all(name.startswith(("nvidia-", "cuda-")) or name == "triton" for name in set(v100) - set(cpu))


def test_this_environment_is_the_lock_of_its_torch(project_root: Path) -> None:
    from importlib.metadata import version

    torch = version("torch").partition("+")[0]
    expected = next((pinned for lock in LOCKS if (pinned := pins(project_root, lock))["torch"] == torch), None)
    if expected is None:
        pytest.skip(f"torch {torch} is of no lock")
    assert {name: version(name).partition("+")[0] for name in expected} == expected


def test_schema_is_current(project_root: Path) -> None:
    assert json.loads((project_root / "ds_configs" / "rdtf.schema.json").read_text()) == json_schema(), "run: make schema"


def test_configuration_reference_is_current(project_root: Path) -> None:
    text = load_tool(project_root, "write_schema").reference()
    assert (project_root / "docs" / "configuration.md").read_text(encoding="utf-8") == text, "run: make schema"
    for key in ("max_bad_fraction", "interval", "mode"):
        assert f"| `{key}` |" in text


def test_schema_describes_both_halves() -> None:
    schema = json_schema()
    assert set(schema["required"]) == {"train_batch_size", "train_micro_batch_size_per_gpu", "zero_optimization", "rdtf"}
    assert schema["additionalProperties"] is False
    text = json.dumps(schema)
    references = set(re.findall(r'"#/\$defs/(\w+)"', text))
    assert references <= set(schema["$defs"]) and "RDTFSection" in references


def test_keys_people_script_against(project_root: Path) -> None:
    from rdtf_ds.config import RDTFSection
    from rdtf_ds.config_parsing import dotted_keys

    assert set(KEPT_KEYS) <= set(dotted_keys(RDTFSection))


def test_make_targets(project_root: Path) -> None:
    for target in ("venv", "demo", "test", "test-v100-lock", "soak", "lint", "mutants", "schema", "clean"):
        done = subprocess.run(["make", "--dry-run", target], cwd=project_root, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"make {target}: {done.stderr}"


def tracked(root: Path) -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        pytest.skip("not a git working tree")
    return [root / name for name in done.stdout.split("\0") if name and (root / name).is_file()]


def test_no_path_or_index_of_one_machine(project_root: Path) -> None:
    # Spelled in pieces, so that this file does not find itself.
    forbidden = re.compile(
        "|".join(
            ["(?<![A-Za-z0-9_.])/" + name + "/" for name in ("wo" + "rk", "ro" + "ot", "ho" + "me", "tmp/" + "x")]
            + ["--(extra-)?index-url +h" + "ttp"]
        )
    )
    for path in tracked(project_root):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            assert not forbidden.search(line), f"{path.relative_to(project_root)}:{number}: {line.strip()[:120]}"


def test_sizes_of_files_and_functions(project_root: Path) -> None:
    for path in sorted((project_root / "rdtf_ds").rglob("*.py")):
        source = path.read_text()
        name = path.relative_to(project_root)
        assert len(source.splitlines()) <= (250 if path.name == "train.py" else 400), f"{name} holds more than one concept"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                assert length <= 70, f"{name}: {node.name} has {length} lines"


HELP_OF_EACH = """
import runpy, sys
for tool in sys.argv[1:]:
    sys.argv = [tool, "--help"]
    try:
        runpy.run_path(tool, run_name="__main__")
    except SystemExit as end:
        print(f"{tool} ended with {end.code}")
"""


def test_tools_answer_help(project_root: Path) -> None:
    """As scripts, but in one process: each alone would import the same libraries for seconds."""
    tools = sorted(str(path.relative_to(project_root)) for path in (project_root / "tools").glob("*.py"))
    done = subprocess.run([sys.executable, "-c", HELP_OF_EACH, *tools], cwd=project_root, capture_output=True, text=True, timeout=300)
    answers = re.findall(r"^usage: (\S+).*?^(\S+) ended with (\S+)$", done.stdout, re.DOTALL | re.MULTILINE)
    assert answers == [(Path(tool).name, tool, "0") for tool in tools], done.stdout[-2000:] + done.stderr[-2000:]
