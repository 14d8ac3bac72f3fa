"""The doctor on this machine: what it finds, what it runs, and what it says when something is broken."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from rdtf_ds.machine.verdicts import Card, TorchBuild
from tests.small_models import load_tool

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def doctor() -> ModuleType:
    return load_tool(Path(__file__).resolve().parents[2], "doctor")


@pytest.fixture
def ask(doctor: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Runs the command; exit code and standard output."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["doctor.py", *arguments])
        code = doctor.main()
        return code, capsys.readouterr().out

    return run


def test_one_json_object_with_every_examination(ask) -> None:
    code, text = ask("--json")
    answer = json.loads(text)
    findings = {finding["what"]: finding for finding in answer["findings"]}
    assert {"Python", "lock", "GPUs", "torch", "precision", "bitsandbytes", "xformers", "NCCL", "packages", "/dev/shm", "disk"} < set(
        findings
    )
    assert code == (0 if answer["ok"] else 1) and answer["ok"] is all(finding["ok"] for finding in findings.values())
    ran = {what for what, finding in findings.items() if finding["ran"]}
    assert ran == {"convolution", "8-bit AdamW", "attention", "decord"} and all(findings[what]["ok"] for what in ran)
    assert torch.__version__ in findings["torch"]["found"]


def test_one_screen(ask) -> None:
    _, text = ask()
    lines = text.splitlines()
    assert len(lines) <= 24
    assert any(line.startswith("ok* 8-bit AdamW") for line in lines) and any(line.startswith("ok  Python") for line in lines)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_a_v100_that_is_not_here_needs_another_torch_than_that_of_a_cpu(ask) -> None:
    code, text = ask("--gpu", "v100-32gb")
    lines = text.splitlines()
    where = next(number for number, line in enumerate(lines) if line.startswith("NO  torch"))
    assert code == 1 and "requirements/v100.txt" in lines[where + 1] and "->" in lines[where + 1]
    assert any("bf16 needs 8.0 and is refused" in line for line in lines)
    assert any("v100-32gb (sm_70), named by --gpu and not looked at" in line for line in lines)


@pytest.mark.skipif(torch.version.cuda is None or not torch.__version__.startswith("2.10.0"), reason="not the V100 lock")
def test_the_v100_lock_is_fit_for_a_v100(ask) -> None:
    findings = {finding["what"]: finding for finding in json.loads(ask("--gpu", "v100-32gb", "--json")[1])["findings"]}
    for what in ("torch", "CUDA libraries", "bitsandbytes", "xformers", "lock"):
        assert findings[what]["ok"], findings[what]
    assert findings["CUDA libraries"]["found"] == "libcublas, libcudnn_ops, libnccl: all have kernels for sm_70"


def test_an_unknown_gpu_is_refused(ask) -> None:
    assert ask("--gpu", "voodoo2")[0] == 2


def test_whatever_a_trial_raises_is_its_finding(doctor: ModuleType) -> None:
    def fail() -> str:
        raise RuntimeError("CUDA error: no kernel image is available\nand many lines more")

    finding = doctor.attempt("step", fail, "mend")
    assert not finding.ok and finding.found == "RuntimeError: CUDA error: no kernel image is available" and finding.remedy == "mend"
    assert doctor.first_line(ValueError()) == "ValueError: "


def test_the_8_bit_step_is_looked_at(doctor: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes.optim.adamw import AdamW

    assert "8-bit moments" in doctor.try_optimizer(CPU) and "fallback" in doctor.try_optimizer(CPU)
    right = doctor.build_optimizer
    monkeypatch.setattr(
        doctor, "build_optimizer", lambda groups, paddings, **keys: right(groups, paddings, **{**keys, "learning_rate": 2e-3})
    )
    with pytest.raises(RuntimeError, match="100% off"):
        doctor.try_optimizer(CPU)
    wide = lambda groups, paddings, **keys: AdamW([weight for _, weight in groups[0].parameters], lr=1e-3)  # noqa: E731
    monkeypatch.setattr(doctor, "build_optimizer", wide)
    with pytest.raises(RuntimeError, match="float32, not 8 bits"):
        doctor.try_optimizer(CPU)


def test_attention_that_ignores_the_mask_is_noticed(doctor: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.try_attention(CPU).startswith("sdpa, masked")
    right = doctor.attention
    monkeypatch.setattr(
        doctor, "attention", lambda query, key, value, mask, backend: right(query, key, value, mask if backend == "math" else None, backend)
    )
    with pytest.raises(RuntimeError, match="attention is .* off the reference"):
        doctor.try_attention(CPU)


def test_a_convolution_that_is_wrong_is_noticed(doctor: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.nn.functional.conv2d
    assert "float32 on cpu" in doctor.try_convolution(CPU)
    monkeypatch.setattr(
        torch.nn.functional,
        "conv2d",
        lambda images, kernel, padding: right(images, kernel, padding=padding) * (1.02 if kernel.dtype == torch.float32 else 1),
    )
    with pytest.raises(RuntimeError, match="convolution is 2.00% off"):
        doctor.try_convolution(CPU)


def test_a_decoder_that_gives_other_frames_is_noticed(doctor: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from rdtf_ds.data.clips import decoding

    right = decoding.decode_clip
    monkeypatch.setattr(decoding, "decode_clip", lambda *arguments: right(*arguments)[::-1])
    with pytest.raises(RuntimeError, match="came back wrong"):
        doctor.try_decord()


def test_gpus_as_nvidia_smi_lists_them(doctor: ModuleType) -> None:
    answer = "Tesla V100-SXM2-32GB, 7.0\nNVIDIA GeForce RTX 5090, 12.0\n"
    assert doctor.cards_in(answer) == [Card("Tesla V100-SXM2-32GB", (7, 0)), Card("NVIDIA GeForce RTX 5090", (12, 0))]
    assert doctor.cards_in('Field "compute_cap" is not a valid field to query.\n') == []


def test_nvidia_smi_and_the_driver_are_asked(doctor: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\n[ "$1" = --query-gpu=name,compute_cap ] && echo "Tesla T4, 7.5"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.cards_of_driver() == [Card("Tesla T4", (7, 5))]
    program.unlink()
    assert doctor.cards_of_driver() == []

    class Driver:
        status = 0

        def __init__(self, name: str) -> None:
            assert name == "libcuda.so.1"

        def cuDriverGetVersion(self, number) -> int:  # noqa: N802
            number._obj.value = 12080
            return self.status

    monkeypatch.setattr(doctor.ctypes, "CDLL", Driver)
    assert doctor.driver_cuda() == (12, 8)
    monkeypatch.setattr(Driver, "status", 100)
    assert doctor.driver_cuda() is None


def test_the_lock_with_this_torch_is_the_one_compared(doctor: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    installer = doctor.Installer()
    for version, lock in (("2.10.0+cu128", "requirements/v100.txt"), ("2.13.0", "requirements/cpu.txt")):
        monkeypatch.setattr(doctor.torch, "__version__", version)
        assert doctor.examine_lock(False, installer).found.startswith(lock)
    monkeypatch.setattr(doctor.torch, "__version__", "2.11.0")
    assert doctor.examine_lock(True, installer).found.startswith("requirements/v100.txt")
    assert doctor.examine_lock(False, installer).found.startswith("requirements/cpu.txt")


def test_bitsandbytes_is_asked_which_library_it_takes(doctor: ModuleType) -> None:
    for cuda, library, v100 in (("12.8", "cuda128", True), ("12.9", "cuda128", True), ("13.0", "cuda130", False)):
        name, architectures = doctor.bitsandbytes_library(TorchBuild("x", cuda, ()))
        assert name == f"libbitsandbytes_{library}.so" and ("sm_70" in architectures) is v100
    assert doctor.bitsandbytes_library(TorchBuild("x", "10.2", ())) == ("", ())
    assert doctor.bitsandbytes_library(TorchBuild("x", None, ())) == ("libbitsandbytes_cpu.so", ())


def test_xformers_is_imported_not_only_found(doctor: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xformers")
    error, operators = doctor.xformers_operators()
    fitting = {operator.name for operator in operators if operator.runs_on((7, 0))}
    assert error == "" and fitting == {"cutlassF-pt", "cutlassB-pt"}
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha", None)
    error, operators = doctor.xformers_operators()
    assert error.startswith("ModuleNotFoundError") and operators == []


def test_what_is_not_installed_has_no_version(doctor: ModuleType) -> None:
    assert doctor.version_of("no-such-package-anywhere") is None and doctor.version_of("diffusers")
