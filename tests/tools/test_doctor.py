"""The doctor's verdicts on GPUs this machine need not have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.small_models import load_tool

PYPI_CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


@pytest.mark.parametrize(
    ("capability", "compiled_for", "runs"),
    [
        ((7, 0), ["sm_70", "sm_75", "sm_80"], True),
        ((7, 0), PYPI_CUDA_13, False),
        ((7, 5), ["sm_70"], True),
        ((8, 9), ["sm_86"], True),
        ((8, 0), ["sm_86"], False),
        ((12, 0), PYPI_CUDA_13, True),
        ((9, 0), ["sm_90a"], True),
        ((6, 1), PYPI_CUDA_13, False),
    ],
)
def test_kernels_run_on_their_major_version_from_their_minor_on(
    project_root: Path, capability: tuple[int, int], compiled_for: list[str], runs: bool
) -> None:
    doctor = load_tool(project_root, "doctor")
    kernels, precision = doctor.examine_gpu("a GPU", capability, compiled_for)
    assert kernels.ok is runs and (kernels.remedy == "") is runs
    if not runs:
        assert "requirements/v100.txt" in kernels.remedy
    assert ("bf16 needs 8.0" in precision.found) is (capability < (8, 0))


def test_a_missing_package_is_named_with_its_remedy(project_root: Path) -> None:
    doctor = load_tool(project_root, "doctor")
    finding = doctor.examine_package("no-such-package-anywhere")
    assert not finding.ok and finding.remedy
    assert doctor.examine_package("diffusers").ok


def test_the_command_prints_one_json_object(project_root: Path, capsys, monkeypatch) -> None:
    doctor = load_tool(project_root, "doctor")
    monkeypatch.setattr("sys.argv", ["doctor.py", "--json"])
    assert doctor.main() in (0, 1)
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert {"Python", "torch", "deepspeed", "STI attention"} <= {finding["what"] for finding in findings}
