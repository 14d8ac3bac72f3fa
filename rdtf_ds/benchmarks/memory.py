"""Peak memory of real runs beside what the planner predicts, and beside plain PyTorch training; on the CPU.

Each case trains some steps in processes of its own (`rdtf_ds.benchmarks.memory_child`), through every part a run has. Its peak is the
largest resident set above the process as it is after imports; of several ranks the largest. Cases marked held out were chosen after
the planner's last constant was, and it was not touched for them.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rdtf_ds.benchmarks.report import Row, make_report
from rdtf_ds.data.clips.writing import write_clip
from rdtf_ds.data.synthetic import all_stickers, render
from rdtf_ds.errors import UserError
from rdtf_ds.experiment import load_experiment
from rdtf_ds.training.memory_plan import plan_experiment

TOLERANCE = 0.05
MEASURED_PHASES = ("initialise", "forward", "backward", "step")
PEER_BAR, PEER_BAR_AT_8 = 0.60, 0.30
CLIPS = 4
CONFIG = "full_cpu.json"

SIZES: dict[str, tuple[str, ...]] = {
    "small": (
        "rdtf.model.block_out_channels=[64,128,256,256]", "rdtf.model.head_channels=32", "rdtf.optimizer.group_size=4000000",
    ),
    "mid": ("rdtf.model.block_out_channels=[160,320,640,640]", "rdtf.model.head_channels=32", "rdtf.optimizer.group_size=10000000"),
    "full": (),
}  # fmt: skip
"""47, 251 and 955 million parameters, in bf16 as full_cpu.json has them."""
ONE_GROUP = "rdtf.optimizer.group_size=2000000000"
NOT_RECOMPUTED = "rdtf.memory.activation_checkpointing=none"
WIDE_MOMENTS = "rdtf.optimizer.bits=32"
WITH_EMA = "rdtf.ema.enabled=true"


@dataclass(frozen=True)
class Case:
    """One measured configuration: overrides of full_cpu.json after those of its size, and ranks."""

    name: str
    size: str
    overrides: tuple[str, ...] = ()
    ranks: int = 1
    held_out: bool = False


CASES = (
    Case("small", "small"),
    Case("small, one group", "small", (ONE_GROUP,)),
    Case("small, nothing recomputed", "small", (NOT_RECOMPUTED,)),
    Case("small, 32-bit moments, EMA", "small", (WIDE_MOMENTS, WITH_EMA)),
    Case("small, EMA, 2 ranks", "small", (WITH_EMA, "train_batch_size=2"), 2),
    Case("mid", "mid"),
    Case("mid, one group", "mid", (ONE_GROUP,)),
    Case("mid, nothing recomputed, EMA", "mid", (NOT_RECOMPUTED, WITH_EMA)),
    Case("mid, 32-bit moments, 2 ranks, 2 in turn", "mid", (WIDE_MOMENTS, "train_batch_size=4"), 2),
    Case("full", "full"),
    Case("full, EMA", "full", (WITH_EMA,)),
    Case("three levels, 192 pixels, 5 frames, fp32", "small", (
        "rdtf.model.block_out_channels=[192,384,576]", "rdtf.model.attention_levels=[true,true,false]", "rdtf.data.image_size=192",
        "rdtf.data.frames=5", "bf16.enabled=false", "rdtf.optimizer.group_size=9000000"), held_out=True),
    Case("other widths, micro-batch 2, 2 in turn, EMA", "small", (
        "rdtf.model.block_out_channels=[128,256,512,512]", "train_batch_size=4", "train_micro_batch_size_per_gpu=2", WITH_EMA,
        "zero_optimization.reduce_bucket_size=5000000"), held_out=True),
    Case("one layer a block, 320 pixels, selective, 2 ranks", "small", (
        "rdtf.model.block_out_channels=[96,192,384]", "rdtf.model.attention_levels=[false,true,true]", "rdtf.model.layers_per_block=1",
        "rdtf.data.image_size=320", "rdtf.memory.activation_checkpointing=selective", "train_batch_size=2"), 2, held_out=True),
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``tools/benchmark.py memory``."""
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=["small", "mid"], help="full takes 12 to 16 GB, minutes each")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases of these names only")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of each case (3)")
    parser.add_argument("--no_peer", action="store_true", help="leave out plain PyTorch training")
    parser.add_argument("--configs", default=str(Path(__file__).resolve().parents[2] / "ds_configs"), help="folder of full_cpu.json")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The report: a row for each case, then the peer's."""
    cases = [case for case in CASES if case.size in arguments.sizes and (not arguments.only or case.name in arguments.only)]
    rows, phases = [], {}
    with tempfile.TemporaryDirectory(prefix="rdtf_memory_") as folder:
        write_whole_clips(Path(folder) / "clips")
        for case in cases:
            predicted, measured = compare(case, Path(arguments.configs) / CONFIG, Path(folder), arguments.steps)
            error = abs(max(predicted.values()) / measured["peak"] - 1)
            name = f"{case.name} (held out)" if case.held_out else case.name
            peer = f"{measured['peak'] / 1e9:.3f} GB measured"
            rows.append(Row(f"planner's error, {name}", error, "of the peak", peer, error, TOLERANCE))
            phases[case.name] = {"predicted": predicted, "measured": measured["phases"], "peak": measured["peak"]}
            print(f"{case.name}: predicted {max(predicted.values()) / 1e9:.3f} GB, measured {measured['peak'] / 1e9:.3f}", file=sys.stderr)
        if not arguments.no_peer:
            rows += peer_rows(Path(arguments.configs) / CONFIG, Path(folder), arguments.steps)
    notes = ["GB of 10^9 bytes, above the process after imports; every clip has 8 frames or more, so that all steps are alike"]
    return make_report("memory", rows, notes, phases=phases)


def compare(case: Case, config: Path, folder: Path, steps: int) -> tuple[dict[str, int], dict[str, Any]]:
    """Predicted bytes by phase, and what the rank with the largest peak measured."""
    overrides = [*SIZES[case.size], *case.overrides, *_common(folder, steps)]
    experiment = load_experiment(config, overrides)
    predicted = {phase.name: phase.total for phase in plan_experiment(experiment, case.ranks, None).plan.phases}
    measured = measure("run", experiment.resolved(), folder, case.ranks)
    return {name: predicted[name] for name in MEASURED_PHASES}, max(measured, key=lambda rank: rank["peak"])


def peer_rows(config: Path, folder: Path, steps: int) -> list[Row]:
    """A mid-size model trained by ours and by plain PyTorch in fp32, one rank each; of eight of ours, predicted."""
    experiment = load_experiment(config, [*SIZES["mid"], *_common(folder, steps)])
    ours, plain = (measure(kind, experiment.resolved(), folder, 1)[0]["peak"] for kind in ("run", "plain"))
    shared = load_experiment(config, [*SIZES["mid"], *_common(folder, steps), "train_batch_size=8"])
    each = plan_experiment(shared, 8, None).plan.peak.total
    peer = f"plain PyTorch, fp32 AdamW, nothing recomputed: {plain / 1e9:.2f} GB"
    return [
        Row("peak of training a mid-size model, 1 rank", ours / 1e9, "GB", peer, ours / plain, PEER_BAR),
        Row("the same, each of 8 ranks", each / 1e9, "GB", peer, each / plain, PEER_BAR_AT_8, predicted=True),
    ]


def measure(kind: str, experiment: Mapping[str, Any], folder: Path, ranks: int) -> list[dict[str, Any]]:
    """What each rank of a run of its own says of its memory.

    Raises:
        UserError: A process failed; its last words.
    """
    path = folder / "experiment.json"
    path.write_text(json.dumps(experiment))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        command = [sys.executable, "-m", "rdtf_ds.benchmarks.memory_child", kind, str(path)]
        root = str(Path(__file__).resolve().parents[2])
        environment = {**os.environ, **common, **place, "PYTHONPATH": root}
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    try:
        answers = [process.communicate() for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, answers, strict=True):
        if process.returncode != 0:
            raise UserError(f"A measured process ended with code {process.returncode}: {errors.strip()[-1500:]}")
    return [json.loads(out.splitlines()[-1]) for out, _ in answers]


def write_whole_clips(folder: Path) -> None:
    """Stickers of eight frames: shorter ones would give steps of other shapes."""
    folder.mkdir()
    lines = []
    for number, sticker in enumerate(all_stickers(held_out=False)[:CLIPS]):
        write_clip(render(sticker, 8, 64, np.random.default_rng(number)), folder / f"{number}.gif")
        lines.append(json.dumps({"file_name": f"{number}.gif", "text": sticker.caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _common(folder: Path, steps: int) -> list[str]:
    place = [f"rdtf.data.data_dir={folder / 'clips'}", f"rdtf.output_dir={folder / 'run'}"]
    return [*place, f"rdtf.max_steps={steps}", "rdtf.data.dual_mask=false", "rdtf.optimizer.warmup_steps=0"]
