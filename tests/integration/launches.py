"""How tests launch ``rdtf_ds/train.py``, kill it, and read what it left."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from rdtf_ds.checkpoints.store import CheckpointStore
from rdtf_ds.checkpoints.weights import CheckpointWeights

ROOT = Path(__file__).resolve().parents[2]
STEPS, INTERVAL, KILL_AFTER = 16, 5, 7
PATIENCE = 900
"""Seconds for one launch; a busy machine takes many times the 20 it needs."""

# The loop answers within a few steps instead of hundreds, and strongly, so that N* and k move within a short run.
LIVELY = (
    "rdtf.curriculum.fast_horizon=1", "rdtf.curriculum.slow_horizon=2", "rdtf.curriculum.k_p=40", "rdtf.curriculum.delay=2",
    f"rdtf.checkpoint.interval={INTERVAL}", "rdtf.validation.interval=0", "rdtf.data.workers=1",
)  # fmt: skip
TINY_MODEL = (
    'rdtf.model.block_out_channels=[8,16]', 'rdtf.model.attention_levels=[false,true]', "rdtf.model.layers_per_block=1",
    "rdtf.model.head_channels=8", "rdtf.model.norm_groups=4", "rdtf.model.context_dim=32", "rdtf.model.sti_heads=2",
    "rdtf.model.sti_head_dim=8", "rdtf.encoders.autoencoder=haar:4", "rdtf.encoders.clip=tiny", "rdtf.encoders.t5=tiny",
    "rdtf.data.image_size=32", "rdtf.optimizer.learning_rate=0.001", "rdtf.optimizer.warmup_steps=5",
)  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """An experiment to run on 2 ranks: config file and overrides."""

    config: str
    settings: tuple[str, ...]

    def command(self, data: Path, folder: Path, steps: int = STEPS) -> list[str]:
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]
        options = ["--data_dir", str(data), "--output_dir", str(folder), "--max_steps", str(steps), "--seed", "1"]
        sets = [word for setting in self.settings for word in ("--set", setting)]
        script = [str(ROOT / "rdtf_ds" / "train.py"), "--deepspeed_config", str(ROOT / "ds_configs" / self.config)]
        return [*launcher, *script, *options, *sets]


LAUNCHES = {
    "tiny": Launch("tiny_cpu.json", LIVELY),
    # DeepSpeed's section as shipped; only the model is made small.
    "v100_fp16": Launch("v100.json", (*LIVELY, *TINY_MODEL, "rdtf.verify_fp16_on_cpu=true")),
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment() -> dict[str, str]:
    return {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run_to_the_end(command: list[str]) -> str:
    """Runs a launch, returns what it said."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        text, _ = process.communicate(timeout=PATIENCE)
    finally:
        kill_family(process)
    assert process.returncode == 0, text[-5000:]
    return text


def kill_family(process: subprocess.Popen[Any]) -> None:
    """SIGKILLs the launcher, the ranks and their loader workers, whichever still run."""
    if process.poll() is not None:
        return
    family = psutil.Process(process.pid)
    for member in [*family.children(recursive=True), family]:
        with suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGKILL)
    process.wait(timeout=60)


def kill_after(command: list[str], folder: Path, lines: int) -> int:
    """SIGKILLs a launch and all its processes once ``metrics.jsonl`` has ``lines`` lines; returns how many it had."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + PATIENCE
    metrics = folder / "metrics.jsonl"
    try:
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= lines):
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline, "the run is too slow to be killed in time"
            time.sleep(0.01)
    finally:
        kill_family(process)
    return metrics.read_bytes().count(b"\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def last_checkpoint(folder: Path) -> Path:
    """The newest committed one, which must be that of the last step."""
    newest = CheckpointStore(folder / "checkpoints").candidates()[0]
    assert newest.name.startswith(f"step{STEPS:08d}-")
    return newest


def final_weights(folder: Path, weights: str) -> Mapping[str, torch.Tensor]:
    """fp32 weights of the last checkpoint, by parameter name."""
    source = CheckpointWeights(last_checkpoint(folder))
    return {name: tensor.clone() for name, tensor in source.parameters(weights)}  # type: ignore[arg-type]


@dataclass(frozen=True)
class Killed:
    folder: Path
    lines_when_killed: int
    said_on_resume: str
