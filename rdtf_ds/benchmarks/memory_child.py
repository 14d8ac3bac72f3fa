"""A process that trains for some steps and says how much memory it took: one rank of a run, or its peer in plain PyTorch.

``python -m rdtf_ds.benchmarks.memory_child {run,plain} EXPERIMENT.json``, steps from ``rdtf.max_steps``; one JSON object on the last line
of standard output. Started by `rdtf_ds.benchmarks.memory`, with what a launcher sets (RANK, WORLD_SIZE, ...) in the environment.

The process is bare once everything is imported and the ranks have met; what it takes above that is counted, as the kernel does: the
largest resident set (VmHWM) since the phase began.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import closing
from importlib import import_module
from pathlib import Path

import torch

from rdtf_ds.benchmarks.peers import Clip, plain_training
from rdtf_ds.experiment import Experiment, load_experiment
from rdtf_ds.training.assembly import build_model, build_run
from rdtf_ds.training.encoders import load_encoders
from rdtf_ds.training.engine import start_distributed


class PhasePeaks:
    """Largest resident set of each phase above that of the bare process, which this is made in."""

    def __init__(self) -> None:
        self.bare, self.peaks = _resident("VmRSS"), dict[str, int]()
        _forget_peak()

    def ends(self, phase: str) -> None:
        """What was resident at most since the last phase ended belongs to ``phase``; the next one begins."""
        self.peaks[phase] = max(self.peaks.get(phase, 0), _resident("VmHWM") - self.bare)
        _forget_peak()


def _resident(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # of proc(5): the peak becomes what is resident now


def run_engine(experiment: Experiment, rank: int, world_size: int, watch: PhasePeaks) -> None:
    """The steps of a run with all its parts, as train.py takes them; nothing is saved."""
    Path(experiment.rdtf.output_dir).mkdir(parents=True, exist_ok=True)
    run = build_run(experiment, rank, world_size, torch.device("cpu"))
    watch.ends("initialise")
    steps = run.loader.steps(0, experiment.rdtf.max_steps)
    with closing(steps):  # type: ignore[type-var]  # a generator
        for _, batches in steps:
            for batch in batches:
                encoded = run.objective.encode(batch)
                losses = run.objective.losses(run.engine.forward, encoded)
                watch.ends("forward")
                run.engine.backward(losses, batch.timestep)
                watch.ends("backward")
            outcome = run.engine.step()
            assert outcome.applied, "a step was skipped, and with it the optimizer's memory"
            if run.ema is not None:
                run.ema.update()
            watch.ends("step")
            run.queue.push(run.curriculum.observe(run.queue.state, outcome.loss, outcome.sample_losses, outcome.timesteps))


LATE_IMPORTS = ("bitsandbytes.optim.adamw", "deepspeed", "transformers")
"""What a run imports late belongs to the bare process."""


def run_plainly(experiment: Experiment, watch: PhasePeaks) -> None:
    """The peer: the same network in fp32, PyTorch's AdamW, everything kept for backward; on random latents, without encoders."""
    rdtf = experiment.rdtf
    autoencoder, encoders = load_encoders(rdtf, torch.float32, torch.device("cpu"))
    channels, side, frames = autoencoder.channels, rdtf.data.image_size // autoencoder.factor, rdtf.data.frames
    network = build_model(rdtf, channels, encoders.clip_dim, encoders.t5_dim)
    network.set_activation_checkpointing("none")
    sample = torch.randn(1, network.conv_in.in_channels, frames, side, side)
    clip = Clip(sample, torch.full((1,), 500), encoders.encode(["a sticker"]))
    del autoencoder, encoders
    step = plain_training(network, clip, torch.randn(1, channels, frames, side, side))
    for _ in range(rdtf.max_steps):
        step()
        watch.ends("step")


def main(kind: str, path: str) -> None:
    """Measure and print."""
    for late in LATE_IMPORTS:
        import_module(late)
    experiment = load_experiment(path)
    rank, world_size = start_distributed("cpu", experiment.rdtf.verify_fp16_on_cpu)
    watch = PhasePeaks()
    if kind == "run":
        run_engine(experiment, rank, world_size, watch)
    else:
        run_plainly(experiment, watch)
    print(json.dumps({"bare": watch.bare, "phases": watch.peaks, "peak": max(watch.peaks.values())}), flush=True)
    os._exit(0)  # taking the process apart takes seconds and says nothing


if __name__ == "__main__":
    main(*sys.argv[1:])
