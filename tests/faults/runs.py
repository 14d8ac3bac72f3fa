"""What the fault tests train, and what a run left behind: its commits, their state bit by bit, its log."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from rdtf_ds.checkpoints.store import CheckpointStore, Tag
from tests.faults.fork_server import ROOT
from tests.integration.launches import LIVELY, TINY_MODEL, read_metrics

STEPS, INTERVAL = 40, 3
MEASURED = ("times", "samples_per_second", "memory")
"""What a line of ``metrics.jsonl`` says of the machine."""
INCIDENTS = "incidents"
"""Part of the saved state that tells what happened to a run and when."""

_STEADY = ("rdtf.memory.activation_checkpointing=none", f"rdtf.curriculum.static_steps={STEPS}")
_QUICK = (*LIVELY, f"rdtf.checkpoint.interval={INTERVAL}", *_STEADY)


@dataclass(frozen=True)
class Trial:
    """A run of ``STEPS`` steps that takes seconds."""

    name: str
    config: str
    settings: tuple[str, ...]

    def arguments(self, data: Path, folder: Path, *more: str, steps: int = STEPS) -> list[str]:
        """Of train.py; ``more`` are settings that win over the trial's own."""
        options = ["--deepspeed_config", str(ROOT / "ds_configs" / self.config), "--data_dir", str(data), "--output_dir", str(folder)]
        sets = [word for setting in (*_QUICK, *self.settings, *more) for word in ("--set", setting)]
        return [*options, "--max_steps", str(steps), "--seed", "1", *sets]


FP32 = Trial("fp32", "tiny_cpu.json", ("train_batch_size=2",))
# DeepSpeed's section as shipped, but for a scale that starts too high and grows soon: skipped steps before, between and after the stops.
FP16 = Trial(
    "fp16",
    "v100.json",
    (*TINY_MODEL, "rdtf.verify_fp16_on_cpu=true", "train_batch_size=2", "fp16.initial_scale_power=24", "fp16.loss_scale_window=4"),
)
TRIALS = {trial.name: trial for trial in (FP32, FP16)}


def commits(folder: Path) -> list[Path]:
    """Committed checkpoints of a run, newest first."""
    return CheckpointStore(folder / "checkpoints").candidates()


def step_of(checkpoint: Path) -> int:
    """How many steps are behind a checkpoint, by its name."""
    tag = Tag.of(checkpoint.name)
    assert tag is not None, checkpoint
    return tag.step


def commit_of(folder: Path, step: int) -> Path:
    """The newest checkpoint of a run after ``step`` steps."""
    return next(path for path in commits(folder) if step_of(path) == step)


def cut_saves(folder: Path) -> int:
    """Saves that a death left unfinished."""
    return len(list((folder / "checkpoints").glob("*.partial")))


def lines_logged(folder: Path) -> int:
    """Steps in ``metrics.jsonl``, whole lines only."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def learned(folder: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` without what was measured of the machine."""
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in read_metrics(folder)]


def resumed_after(said: str) -> int | None:
    """The step a launch says it went on from; None if it says none."""
    found = re.findall(r"Resumed after (\d+) steps", said)
    return int(found[0]) if found else None


def started_training(said: str) -> bool:
    """Whether a launch got so far as to tell from where it trains."""
    return "STI attention runs on" in said and ("Resumed after" in said or "step " in said)


def state_of(checkpoint: Path) -> dict[str, Any]:
    """Every value of a checkpoint's shards, means and ``curriculum.json`` by where it stands; tensors as type, shape and bytes."""
    leaves: dict[str, Any] = {}
    for path in sorted(checkpoint.iterdir()):
        if path.suffix == ".pt":
            content: Any = torch.load(path, map_location="cpu", weights_only=False)  # written by this test's own run
        elif path.suffix == ".safetensors":
            content = load_file(path)
        elif path.name == "curriculum.json":
            content = {key: value for key, value in json.loads(path.read_text()).items() if key != INCIDENTS}
        else:
            continue
        leaves |= dict(_leaves(content, path.name))
    return leaves


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, torch.Tensor):
        yield name, (value.dtype, tuple(value.shape), value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        yield name, sorted(map(str, value))
        for key, item in value.items():
            yield from _leaves(item, f"{name}/{key}")
    elif isinstance(value, list | tuple):
        yield name, len(value)
        for position, item in enumerate(value):
            yield from _leaves(item, f"{name}/{position}")
    elif isinstance(value, Enum) or not (is_dataclass(value) or hasattr(value, "__dict__")):
        yield name, value
    else:
        yield from _leaves(vars(value), f"{name}/{type(value).__name__}")


def differences(one: Path, other: Path) -> list[str]:
    """Where the states of two checkpoints differ in as much as a bit."""
    ours, theirs = state_of(one), state_of(other)
    assert len(ours) > 50, f"{one} holds {len(ours)} values"
    return [name for name in sorted(ours.keys() | theirs.keys()) if name not in ours or name not in theirs or ours[name] != theirs[name]]
