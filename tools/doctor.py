"""Says in one screen whether this machine can train: GPU, kernels in this torch build, bitsandbytes, xformers, compiler; and what to do."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from rdtf_ds.models.attention import AttentionBackendError, resolve_backend  # noqa: E402

PACKAGES = ("deepspeed", "bitsandbytes", "diffusers", "transformers", "faiss-cpu", "decord", "tensorboard")
V100_LOCK = "make venv LOCK=requirements/v100.txt"


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and what to do about it (empty: nothing)."""

    what: str
    found: str
    ok: bool
    remedy: str = ""


def main() -> int:
    """Exit code 0 when nothing needs mending, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    findings = list(examine())
    if arguments.json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings]}))
    else:
        width = max(len(finding.what) for finding in findings)
        for finding in findings:
            print(f"{'ok ' if finding.ok else 'NO '} {finding.what:<{width}}  {finding.found}")
            if finding.remedy:
                print(f"    {'':<{width}}  -> {finding.remedy}")
    return 0 if all(finding.ok for finding in findings) else 1


def examine() -> Iterator[Finding]:
    """Everything training leans on, from the bottom up."""
    python_fits = sys.version_info >= (3, 11)
    yield Finding("Python", platform.python_version(), python_fits, "" if python_fits else "install Python 3.11 or newer")
    yield Finding("torch", torch.__version__, True)
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            yield from examine_gpu(torch.cuda.get_device_name(number), torch.cuda.get_device_capability(number), torch.cuda.get_arch_list())
    else:
        yield Finding("GPU", "none that torch sees: fp16 configs are refused; demo, tests and fp32 or bf16 configs run on the CPU", True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    yield Finding("STI attention", f"{resolve_backend('auto', device)} on {device}", True)
    if device == "cuda":
        yield examine_xformers()
    for package in PACKAGES:
        yield examine_package(package)
    for program in ("g++", "ninja"):
        where = shutil.which(program) or shutil.which(program, path=str(Path(sys.executable).parent))
        yield Finding(program, where or "not found; DeepSpeed builds its optional operators with it, none of which are needed here", True)


def examine_gpu(name: str, capability: tuple[int, int], compiled_for: list[str]) -> Iterator[Finding]:
    """Whether this torch has kernels for the GPU, and which precisions it trains in.

    Args:
        compiled_for: ``torch.cuda.get_arch_list()``, such as ``["sm_70", "sm_80"]``.
    """
    wanted = f"sm_{capability[0]}{capability[1]}"
    # Kernels of the same major version and a lower minor one run too.
    kernels = [re.fullmatch(r"sm_(\d+)(\d)[a-z]?", arch) for arch in compiled_for]
    runs = any(kernel and int(kernel[1]) == capability[0] and int(kernel[2]) <= capability[1] for kernel in kernels)
    yield Finding(
        f"GPU {name}",
        f"{wanted}; this torch has {' '.join(compiled_for) or 'no kernels'}",
        runs,
        "" if runs else f"this torch has no kernels for {wanted}; install one that does: {V100_LOCK}",
    )
    precisions = "fp16 and bf16" if capability >= (8, 0) else "fp16 (bf16 needs 8.0 and is refused: set fp16.enabled)"
    yield Finding("precision", precisions, True)


def examine_xformers() -> Finding:
    """Whether memory-efficient attention can run on the GPU."""
    try:
        resolve_backend("xformers", "cuda")
    except AttentionBackendError as error:
        return Finding("xformers", str(error), False, "pip install xformers==0.0.35")
    return Finding("xformers", importlib.metadata.version("xformers"), True)


def examine_package(package: str) -> Finding:
    """Whether a package is installed, and which version."""
    try:
        return Finding(package, importlib.metadata.version(package), True)
    except importlib.metadata.PackageNotFoundError:
        return Finding(package, "not installed", False, "make venv")


if __name__ == "__main__":
    sys.exit(main())
