"""Verdicts on GPUs and builds of torch that need not be here."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from rdtf_ds.errors import UserError
from rdtf_ds.experiment import load_experiment
from rdtf_ds.machine import verdicts
from rdtf_ds.machine.verdicts import Card, Installer, Operator, TorchBuild, runs_on
from rdtf_ds.memory.gpus import GPUS

P100, V100, T4 = Card("P100", (6, 0)), Card("V100", (7, 0)), Card("T4", (7, 5))
A100, RTX3090, RTX4090, H100, RTX5090 = (
    Card("A100", (8, 0)), Card("RTX 3090", (8, 6)), Card("RTX 4090", (8, 9)), Card("H100", (9, 0)), Card("RTX 5090", (12, 0))
)  # fmt: skip
CARDS = (P100, V100, T4, A100, RTX3090, RTX4090, H100, RTX5090)

# 2.10.0's own list, read in the wheel of the V100 lock.
CUDA_128 = TorchBuild("2.10.0+cu128", "12.8", ("sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"))
# From PyTorch's support matrix of 2.11 to 2.13 (RELEASE.md).
CUDA_130 = TorchBuild("2.13.0+cu130", "13.0", ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"))
CUDA_126 = TorchBuild("2.10.0+cu126", "12.6", ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"))
CPU = TorchBuild("2.13.0+cpu", None, ())

# Read in the files of bitsandbytes 0.50.2.
BNB_128 = ("sm_70", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "compute_120")
BNB_130 = BNB_128[1:]

# Of xformers 0.0.35.
CUTLASS = [Operator(f"cutlass{way}-pt", way == "F", True, True, (5, 0), (9, 0)) for way in "FB"]
FLASH = [Operator(f"fa2{way}", way == "F", True, False, (8, 0), None) for way in "FB"]

HERE, ELSEWHERE = Installer(), Installer("/env/bin/python")
GPU_LINE = "make -B venv LOCK=requirements/v100.txt"


@pytest.mark.parametrize(
    ("capability", "architectures", "expected"),
    [
        ((7, 0), ["sm_70", "sm_75", "sm_80"], "sm_70"),
        ((7, 5), ["sm_70"], "sm_70"),
        ((7, 0), ["sm_75"], None),  # a newer minor version
        ((8, 9), ["sm_80", "sm_86", "sm_90"], "sm_86"),  # the nearest
        ((8, 0), ["sm_86"], None),
        ((8, 0), ["sm_70", "sm_75"], None),  # another major version
        ((12, 0), ["sm_100", "sm_120"], "sm_120"),
        ((9, 0), ["sm_90a"], "sm_90a"),
        ((10, 3), ["sm_100a"], None),  # "a": that GPU alone
        ((10, 3), ["sm_100f"], "sm_100f"),  # "f": its family
        ((12, 0), ["sm_100f"], None),
        ((7, 0), ["compute_60"], "compute_60"),  # PTX: anything newer
        ((7, 0), ["compute_70"], "compute_70"),
        ((7, 0), ["compute_75"], None),
        ((12, 1), ["compute_120", "sm_90"], "compute_120"),
        ((12, 0), ["compute_100f"], None),
        ((12, 0), ["compute_90a"], None),
        ((8, 0), ["compute_80", "sm_80"], "sm_80"),  # machine code before PTX
        ((9, 0), ["compute_70", "compute_80"], "compute_80"),
        ((7, 0), [], None),
        ((7, 0), ["gfx90a", "sm_7", "xsm_70"], None),
    ],
)
def test_which_architecture_a_gpu_runs(capability: tuple[int, int], architectures: list[str], expected: str | None) -> None:
    assert runs_on(capability, architectures) == expected


@pytest.mark.parametrize(
    ("build", "without"),
    [(CUDA_128, [P100]), (CUDA_130, [P100, V100]), (CUDA_126, [RTX5090]), (CPU, CARDS)],
    ids=lambda value: str(value)[:40],  # lists: a set's words would come in another order in every process
)
def test_kernels_of_each_build_for_each_card(build: TorchBuild, without: Sequence[Card]) -> None:
    findings = {card: verdicts.kernels(build, card, HERE) for card in CARDS}
    assert {card for card, finding in findings.items() if not finding.ok} == set(without)
    for card, finding in findings.items():
        assert build.version in finding.found and bool(finding.remedy) is not finding.ok
        if build.cuda:
            assert card.sm in finding.found
        if not finding.ok:
            assert finding.remedy == HERE.torch(card)


def test_remedies_name_a_torch_that_has_the_kernels() -> None:
    assert HERE.torch(V100) == GPU_LINE and HERE.torch(H100) == GPU_LINE
    assert runs_on(V100.capability, CUDA_128.architectures), "and that lock's torch has them"
    assert ELSEWHERE.torch(V100) == "/env/bin/python -m pip install -r requirements/v100.txt"
    assert "torch==2.10.0+cu126" in HERE.torch(P100) and ".venv/bin/python -m pip" in HERE.torch(P100)
    assert "/env/bin/python -m pip" in ELSEWHERE.torch(P100) and runs_on(P100.capability, CUDA_126.architectures)


def test_ptx_and_near_kernels_are_said() -> None:
    newer = Card("a later GPU", (12, 1))
    assert "by PTX (compute_120)" in verdicts.kernels(TorchBuild("x", "13.0", ("sm_90", "compute_120")), newer, HERE).found
    assert verdicts.kernels(CUDA_128, RTX4090, HERE).found.endswith("sm_89 runs sm_86")
    assert verdicts.kernels(CUDA_128, V100, HERE).found.endswith("sm_70 among them")


def test_no_gpu_needs_no_kernels() -> None:
    assert verdicts.kernels(CPU, None, HERE).ok and verdicts.kernels(CUDA_130, None, HERE).ok
    assert "sm_120" in verdicts.kernels(CUDA_130, None, HERE).found


@pytest.mark.parametrize("name", sorted(GPUS))
def test_bf16_is_refused_where_a_run_refuses_it(name: str) -> None:
    card = Card(name, GPUS[name].capability)
    experiment = load_experiment("ds_configs/v100.json", ["fp16.enabled=false", "bf16.enabled=true"], require_data=False)
    try:
        experiment.check_device(True, 1, card.capability)
        refused = False
    except UserError as error:
        refused = True
        assert "--set bf16.enabled=false --set fp16.enabled=true" in str(error)
    found = verdicts.precision(card).found
    assert ("bf16 needs 8.0 and is refused: --set bf16.enabled=false --set fp16.enabled=true" in found) is refused
    assert ("fp16, bf16 and fp32" in found) is not refused


def test_without_a_gpu_fp16_is_what_is_refused() -> None:
    assert "fp16 is refused: --set fp16.enabled=false" in verdicts.precision(None).found


@pytest.mark.parametrize(
    ("build", "seen", "present", "driver", "says", "remedy"),
    [
        (CUDA_128, [V100] * 8, [], (12, 4), "8 × V100 (sm_70)", ""),
        (CUDA_128, [V100, T4], [], (12, 4), "1 × V100 (sm_70), 1 × T4 (sm_75)", ""),
        (CPU, [], [], None, "none here", ""),
        (CUDA_128, [], [], None, "none here", ""),
        (CPU, [], [V100], (12, 4), "V100, but torch 2.13.0+cpu is a build without CUDA", f"{GPU_LINE} (without TORCH_INDEX)"),
        (CPU, [], [RTX5090, P100], (12, 4), "RTX 5090, P100, but", "torch==2.10.0+cu126"),
        (CPU, [], [], (12, 4), "driver is here, but", GPU_LINE),
        (CUDA_130, [], [A100], (12, 8), "the driver runs CUDA 12.8 at most and this torch is of CUDA 13.0", f"{GPU_LINE} (CUDA 12)"),
        (CUDA_128, [], [A100], (11, 4), "the driver runs CUDA 11.4 at most", "install a driver of CUDA 12 or newer"),
        (CUDA_128, [], [A100], (12, 0), "torch sees none", "unset CUDA_VISIBLE_DEVICES"),
        (CUDA_128, [], [A100], (13, 0), "torch sees none", "--gpus all"),
        (CUDA_128, [], [A100], None, "torch sees none", "--gpus all"),
    ],
)
def test_gpus_that_torch_does_not_see_are_explained(build, seen, present, driver, says, remedy) -> None:
    finding = verdicts.gpus(build, seen, present, driver, HERE)
    assert says in finding.found and remedy in finding.remedy
    assert finding.ok is (remedy == "") and bool(finding.remedy) is bool(remedy)


def test_libraries_beside_torch_must_have_kernels_too() -> None:
    libraries = {"libcublas": ["sm_70", "sm_80"], "libcudnn_ops": ["sm_75", "sm_80"], "libnccl": ["compute_60"]}
    found = verdicts.cuda_libraries(V100, libraries, HERE)
    assert not found.ok and found.found == "libcudnn_ops: no kernels for sm_70" and found.remedy == GPU_LINE
    assert verdicts.cuda_libraries(A100, libraries, HERE).ok


@pytest.mark.parametrize(
    ("build", "library", "architectures", "card", "ok"),
    [
        (CUDA_128, "libbitsandbytes_cuda128.so", BNB_128, V100, True),
        (CUDA_130, "libbitsandbytes_cuda130.so", BNB_130, V100, False),
        (CUDA_130, "libbitsandbytes_cuda130.so", BNB_130, T4, True),
        (CUDA_128, "libbitsandbytes_cuda128.so", BNB_128, P100, False),
        (CUDA_130, "libbitsandbytes_cuda130.so", BNB_130, None, True),
        (CUDA_130, "", (), H100, False),
        (CUDA_130, "", (), None, False),
        (CPU, "libbitsandbytes_cpu.so", (), None, True),
        (CPU, "", (), None, False),
    ],
)
def test_bitsandbytes_library(build, library, architectures, card, ok) -> None:
    finding = verdicts.bitsandbytes("0.50.2", build, library, architectures, card, HERE)
    assert finding.ok is ok and bool(finding.remedy) is not ok
    assert library in finding.found and "0.50.2" in finding.found
    if library and build.cuda:
        assert architectures[-1] in finding.found and "no kernels" not in finding.found
    if not ok and library:
        assert finding.found.endswith(f"none for {card.sm}") and finding.remedy == HERE.torch(card)


def test_bitsandbytes_that_is_missing_comes_with_the_lock_of_the_machine() -> None:
    assert verdicts.bitsandbytes(None, CUDA_128, "", (), V100, HERE).remedy == GPU_LINE
    assert verdicts.bitsandbytes(None, CPU, "", (), None, HERE).remedy == "make -B venv LOCK=requirements/cpu.txt"
    assert not verdicts.bitsandbytes(None, CPU, "", (), None, HERE).ok


@pytest.mark.parametrize(
    ("card", "ok"), [(P100, True), (V100, True), (A100, True), (H100, True), (RTX5090, False), (Card("old", (3, 7)), False)]
)
def test_xformers_needs_an_operator_that_takes_masks(card: Card, ok: bool) -> None:
    finding = verdicts.xformers("0.0.35", "", CUTLASS + FLASH, card, HERE)
    assert finding.ok is ok
    assert finding.found.endswith("cutlassF-pt cutlassB-pt") if ok else finding.remedy == "--set rdtf.model.attention_backend=sdpa"


def test_an_operator_runs_from_its_minimum_to_its_maximum() -> None:
    cutlass = CUTLASS[0]
    assert [cutlass.runs_on(capability) for capability in ((3, 7), (5, 0), (9, 0), (10, 0))] == [False, True, True, False]
    assert not FLASH[0].runs_on((8, 0)), "it takes no masks"


def test_xformers_needs_forward_and_backward() -> None:
    for half in CUTLASS:
        assert not verdicts.xformers("0.0.35", "", [half, *FLASH], V100, HERE).ok
    absent = [Operator(o.name, o.forward, False, True, o.minimum, o.maximum) for o in CUTLASS]
    assert not verdicts.xformers("0.0.35", "", absent, V100, HERE).ok


def test_xformers_that_does_not_load_matters_on_a_gpu_alone() -> None:
    broken = verdicts.xformers("0.0.35", "ImportError: no symbol", [], V100, HERE)
    assert not broken.ok and "ImportError: no symbol" in broken.found and broken.remedy == GPU_LINE
    assert not verdicts.xformers(None, "", [], V100, HERE).ok
    for version, error in (("0.0.35", "ImportError"), (None, "")):
        finding = verdicts.xformers(version, error, [], None, HERE)
        assert finding.ok and not finding.remedy and "sdpa" in finding.found
    assert "cutlassF-pt cutlassB-pt; none for the CPU" in verdicts.xformers("0.0.35", "", CUTLASS + FLASH, None, HERE).found


def test_pins_that_differ_are_named_with_the_line_that_mends_them() -> None:
    pins = {"torch": "2.10.0", "numpy": "2.4.6", "xformers": "0.0.35", "einops": "0.8.2", "tqdm": "4.70.1"}
    same = verdicts.lock("requirements/v100.txt", pins, {**pins, "torch": "2.10.0+cu128"}, HERE)
    assert same.ok and "all 5 pins" in same.found and not same.remedy
    installed = {"torch": "2.13.0+cpu", "numpy": "2.4.6", "xformers": None, "einops": "0.9", "tqdm": "4.7"}
    off = verdicts.lock("requirements/v100.txt", pins, installed, ELSEWHERE)
    assert not off.ok and off.remedy == "/env/bin/python -m pip install -r requirements/v100.txt"
    assert "4 of 5 pins differ" in off.found and "torch 2.13.0+cpu (pinned: 2.10.0)" in off.found
    assert "xformers missing" in off.found and off.found.endswith("and 1 more") and "tqdm" not in off.found
    three = {**pins, "tqdm": "1", "numpy": "1", "torch": "1"}
    assert "more" not in verdicts.lock("x", pins, three, HERE).found


def test_python() -> None:
    assert verdicts.python((3, 11, 0)).ok and verdicts.python((3, 14, 1)).found == "3.14.1"
    old = verdicts.python((3, 10, 14))
    assert not old.ok and "make venv PYTHON=" in old.remedy


def test_nccl_is_needed_by_two_gpus() -> None:
    assert verdicts.nccl((2, 27, 5), 8, HERE).found == "2.27.5"
    assert verdicts.nccl(None, 1, HERE).ok and verdicts.nccl(None, 0, HERE).ok
    assert not verdicts.nccl(None, 2, HERE).ok and verdicts.nccl(None, 2, HERE).remedy == GPU_LINE


def test_a_containers_shared_memory_is_too_small() -> None:
    docker = verdicts.shared_memory(64 * 2**20)
    assert not docker.ok and "--shm-size=1g" in docker.remedy and "0.06 GiB" in docker.found
    assert verdicts.shared_memory(2**30).ok and not verdicts.shared_memory(2**30).remedy


def test_room_on_disk() -> None:
    assert verdicts.disk("/here", 2 * 10**9, full_size=False).ok and not verdicts.disk("/here", 10**9, full_size=False).ok
    # 0.955 G parameters × 12 bytes × 4 checkpoints = 45.9 GB
    assert verdicts.disk("/here", 955_305_956 * 12 * 4, full_size=True).ok
    small = verdicts.disk("/here", 45 * 10**9, full_size=True)
    assert not small.ok and "45 GB free in /here" in small.found and "rdtf.checkpoint.keep=2" in small.remedy


def test_compilers_are_never_needed() -> None:
    assert verdicts.compilers("/usr/bin/g++", "/usr/bin/ninja").found == "/usr/bin/g++, /usr/bin/ninja"
    assert verdicts.compilers(None, "/usr/bin/ninja").found == "g++ not found, and not needed"
    assert verdicts.compilers(None, None).ok


def test_missing_packages_are_named() -> None:
    gone = verdicts.packages({"deepspeed": "0.19.8", "diffusers": None}, HERE)
    assert not gone.ok and gone.found == "deepspeed 0.19.8, diffusers MISSING" and gone.remedy
    assert verdicts.packages({"deepspeed": "0.19.8"}, HERE).ok


def test_trials_say_that_they_ran() -> None:
    well, ill = verdicts.trial("step", "a step", "", "mend"), verdicts.trial("step", "", "RuntimeError: no kernel image", "mend")
    assert well.ran and well.ok and well.found == "a step" and not well.remedy
    assert ill.ran and not ill.ok and ill.found == "RuntimeError: no kernel image" and ill.remedy == "mend"
