"""Real ZeRO-2 steps of a small DFGN, all their tensors counted, beside what the planner says; as a command, one rank of several."""

from __future__ import annotations

import json

import torch
import torch.distributed as dist

from rdtf_ds.memory.activations import DFGNTracer, LiveBytes
from rdtf_ds.memory.planner import Group, Setup, Sources, plan
from rdtf_ds.training.engine import TrainingEngine, start_distributed, stop_distributed
from rdtf_ds.training.optimizer import split_parameters
from tests.memory.networks import CLIP_SHAPES, arguments, build

ALIGNMENT, GROUP_SIZE = 256 * 6, 40_000


def predicted_and_measured(precision: str, accumulation: int, bucket: int) -> dict[str, tuple[int, int]]:
    """Largest sum of all tensors in each phase of two steps on this rank, predicted and measured; needs a process group."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    model = build("small")
    model.set_activation_checkpointing("blocks")
    torch.nn.init.normal_(model.conv_out.weight)
    split = split_parameters(model.named_parameters(), GROUP_SIZE, ALIGNMENT, model.zero_initialised_parameters())
    groups = tuple(Group(tuple(p.numel() for _, p in group.parameters), group.padding, group.bits) for group in split)
    ranks = dist.get_world_size()
    setup = Setup(
        ranks=ranks, global_batch=accumulation * ranks, micro_batch=1, compute_bytes=dtype.itemsize, group_size=GROUP_SIZE, ema="off",
        checkpointing="blocks", autoencoder_slice=1, frames=8, reduce_bucket=bucket, overlap_comm=False, validates=False,
    )  # fmt: skip
    tracer = DFGNTracer(lambda: build("small"), CLIP_SHAPES["small"], dtype)
    nothing = {"sampling": lambda clips: 0, "encode": lambda frames: 0, "decode": lambda frames: 0, "encoders": {}}
    predicted = {phase.name: phase.total for phase in plan(setup, Sources(lambda size: groups, tracer.training, **nothing)).phases}
    config = {
        "train_batch_size": setup.global_batch,
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": bucket},
        **({"bf16": {"enabled": True}} if precision == "bf16" else {}),
    }
    with LiveBytes() as live:
        measured = _peaks(live, lambda: TrainingEngine(model, split, config, learning_rate=1e-3, warmup_steps=0), dtype, accumulation)
    return {name: (predicted[name], peak) for name, peak in measured.items()}


def _peaks(live, make_engine, dtype, accumulation):
    peaks = {}

    def take(name):
        peaks[name] = max(peaks.get(name, 0), live.peak)
        live.restart_peak()

    batch = arguments("small", 1, dtype)
    live.restart_peak()
    engine = make_engine()
    take("initialise")
    inner = engine._ds.optimizer.optimizer
    update = inner.step

    def step():
        """The CPU's way to do an 8-bit update makes fp32 copies that the kernel of a GPU does not."""
        take("step")
        update()
        live.restart_peak()

    inner.step = step
    for _ in range(2):
        for _ in range(accumulation):
            loss = engine.forward(*batch).float().square().mean(dim=(1, 2, 3, 4))
            take("forward")
            engine.backward(loss, torch.zeros(1, dtype=torch.int64))
            take("backward")
            del loss
        engine.step()
    return peaks


if __name__ == "__main__":
    start_distributed("cpu")
    torch.set_num_threads(1)
    print(json.dumps(predicted_and_measured("bf16", 2, 60_000)))
    stop_distributed()
