"""Memory and speed of an export of the full-size model, beside a plain copy of the same bytes.

A checkpoint as a run of full_cpu.json with EMA leaves it, of random weights: masters, 8-bit moments and DeepSpeed's bookkeeping in its
own file, weights in bf16, the mean of the weights. Each is written as it is made, so that the benchmark itself needs little memory.
The export is a process of its own. Its memory is VmHWM as the kernel tells it when it ends: everything the process ever had at
once, Python, its libraries and the pages of mapped files included, nothing taken off.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rdtf_ds.benchmarks.memory import CONFIG, SIZES
from rdtf_ds.benchmarks.report import Row, make_report
from rdtf_ds.checkpoints.durable import sync, write_file
from rdtf_ds.checkpoints.moments import QUANT
from rdtf_ds.checkpoints.store import CheckpointStore
from rdtf_ds.checkpoints.tensor_files import write_safetensors
from rdtf_ds.checkpoints.weights import MODEL_STATES, ema_name, shard_path
from rdtf_ds.errors import UserError
from rdtf_ds.experiment import Experiment, load_experiment
from rdtf_ds.models.dfgn import DFGN
from rdtf_ds.training.assembly import build_model
from rdtf_ds.training.checkpoint import describe_groups
from rdtf_ds.training.encoders import load_encoders
from rdtf_ds.training.optimizer import QUANTISATION_BLOCK, ParameterGroup, split_parameters

MEMORY_BAR = 1.3
STEP = 100
_CHILD = """
import json, sys
from dataclasses import asdict
from rdtf_ds.export.exporting import export
report = export(sys.argv[1], sys.argv[2], weights=sys.argv[3], dtype=sys.argv[4], max_shard_size=sys.argv[5])
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({**asdict(report), "VmHWM": 1024 * int(status["VmHWM"].split()[0])}))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``tools/benchmark.py export``."""
    parser.add_argument("--size", choices=tuple(SIZES), default="full", help="full: 955 million parameters, 20 GB of disk (full)")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16", help="of the export (float16)")
    parser.add_argument("--max_shard_size", default="5GB", help="as of tools/export_fp16.py (5GB)")
    parser.add_argument("--encoders", nargs="+", default=[], metavar="NAME=SOURCE", help="frozen parts; the config's own are tiny")
    parser.add_argument("--folder", help="where the checkpoint and the exports are made and removed again; a folder of the disk to measure")
    parser.add_argument("--configs", default=str(Path(__file__).resolve().parents[2] / "ds_configs"), help="folder of full_cpu.json")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The report: for each kind of weights the export's memory beside the fp16 weights, and its speed beside the copy's."""
    overrides = [*SIZES[arguments.size], "rdtf.ema.enabled=true", *(f"rdtf.encoders.{pair}" for pair in arguments.encoders)]
    experiment = load_experiment(Path(arguments.configs) / CONFIG, overrides)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="rdtf_export_", dir=arguments.folder) as name:
        folder = Path(name)
        step = write_checkpoint(folder / "run", experiment)
        whole = sum(path.stat().st_size for path in step.iterdir())
        for weights, source in (("ema", step / ema_name(0)), ("master", shard_path(step, 0))):
            os.sync()  # the disk is still busy with what was written last
            copied = _seconds_of_copy(source, folder / "copy")
            measured = _export_in_a_process(step, folder / "model", weights, arguments)
            # A smaller model is dwarfed by Python and its libraries.
            rows += _rows(weights, source.stat().st_size, copied, measured, MEMORY_BAR if arguments.size == "full" else None)
            shutil.rmtree(folder / "model")
    notes = [f"a checkpoint of {whole / 1e9:.2f} GB; GB of 10^9 bytes; memory is VmHWM of a fresh process, nothing taken off"]
    return make_report("export", rows, notes)


def _rows(weights: str, source_bytes: int, copied: float, measured: dict[str, Any], bar: float | None) -> list[Row]:
    half, peak, speed = 2 * measured["parameters"], measured["VmHWM"], measured["gb_per_second"]
    plain = source_bytes / 1e9 / copied
    copy = f"plain copy of its {source_bytes / 1e9:.2f} GB"
    return [
        Row(f"memory of an export of {weights}", peak / 1e9, "GB", f"its weights in fp16, {half / 1e9:.3f} GB", peak / half, bar),
        Row(f"speed of an export of {weights}", speed, "GB/s of fp32 weights", f"{copy}: {plain:.2f} GB/s", speed / plain),
        Row(f"time of an export of {weights}", measured["seconds"], "s", f"{copy}: {copied:.1f} s", measured["seconds"] / copied),
    ]


def _export_in_a_process(step: Path, out: Path, weights: str, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-c", _CHILD, str(step), str(out), weights, arguments.dtype, arguments.max_shard_size]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"The measured export ended with code {done.returncode}: {done.stderr.strip()[-1500:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _seconds_of_copy(source: Path, target: Path) -> float:
    """Of a copy that is on the disk when it is done, as the export is; the copy is removed."""
    started = time.perf_counter()
    shutil.copyfile(source, target)
    sync(target)
    seconds = time.perf_counter() - started
    target.unlink()
    return seconds


def write_checkpoint(run: Path, experiment: Experiment) -> Path:
    """A run folder with one committed checkpoint of one rank, random weights; returns the step folder."""
    rdtf = experiment.rdtf
    autoencoder, text = load_encoders(rdtf, torch.float32, torch.device("cpu"))
    with torch.device("meta"):
        network = build_model(rdtf, autoencoder.channels, text.clip_dim, text.t5_dim)
    del autoencoder, text
    zeros = network.zero_initialised_parameters()
    groups = split_parameters(network.named_parameters(), rdtf.optimizer.group_size, zero_initialised=zeros)
    store = CheckpointStore(run / "checkpoints")
    partial = store.begin(STEP, 0)
    files = {
        shard_path(partial, 0).name: lambda file: torch.save(_optimizer_file(groups), file),
        MODEL_STATES: lambda file: torch.save(_model_file(network), file),
        ema_name(0): lambda file: _write_mean(file, groups),
    }
    digests = {name: write_file(partial / name, fill).to_json() for name, fill in files.items()}
    config = {key: value for key, value in network.config.items() if not key.startswith("_")}
    manifest = {"step": STEP, "applied_steps": STEP, "world_size": 1, "model": config, "groups": describe_groups(groups)}
    final = store.commit(partial, {**manifest, "may_differ": {}, "files": digests})
    (run / "config.json").write_text(json.dumps(experiment.resolved()), encoding="utf-8")
    return final


def _optimizer_file(groups: list[ParameterGroup]) -> dict[str, Any]:
    """DeepSpeed's: fp32 masters and bitsandbytes' moments of every group. The largest thing in memory here: 6 B a parameter."""
    moments: dict[int, Any] = {}
    for number, group in enumerate(groups):
        length = group.numel + group.padding
        if group.bits == 8:
            eight = {key: torch.randint(256, (length,), dtype=torch.uint8) for key in ("state1", "state2")}
            scales = {key: torch.rand(length // QUANTISATION_BLOCK) for key in ("absmax1", "absmax2")}
            state = {**eight, **scales, "qmap1": torch.rand(256), "qmap2": torch.rand(256)}
        else:
            state = {key: torch.rand(length) for key in ("state1", "state2")}
        moments[number] = {"step": STEP, QUANT: state}
    named = [{"name": group.name, "params": [number]} for number, group in enumerate(groups)]
    content = {
        "base_optimizer_state": {"state": moments, "param_groups": named},
        "single_partition_of_fp32_groups": [flat.requires_grad_() for _, flat in _flats(groups)],
        "param_alignment_paddings": [[0] * len(group.parameters) for group in groups],
        "partition_count": [1] * len(groups),
    }
    return {"optimizer_state_dict": content}


def _model_file(network: DFGN) -> dict[str, Any]:
    """DeepSpeed's: the weights in the dtype of training."""
    return {"module": {name: torch.randn(p.shape, dtype=torch.bfloat16) for name, p in network.named_parameters()}, "dp_world_size": 1}


def _write_mean(file: Any, groups: list[ParameterGroup]) -> None:
    specs = {group.name: (torch.float32, (group.numel + group.padding,)) for group in groups} | {"updates": (torch.int64, ())}
    write_safetensors(file, specs, _mean(groups))


def _mean(groups: list[ParameterGroup]) -> Iterator[tuple[str, Tensor]]:
    yield from _flats(groups)
    yield "updates", torch.tensor(STEP)


def _flats(groups: list[ParameterGroup]) -> Iterator[tuple[str, Tensor]]:
    for group in groups:
        yield group.name, torch.randn(group.numel + group.padding).mul_(0.02)
