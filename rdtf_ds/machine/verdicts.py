"""What was found on a machine, judged: pure functions from versions, architectures and capabilities to one line and its remedy each.

So they can be asked about any GPU and any build of torch, whether they are here or not. `tools/doctor.py` finds the facts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Capability = tuple[int, int]

GPU_LOCK, CPU_LOCK = "requirements/v100.txt", "requirements/cpu.txt"
BF16_CAPABILITY = (8, 0)
OLDEST_ON_PYPI = (7, 0)
"""The oldest GPUs that a torch of PyPI, in the range of setup.cfg, has kernels for: 2.10.0, by its own list."""

_SHARED_MEMORY_BYTES = 2**30  # what NCCL's documentation asks of containers; their default is 64 MiB
# The network's 955,305,956 parameters: weights 2 bytes, masters 4, 8-bit moments 2, EMA 4.
_CHECKPOINT_BYTES = 955_305_956 * 12
_CHECKPOINTS = 4  # rdtf.checkpoint.keep and the one being written
_DEMO_BYTES = 2 * 10**9


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and what to do about it (empty: nothing).

    Attributes:
        ran: Something was computed on the device, not only looked up.
    """

    what: str
    found: str
    ok: bool = True
    remedy: str = ""
    ran: bool = False


@dataclass(frozen=True)
class Card:
    """A GPU: its name and compute capability."""

    name: str
    capability: Capability

    @property
    def sm(self) -> str:
        """Such as ``sm_70``."""
        return f"sm_{self.capability[0]}{self.capability[1]}"


@dataclass(frozen=True)
class TorchBuild:
    """A torch wheel.

    Attributes:
        cuda: Such as ``"12.8"``; None in a build without CUDA.
        architectures: What it was compiled for, such as ``("sm_70", "compute_90")``.
    """

    version: str
    cuda: str | None
    architectures: tuple[str, ...]


@dataclass(frozen=True)
class Installer:
    """The lines that mend an installation.

    Attributes:
        python: Interpreter of an environment that is not the project's .venv; None for that one, which ``make`` looks after.
    """

    python: str | None = None

    def lock(self, lock: str) -> str:
        """Installs all of a lock, whatever was changed by hand since."""
        return f"{self.python} -m pip install -r {lock}" if self.python else f"make -B venv LOCK={lock}"

    def torch(self, card: Card) -> str:
        """Installs a torch with kernels for a GPU."""
        if card.capability >= OLDEST_ON_PYPI:
            return self.lock(GPU_LOCK)
        return (
            f"PyPI has no torch for {card.sm}; PyTorch's own package index for CUDA 12.6 has one for sm_50 and newer: "
            f"{self.python or '.venv/bin/python'} -m pip install torch==2.10.0+cu126 --index-url URL_OF_CU126"
        )


def runs_on(capability: Capability, architectures: Sequence[str]) -> str | None:
    """The architecture that a GPU of this capability would run, machine code before PTX, or None.

    ``sm_90`` runs on 9.0 and later minor versions; ``sm_90a`` on 9.0 alone; ``sm_100f`` on its family (same major version);
    ``compute_80`` (PTX) on 8.0 and everything newer, once the driver has compiled it.
    """
    fits: dict[str, list[tuple[Capability, str]]] = {"sm": [], "compute": []}
    for architecture in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
        if match is None:
            continue
        kind, suffix, built = match[1], match[4], (int(match[2]), int(match[3]))
        if suffix == "a":
            fitting = built == capability
        elif kind == "sm" or suffix == "f":
            fitting = built[0] == capability[0] and built <= capability
        else:
            fitting = built <= capability
        if fitting:
            fits[kind].append((built, architecture))
    best = max(fits["sm"], default=None) or max(fits["compute"], default=None)
    return best[1] if best else None


def python(version: tuple[int, int, int]) -> Finding:
    """3.11 or newer."""
    fits = version >= (3, 11)
    return Finding("Python", ".".join(map(str, version)), fits, "" if fits else "make venv PYTHON=/path/to/python3.11")


def lock(name: str, pins: Mapping[str, str], installed: Mapping[str, str | None], installer: Installer) -> Finding:
    """Whether what is installed is what the lock pins. A local version (``+cpu``) is another build of the same pin."""
    wrong = [
        f"{package} {version or 'missing'} (pinned: {pin})"
        for package, pin in pins.items()
        if ((version := installed.get(package)) or "").partition("+")[0] != pin
    ]
    if not wrong:
        return Finding("lock", f"{name}: all {len(pins)} pins are what is installed")
    shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
    return Finding("lock", f"{name}: {len(wrong)} of {len(pins)} pins differ: {shown}", False, installer.lock(name))


def gpus(build: TorchBuild, seen: Sequence[Card], present: Sequence[Card], driver: tuple[int, int] | None, installer: Installer) -> Finding:
    """Whether torch sees the GPUs that are here.

    Args:
        seen: By torch.
        present: By the driver, as nvidia-smi lists them; empty without one.
        driver: Newest CUDA the driver can run, such as (12, 4); None without a driver.
    """
    if seen:
        return Finding("GPUs", ", ".join(f"{count} × {card.name} ({card.sm})" for card, count in Counter(seen).items()))
    if driver is None and not present:
        return Finding("GPUs", "none here; demo, tests and fp32 or bf16 configs run on the CPU, fp16 configs are refused")
    here = ", ".join(card.name for card in present) or "NVIDIA's driver is here"
    if build.cuda is None:
        oldest = min(present, key=lambda card: card.capability, default=Card("GPU", OLDEST_ON_PYPI))
        remedy = f"{installer.torch(oldest)} (without TORCH_INDEX)"
        return Finding("GPUs", f"{here}, but torch {build.version} is a build without CUDA", False, remedy)
    if driver is not None and driver[0] < int(build.cuda.partition(".")[0]):
        found = f"{here}, but the driver runs CUDA {driver[0]}.{driver[1]} at most and this torch is of CUDA {build.cuda}"
        remedy = "install a driver of CUDA 12 or newer" if driver[0] < 12 else f"a newer driver, or {installer.lock(GPU_LOCK)} (CUDA 12)"
        return Finding("GPUs", found, False, remedy)
    remedy = "unset CUDA_VISIBLE_DEVICES, or give the container its GPUs (docker run --gpus all)"
    return Finding("GPUs", f"{here}, but torch sees none", False, remedy)


def kernels(build: TorchBuild, card: Card | None, installer: Installer) -> Finding:
    """Whether this torch has kernels for a GPU, or PTX that the driver can compile for it."""
    if build.cuda is None:
        needed = card is not None
        return Finding("torch", f"{build.version}, without CUDA", not needed, installer.torch(card) if card else "")
    compiled_for = f"{build.version}, CUDA {build.cuda}, for {' '.join(build.architectures) or 'no GPU'}"
    if card is None:
        return Finding("torch", compiled_for)
    found = runs_on(card.capability, build.architectures)
    if found is None:
        return Finding("torch", f"{compiled_for}: no kernels for {card.sm} ({card.name})", False, installer.torch(card))
    if found.startswith("compute"):
        return Finding("torch", f"{compiled_for}: {card.sm} by PTX ({found}), which the driver compiles at the first start: minutes")
    return Finding("torch", f"{compiled_for}: {card.sm} {'among them' if found == card.sm else f'runs {found}'}")


def cuda_libraries(card: Card, libraries: Mapping[str, Sequence[str]], installer: Installer) -> Finding:
    """Whether the libraries torch leans on have kernels for a GPU: cuDNN and NCCL leave old ones out earlier than torch does.

    Args:
        libraries: Name to architectures; those not found are left out.
    """
    without = [name for name, architectures in libraries.items() if runs_on(card.capability, architectures) is None]
    if without:
        return Finding("CUDA libraries", f"{', '.join(without)}: no kernels for {card.sm}", False, installer.torch(card))
    return Finding("CUDA libraries", f"{', '.join(libraries)}: all have kernels for {card.sm}")


def precision(card: Card | None) -> Finding:
    """Which of the configs' precisions would be refused at the start, by the rule of `Experiment.check_device`."""
    if card is None:
        return Finding("precision", "on the CPU fp32 and bf16; fp16 is refused: --set fp16.enabled=false")
    if card.capability >= BF16_CAPABILITY:
        return Finding("precision", f"{card.name}: fp16, bf16 and fp32")
    refused = "bf16 needs 8.0 and is refused: --set bf16.enabled=false --set fp16.enabled=true"
    return Finding("precision", f"{card.name}: fp16 and fp32; {refused}")


def bitsandbytes(
    version: str | None, build: TorchBuild, library: str, architectures: Sequence[str], card: Card | None, installer: Installer
) -> Finding:
    """Whether the native library that bitsandbytes takes for this torch has kernels for a GPU.

    Args:
        library: File name, by bitsandbytes' own choice; empty when it has none.
        architectures: Read from that file.
    """
    what = "bitsandbytes"
    if version is None:
        return Finding(what, "not installed", False, installer.lock(GPU_LOCK if card else CPU_LOCK))
    if build.cuda is None:
        found = f"{version}; on the CPU {library or 'no native library loads'}"
        return Finding(what, found, bool(library), "" if library else installer.lock(CPU_LOCK))
    if not library:
        return Finding(what, f"{version} has no library for CUDA {build.cuda}", False, installer.lock(GPU_LOCK))
    holds = f"{version}; {library} for CUDA {build.cuda}: {' '.join(architectures) or 'no kernels'}"
    if card is not None and runs_on(card.capability, architectures) is None:
        return Finding(what, f"{holds}: none for {card.sm}", False, installer.torch(card))
    return Finding(what, holds)


@dataclass(frozen=True)
class Operator:
    """One of xformers' attention operators.

    Attributes:
        masks: It takes a mask as a tensor, which the network needs for clips of fewer frames.
    """

    name: str
    forward: bool
    available: bool
    masks: bool
    minimum: Capability
    maximum: Capability | None

    def runs_on(self, capability: Capability) -> bool:
        """Whether it would take our masked attention on such a GPU."""
        return self.available and self.masks and self.minimum <= capability <= (self.maximum or capability)


def xformers(version: str | None, error: str, operators: Sequence[Operator], card: Card | None, installer: Installer) -> Finding:
    """Whether xformers has operators, forward and backward, for our attention on a GPU.

    Args:
        error: Why it cannot be imported; empty when it can.
    """
    instead = "--set rdtf.model.attention_backend=sdpa"
    if version is None or error:
        found = "not installed" if version is None else f"{version} cannot be imported: {error}"
        return Finding("xformers", f"{found}; attention runs on sdpa", card is None, installer.lock(GPU_LOCK) if card else "")
    able = [operator for operator in operators if operator.available and operator.masks]
    if card is None:
        names = " ".join(operator.name for operator in able) or "none"
        return Finding("xformers", f"{version} loads; operators that take our masks on a GPU: {names}; none for the CPU")
    fits = [operator for operator in able if operator.runs_on(card.capability)]
    if {operator.forward for operator in fits} == {True, False}:
        return Finding("xformers", f"{version}; on {card.sm}: {' '.join(operator.name for operator in fits)}")
    return Finding("xformers", f"{version} has no operators for masked attention on {card.sm}", False, instead)


def trial(what: str, did: str, error: str, remedy: str) -> Finding:
    """What came of something that was run on the device."""
    return Finding(what, error or did, not error, remedy if error else "", ran=True)


def nccl(version: tuple[int, ...] | None, gpus: int, installer: Installer) -> Finding:
    """NCCL joins several GPUs; gloo joins CPU ranks."""
    if version is not None:
        return Finding("NCCL", ".".join(map(str, version)))
    if gpus > 1:
        return Finding("NCCL", f"not in this torch, and {gpus} GPUs need it", False, installer.lock(GPU_LOCK))
    return Finding("NCCL", "not in this torch; CPU ranks use gloo")


def shared_memory(total: int) -> Finding:
    """/dev/shm carries batches from the loader's workers, and NCCL's messages between GPUs."""
    fits = total >= _SHARED_MEMORY_BYTES
    remedy = "docker run --shm-size=1g, or --ipc=host; on one GPU --set rdtf.data.workers=0 does without"
    return Finding("/dev/shm", f"{total / 2**30:.2f} GiB", fits, "" if fits else remedy)


def disk(folder: str, free: int, full_size: bool) -> Finding:
    """Room for the checkpoints of the full network where there is a GPU to train it, else for the demo."""
    if full_size:
        needed, purpose = _CHECKPOINT_BYTES * _CHECKPOINTS, f"{_CHECKPOINTS} checkpoints of the full network"
        remedy = "--output_dir on a larger disk, or --set rdtf.checkpoint.keep=2"
    else:
        needed, purpose, remedy = _DEMO_BYTES, "the demo", "--out on a larger disk"
    found = f"{free / 1e9:.0f} GB free in {folder}; {purpose}: {needed / 1e9:.0f} GB"
    return Finding("disk", found, free >= needed, "" if free >= needed else remedy)


def compilers(gxx: str | None, ninja: str | None) -> Finding:
    """DeepSpeed builds its optional operators with them; none is needed."""
    missing = [name for name, where in (("g++", gxx), ("ninja", ninja)) if not where]
    return Finding("compilers", f"{', '.join(missing)} not found, and not needed" if missing else f"{gxx}, {ninja}")


def packages(versions: Mapping[str, str | None], installer: Installer) -> Finding:
    """Whether the rest is installed, and which versions."""
    missing = [name for name, version in versions.items() if version is None]
    found = ", ".join(f"{name} {version or 'MISSING'}" for name, version in versions.items())
    return Finding("packages", found, not missing, installer.lock(CPU_LOCK) if missing else "")
