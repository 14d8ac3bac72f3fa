"""The memory plan of an experiment: its keys turned into the planner's numbers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from rdtf_ds.experiment import Experiment
from rdtf_ds.memory.activations import ClipShape, DFGNTracer
from rdtf_ds.memory.encoders import AutoencoderTracer, Encoders, read_encoders
from rdtf_ds.memory.gpus import GPU
from rdtf_ds.memory.planner import Group, MemoryPlan, Setup, Sources, plan
from rdtf_ds.training.assembly import DTYPES, build_model
from rdtf_ds.training.optimizer import split_parameters

COMPUTE = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Planned:
    """A plan and what it was made from, for whoever asks it "what if"."""

    setup: Setup
    sources: Sources
    plan: MemoryPlan
    encoders: Encoders


def plan_experiment(experiment: Experiment, ranks: int, gpu: GPU | None) -> Planned:
    """Predict the memory of an experiment on so many GPUs of a kind, without allocating anything of its size.

    Args:
        gpu: None for the tensors alone.

    Raises:
        UserError: Encoders that cannot be read, a batch that so many ranks cannot share.
    """
    encoders = read_encoders(experiment.rdtf.encoders)
    setup, sources = describe(experiment, ranks, encoders)
    return Planned(setup, sources, plan(setup, sources, gpu), encoders)


def describe(experiment: Experiment, ranks: int, encoders: Encoders) -> tuple[Setup, Sources]:
    """The planner's numbers of an experiment."""
    rdtf, zero = experiment.rdtf, experiment.deepspeed["zero_optimization"]
    dtype = COMPUTE[experiment.precision]
    autoencoder = AutoencoderTracer(encoders.autoencoder, rdtf.data.image_size, dtype)
    widths = (autoencoder.channels, encoders.clip_dim, encoders.t5_dim)
    # xformers has no operator for tensors without data; what it keeps is what sdpa's fused kernels keep.
    backend = "math" if rdtf.model.attention_backend == "math" else "sdpa"
    traced = rdtf.model_copy(update={"model": rdtf.model.model_copy(update={"attention_backend": backend})})
    shape = ClipShape(rdtf.data.frames, rdtf.data.image_size // autoencoder.factor, rdtf.encoders.text_length, *widths[1:])
    tracer = DFGNTracer(lambda: build_model(traced, *widths), shape, dtype)

    def groups(group_size: int) -> tuple[Group, ...]:
        with torch.device("meta"):
            model = build_model(traced, *widths)
        split = split_parameters(
            model.named_parameters(), group_size, zero_initialised=model.zero_initialised_parameters(), bits=rdtf.optimizer.bits
        )
        return tuple(Group(tuple(p.numel() for _, p in group.parameters), group.padding, group.bits) for group in split)

    halves = encoders.clip_parameters + autoencoder.parameters
    setup = Setup(
        ranks=ranks,
        global_batch=experiment.global_batch,
        micro_batch=experiment.micro_batch,
        compute_bytes=dtype.itemsize,
        group_size=rdtf.optimizer.group_size,
        ema=rdtf.ema.enabled,
        checkpointing=rdtf.memory.activation_checkpointing,
        autoencoder_slice=rdtf.memory.autoencoder_slice,
        frames=rdtf.data.frames,
        reduce_bucket=zero["reduce_bucket_size"],
        overlap_comm=zero["overlap_comm"],
        validates=rdtf.validation.interval > 0,
    )
    return setup, Sources(
        groups=cache(groups),
        training=tracer.training,
        sampling=tracer.sampling,
        encode=cache(autoencoder.encode),
        decode=cache(autoencoder.decode),
        encoder_bytes=halves * dtype.itemsize + encoders.t5_parameters * DTYPES[rdtf.encoders.t5_dtype].itemsize,
    )
