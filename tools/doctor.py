"""Says in one screen whether this machine can train: kernels in this torch for its GPU, bitsandbytes, xformers, bf16, lock; and what to do.

A line marked * was run on the device, the others were looked up. Lines of a GPU named by --gpu are read from the installed files:
`python tools/doctor.py --gpu v100-32gb` answers for a V100 on a machine without one.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.metadata
import json
import logging
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from rdtf_ds.errors import UserError  # noqa: E402
from rdtf_ds.machine import verdicts  # noqa: E402
from rdtf_ds.machine.libraries import architectures  # noqa: E402
from rdtf_ds.machine.verdicts import Card, Finding, Installer, Operator, TorchBuild  # noqa: E402
from rdtf_ds.memory.gpus import GPUS, find_gpu  # noqa: E402
from rdtf_ds.models.attention import attention, resolve_backend  # noqa: E402
from rdtf_ds.training.optimizer import GROUP_ALIGNMENT, build_optimizer, split_parameters  # noqa: E402

ESSENTIALS = ("deepspeed", "diffusers", "transformers", "faiss-cpu", "tensorboard")
CUDA_LIBRARIES = ("libcublas.so", "libcudnn_ops.so", "libnccl.so")


def main() -> int:
    """Exit code 0 when nothing needs mending, 1 when something does, 2 for a GPU nobody knows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", help=f"judge what is installed for a GPU that is not here: {', '.join(GPUS)}")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    try:
        asked = find_gpu(arguments.gpu) if arguments.gpu else None
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    for talkative in ("xformers", "bitsandbytes"):
        logging.getLogger(talkative).setLevel(logging.CRITICAL)
    findings = list(examine(Card(asked.name, asked.capability) if asked else None))
    healthy = all(finding.ok for finding in findings)
    if arguments.json:
        print(json.dumps({"ok": healthy, "findings": [asdict(finding) for finding in findings]}))
    else:
        print("\n".join(screen(findings)))
    return 0 if healthy else 1


def screen(findings: list[Finding]) -> Iterator[str]:
    """The lines to print, remedies below what they mend."""
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        yield f"{'ok' if finding.ok else 'NO'}{'*' if finding.ran else ' '} {finding.what:<{width}}  {finding.found}"
        if finding.remedy:
            yield f"    {'':<{width}}  -> {finding.remedy}"


def examine(asked: Card | None) -> Iterator[Finding]:
    """Everything training leans on, from the bottom up.

    Args:
        asked: A GPU to judge the installation for, in the place of those that are here.
    """
    installer = Installer(None if sys.prefix == sys.base_prefix or Path(sys.prefix) == ROOT / ".venv" else sys.executable)
    build, seen, present = torch_build(), cards_of_torch(), cards_of_driver()
    cards = [asked] if asked else list({card.sm: card for card in seen or present}.values())
    device = torch.device("cuda" if seen else "cpu")
    yield verdicts.python(sys.version_info[:3])
    yield examine_lock(bool(cards), installer)
    if asked:
        yield Finding("GPU", f"{asked.name} ({asked.sm}), named by --gpu and not looked at")
    else:
        yield verdicts.gpus(build, seen, present, driver_cuda(), installer)
    for card in cards or [None]:
        yield verdicts.kernels(build, card, installer)
        if card is not None and (libraries := cuda_libraries()):
            yield verdicts.cuda_libraries(card, libraries, installer)
        yield verdicts.precision(card)
        yield verdicts.bitsandbytes(version_of("bitsandbytes"), build, *bitsandbytes_library(build), card, installer)
        yield verdicts.xformers(version_of("xformers"), *xformers_operators(), card, installer)
    fixed = installer.lock(verdicts.GPU_LOCK if cards else verdicts.CPU_LOCK)
    yield attempt("convolution", lambda: try_convolution(device), fixed)
    yield attempt("8-bit AdamW", lambda: try_optimizer(device), fixed)
    yield attempt("attention", lambda: try_attention(device), f"{fixed}; until then --set rdtf.model.attention_backend=sdpa")
    yield attempt("decord", try_decord, installer.lock(verdicts.CPU_LOCK))
    yield verdicts.nccl(nccl_version(), len(seen or present), installer)
    yield verdicts.packages({name: version_of(name) for name in ESSENTIALS}, installer)
    yield verdicts.shared_memory(shutil.disk_usage("/dev/shm").total)
    yield verdicts.disk(str(Path.cwd()), shutil.disk_usage(Path.cwd()).free, bool(cards))
    beside = str(Path(sys.executable).parent)
    yield verdicts.compilers(shutil.which("g++"), shutil.which("ninja") or shutil.which("ninja", path=beside))


# --- what is here -------------------------------------------------------------------------------------------------------------------


def version_of(package: str) -> str | None:
    """Installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def examine_lock(gpu: bool, installer: Installer) -> Finding:
    """The lock with the installed torch in it, else the one for this kind of machine."""
    locks = {name: pins_of(ROOT / name) for name in (verdicts.GPU_LOCK, verdicts.CPU_LOCK)}
    fallback = verdicts.GPU_LOCK if gpu else verdicts.CPU_LOCK
    name = next((name for name, pins in locks.items() if pins["torch"] == torch.__version__.partition("+")[0]), fallback)
    return verdicts.lock(name, locks[name], {package: version_of(package) for package in locks[name]}, installer)


def pins_of(lock: Path) -> dict[str, str]:
    """Package to version of a lock."""
    lines = [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def torch_build() -> TorchBuild:
    """What torch was compiled for. `torch.cuda.get_arch_list` keeps that to itself on a machine without a GPU."""
    flags = torch._C._cuda_getArchFlags() if torch.version.cuda else None
    return TorchBuild(torch.__version__, torch.version.cuda, tuple((flags or "").split()))


def cards_of_torch() -> list[Card]:
    """The GPUs that torch sees."""
    numbers = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return [Card(torch.cuda.get_device_name(number), torch.cuda.get_device_capability(number)) for number in numbers]


def cards_of_driver() -> list[Card]:
    """The GPUs that NVIDIA's driver sees, by nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return cards_in(answer.stdout)


def cards_in(answer: str) -> list[Card]:
    """Lines of nvidia-smi such as ``Tesla V100-SXM2-32GB, 7.0``."""
    rows = re.findall(r"^(.+), (\d+)\.(\d+)$", answer, re.MULTILINE)
    return [Card(name, (int(major), int(minor))) for name, major, minor in rows]


def driver_cuda() -> tuple[int, int] | None:
    """Newest CUDA that the driver can run; None without a driver."""
    number = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)) != 0:
            return None
    except OSError:
        return None
    return number.value // 1000, number.value % 1000 // 10


def cuda_libraries() -> dict[str, tuple[str, ...]]:
    """Architectures of the libraries beside torch, where they came as packages of their own."""
    packages = Path(torch.__file__).parents[1] / "nvidia"
    found = {stem: sorted(packages.rglob(f"{stem}*")) for stem in CUDA_LIBRARIES}
    return {stem.removesuffix(".so"): architectures(paths[0]) for stem, paths in found.items() if paths}


def bitsandbytes_library(build: TorchBuild) -> tuple[str, tuple[str, ...]]:
    """File that bitsandbytes takes for this torch, and its architectures; its own rule, asked as if there was a GPU."""
    if version_of("bitsandbytes") is None:
        return "", ()
    from bitsandbytes import cextension
    from bitsandbytes.cuda_specs import CUDASpecs

    if build.cuda is None:
        return Path(getattr(getattr(cextension.lib, "_lib", None), "_name", "") or "").name, ()
    major, minor = (int(part) for part in build.cuda.split(".")[:2])
    path = cextension.get_cuda_bnb_library_path(CUDASpecs(verdicts.BF16_CAPABILITY, f"{major}{minor}", (major, minor)))
    return (path.name, architectures(path)) if path.is_file() else ("", ())


def xformers_operators() -> tuple[str, list[Operator]]:
    """Why xformers cannot be imported (empty when it can), and its operators."""
    if version_of("xformers") is None:
        return "", []
    try:
        fmha = importlib.import_module("xformers.ops.fmha")
    except Exception as error:  # whatever an extension built for another torch raises
        return first_line(error), []
    classes = [getattr(fmha.cutlass, name) for name in ("FwOp", "BwOp")] + [getattr(fmha.flash, name) for name in ("FwOp", "BwOp")]
    return "", [
        Operator(
            name=operator.NAME,
            forward=operator.__name__ == "FwOp",
            available=operator.is_available(),
            masks=torch.Tensor in operator.SUPPORTED_ATTN_BIAS_TYPES,
            minimum=operator.CUDA_MINIMUM_COMPUTE_CAPABILITY,
            maximum=operator.CUDA_MAXIMUM_COMPUTE_CAPABILITY,
        )
        for operator in classes
    ]


def nccl_version() -> tuple[int, ...] | None:
    """Version of the NCCL that torch was built with, or None."""
    return tuple(torch.cuda.nccl.version()) if torch.distributed.is_nccl_available() else None


# --- what is run --------------------------------------------------------------------------------------------------------------------


def attempt(what: str, run: Callable[[], str], remedy: str) -> Finding:
    """Runs a trial; whatever it raises is its result."""
    try:
        return verdicts.trial(what, run(), "", remedy)
    except Exception as error:  # a doctor reports what goes wrong, whatever it is
        return verdicts.trial(what, "", first_line(error), remedy)


def first_line(error: Exception) -> str:
    """Type and first line of a message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def half_on_gpu(device: torch.device) -> torch.dtype:
    """fp16 on a GPU, as v100.json trains, fp32 on the CPU."""
    return torch.float16 if device.type == "cuda" else torch.float32


def try_convolution(device: torch.device) -> str:
    """A 3×3 convolution, forward and backward, against the same in fp64 on the CPU."""
    draw = torch.Generator().manual_seed(0)
    images, weight = torch.randn(2, 16, 8, 8, generator=draw), torch.randn(16, 16, 3, 3, generator=draw)
    results = []
    for where, dtype in ((device, half_on_gpu(device)), (torch.device("cpu"), torch.float64)):
        kernel = weight.to(where, dtype, copy=True).requires_grad_()
        output = torch.nn.functional.conv2d(images.to(where, dtype), kernel, padding=1)
        output.square().mean().backward()
        results.append([tensor.detach().double().cpu() for tensor in (output, kernel.grad)])
    check_close("convolution", *results)
    return f"forward and backward in {name_of(half_on_gpu(device))} on {device.type}"


def try_optimizer(device: torch.device) -> str:
    """One step of the 8-bit AdamW that trains. Adam's first step moves each weight by the learning rate, against its gradient's sign."""
    rate = 1e-3
    weight = torch.nn.Parameter(torch.zeros(GROUP_ALIGNMENT // 256, 256, device=device))
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).to(device)
    groups = split_parameters([("weight", weight)], weight.numel())
    optimizer = build_optimizer(groups, {}, learning_rate=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    weight.grad = gradient.clone()
    optimizer.step()
    state = optimizer.state[weight]
    if state["state1"].dtype != torch.uint8:
        raise RuntimeError(f"the moments are {name_of(state['state1'].dtype)}, not 8 bits wide")
    wrong = (weight.detach() + rate * gradient.sign()).abs().max().item() / rate
    if not wrong < 0.01:
        raise RuntimeError(f"a weight moved {wrong:.0%} off where the first step of AdamW takes it")
    from bitsandbytes import cextension

    native = Path(getattr(getattr(cextension.lib, "_lib", None), "_name", "") or "no native library").name
    how = f"kernels of {native}" if device.type == "cuda" else f"bitsandbytes' fallback: torch operations, blocks quantised by {native}"
    return f"a step on {device.type}, 8-bit moments, by {how}"


def try_attention(device: torch.device) -> str:
    """Masked attention as STI layers use it, forward and backward, by the backend a run would take, against the written-out reference."""
    backend = resolve_backend("auto", device.type)
    draw = torch.Generator().manual_seed(0)
    heads, tokens, width = 8, 12, 32  # tokens: no multiple of 8, which is what the mask's alignment is for
    query, key, value = (torch.randn(2, heads, tokens, width, generator=draw) for _ in range(3))
    mask = torch.ones(2, tokens, dtype=torch.bool)
    mask[1, 7:] = False
    results = []
    for chosen, where, dtype in ((backend, device, half_on_gpu(device)), ("math", torch.device("cpu"), torch.float32)):
        inputs = [tensor.to(where, dtype, copy=True).requires_grad_() for tensor in (query, key, value)]
        output = attention(*inputs, mask.to(where), chosen)
        output.square().sum().backward()
        results.append([tensor.detach().double().cpu() for tensor in (output, *(tensor.grad for tensor in inputs))])
    check_close("attention", *results)
    return f"{backend}, masked, forward and backward in {name_of(half_on_gpu(device))} on {device.type}"


def try_decord() -> str:
    """Writes an MP4 and decodes it as the loader would, in the child process."""
    from rdtf_ds.data.clips.clip import DecodeLimits
    from rdtf_ds.data.clips.decoding import decode_clip
    from rdtf_ds.data.clips.writing import write_clip

    frames = np.broadcast_to(np.arange(0, 200, 50, dtype=np.uint8)[:, None, None, None], (4, 128, 128, 3))
    with tempfile.TemporaryDirectory() as folder:
        write_clip(np.ascontiguousarray(frames), Path(folder) / "clip.mp4")
        decoded = decode_clip(Path(folder) / "clip.mp4", 128, (255, 255, 255), DecodeLimits())
    if decoded.shape != frames.shape or np.abs(decoded.astype(int) - frames).max() > 8:
        raise RuntimeError(f"the frames of an MP4 came back wrong: {decoded.shape}")
    return f"{version_of('decord')}: 4 frames of an MP4 in the child process, on the CPU"


def check_close(what: str, found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Raises RuntimeError where a tensor is off by more than 1 % of the largest value."""
    for ours, reference in zip(found, expected, strict=True):
        wrong = ((ours - reference).abs().max() / reference.abs().max()).item()
        if not wrong < 0.01:
            raise RuntimeError(f"{what} is {wrong:.2%} off the reference")


def name_of(dtype: torch.dtype) -> str:
    """Such as ``float16``."""
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(main())
