"""The memory plan of an experiment: its keys turned into the planner's numbers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from rdtf_ds.config import RDTFSection
from rdtf_ds.data.cache_header import HEADER, read_header
from rdtf_ds.experiment import Experiment
from rdtf_ds.memory.activations import ClipShape, DFGNTracer
from rdtf_ds.memory.encoders import AutoencoderTracer, Encoders, read_encoders
from rdtf_ds.memory.gpus import GPU
from rdtf_ds.memory.host import plan_on_cpu
from rdtf_ds.memory.planner import AUTOENCODER, Group, MemoryPlan, Setup, Sources, plan
from rdtf_ds.memory.video_decoders import video_decoders
from rdtf_ds.training.assembly import build_model
from rdtf_ds.training.encoders import DTYPES
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
        gpu: None for the CPU as device: resident memory above that of the process before anything was built.

    Raises:
        UserError: Encoders that cannot be read, a batch that so many ranks cannot share.
    """
    encoders = read_encoders(experiment.rdtf.encoders)
    setup, sources = describe(experiment, ranks, encoders, "cpu" if gpu is None else "cuda")
    made = plan_on_cpu(setup, sources) if gpu is None else plan(setup, sources, gpu)
    return Planned(setup, sources, made, encoders)


def _widths(rdtf: RDTFSection, latent_channels: int, encoders: Encoders) -> tuple[int, int, int]:
    """Latent channels, CLIP and T5 widths; of the cache that takes the encoders' place, once it is there."""
    folder = Path(rdtf.memory.cache_dir or "")
    if rdtf.memory.encoders == "cached" and (folder / HEADER).is_file():
        header = read_header(folder)
        return header.latent_channels, header.clip_dim, header.t5_dim
    return latent_channels, encoders.clip_dim, encoders.t5_dim


def describe(experiment: Experiment, ranks: int, encoders: Encoders, device_type: str = "cuda") -> tuple[Setup, Sources]:
    """The planner's numbers of an experiment; on a CPU the encoders compute in fp32."""
    rdtf, zero = experiment.rdtf, experiment.deepspeed["zero_optimization"]
    dtype = COMPUTE[experiment.precision]
    encoder_dtype = dtype if device_type == "cuda" else torch.float32
    autoencoder = AutoencoderTracer(encoders.autoencoder, rdtf.data.image_size, encoder_dtype)
    widths = _widths(rdtf, autoencoder.channels, encoders)
    # xformers has no operator for tensors without data; what it keeps is what sdpa's fused kernels keep.
    backend = "math" if rdtf.model.attention_backend == "math" else "sdpa"
    traced = rdtf.model_copy(update={"model": rdtf.model.model_copy(update={"attention_backend": backend})})
    shape = ClipShape(rdtf.data.frames, rdtf.data.image_size // autoencoder.factor, rdtf.encoders.text_length, *widths[1:])
    tracer = DFGNTracer(lambda: build_model(traced, *widths), shape, dtype)

    def groups(group_size: int) -> tuple[Group, ...]:
        """As training splits the parameters with this group size, of a network without data."""
        with torch.device("meta"):
            model = build_model(traced, *widths)
        split = split_parameters(
            model.named_parameters(), group_size, zero_initialised=model.zero_initialised_parameters(), bits=rdtf.optimizer.bits
        )
        return tuple(Group(tuple(p.numel() for _, p in group.parameters), group.padding, group.bits) for group in split)

    setup = Setup(
        ranks=ranks,
        global_batch=experiment.global_batch,
        micro_batch=experiment.micro_batch,
        compute_bytes=dtype.itemsize,
        group_size=rdtf.optimizer.group_size,
        ema=rdtf.ema.device if rdtf.ema.enabled else "off",
        checkpointing=rdtf.memory.activation_checkpointing,
        autoencoder_slice=rdtf.memory.autoencoder_slice,
        frames=rdtf.data.frames,
        reduce_bucket=zero["reduce_bucket_size"],
        overlap_comm=zero["overlap_comm"],
        validates=rdtf.validation.interval > 0,
        encoders=rdtf.memory.encoders,
        offload_optimizer=zero.get("offload_optimizer") is not None,
        grad_bytes=4 if experiment.deepspeed.get("data_types", {}).get("grad_accum_dtype") == "fp32" else dtype.itemsize,
        frame_counts=min(rdtf.data.frames - rdtf.data.k_min + 1, rdtf.max_steps) if rdtf.data.dual_mask else 1,
        video_decoders=video_decoders(rdtf.data.workers, rdtf.memory.encoders),
    )
    return setup, Sources(
        groups=cache(groups),
        training=tracer.training,
        sampling=tracer.sampling,
        encode=cache(autoencoder.encode),
        decode=cache(autoencoder.decode),
        encoders={
            AUTOENCODER: autoencoder.parameters * encoder_dtype.itemsize,
            "clip": encoders.clip_parameters * encoder_dtype.itemsize,
            "t5": encoders.t5_parameters * DTYPES[rdtf.encoders.t5_dtype].itemsize,
        },
    )
