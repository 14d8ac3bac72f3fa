"""Arrows of import run one way (architecture.md), and what the linter cannot see is checked on the syntax tree."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PURE = ("diffusion", "curriculum", "seeding.py", "config.py", "cross_checks.py", "deepspeed_keys.py")
IMPURE = (
    "os",
    "io",
    "logging",
    "pathlib",
    "shutil",
    "socket",
    "subprocess",
    "tempfile",
    "time",
    "random",
    "torch.distributed",
    "torch.cuda",
)


def python_files(*roots: Path) -> list[Path]:
    return sorted(path for root in roots for path in ([root] if root.is_file() else root.rglob("*.py")))


def imported(path: Path) -> Iterator[str]:
    """Dotted names of everything a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import; train.py is run as a file, so imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def test_layers(project_root: Path) -> None:
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache"]
    done = subprocess.run(command, cwd=project_root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize("pure", PURE)
def test_pure_parts_touch_no_files_clocks_devices_or_ranks(pure: str, project_root: Path) -> None:
    files = python_files(project_root / "rdtf_ds" / pure)
    assert files
    for path in files:
        guilty = [name for name in imported(path) if any(within(name, module) for module in IMPURE)]
        assert not guilty, f"{path.name} is pure and imports {guilty}"
        calls = [
            node.func.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        ]
        assert not {"open", "print"} & set(calls), f"{path.name} is pure and calls open or print"


OWNERS = {"deepspeed": {"training/engine.py", "training/shard_files.py"}, "bitsandbytes": {"training/optimizer.py"}}


@pytest.mark.parametrize(("library", "owners"), OWNERS.items())
def test_few_importers_each(library: str, owners: set[str], project_root: Path) -> None:
    package = project_root / "rdtf_ds"
    importers = {str(path.relative_to(package)) for path in python_files(package) if any(within(name, library) for name in imported(path))}
    assert importers == owners


def test_nothing_imports_train(project_root: Path) -> None:
    for path in python_files(project_root / "rdtf_ds", project_root / "tools"):
        assert not any(within(name, "rdtf_ds.train") for name in imported(path)), path


def test_no_name_shadows_the_standard_library(project_root: Path) -> None:
    # `deepspeed rdtf_ds/train.py` puts rdtf_ds/ itself first on sys.path.
    names = {path.stem for path in (project_root / "rdtf_ds").iterdir()} - {"__init__", "__pycache__"}
    assert not names & set(sys.stdlib_module_names)


def test_generating_needs_no_deepspeed(project_root: Path) -> None:
    # bitsandbytes is not in the list: diffusers imports it by itself when it is installed.
    code = "import sys, rdtf_ds.pipeline; print(sorted({'deepspeed', 'tensorboard', 'rdtf_ds.training'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=project_root, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().splitlines()[-1:] == ["[]"], done.stdout + done.stderr
