"""Predicts the GPU memory of a run: ``python tools/plan_memory.py --deepspeed_config C --gpus N [--gpu v100-32gb] [--json]``.

The peak of every phase on each GPU, what it is made of, whether it fits and with what margin, what to change if it does not, and the
largest micro-batch that does. Predicted, not measured: no GPU and no weights are needed, and nothing of the size of the model is made.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # an encoder that is not here is assumed, not asked for

import torch  # noqa: E402

from rdtf_ds.errors import UserError  # noqa: E402
from rdtf_ds.experiment import Experiment, load_experiment  # noqa: E402
from rdtf_ds.memory.activations import ClipShape, DFGNTracer  # noqa: E402
from rdtf_ds.memory.encoders import AutoencoderTracer, Encoders, read_encoders  # noqa: E402
from rdtf_ds.memory.gpus import GPUS, find_gpu  # noqa: E402
from rdtf_ds.memory.levers import largest_micro_batch, smallest_changes  # noqa: E402
from rdtf_ds.memory.planner import Group, MemoryPlan, Setup, Sources, plan  # noqa: E402
from rdtf_ds.training.assembly import DTYPES, build_model  # noqa: E402
from rdtf_ds.training.optimizer import split_parameters  # noqa: E402

COMPUTE = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def main() -> int:
    """Exit code 0 when it fits, 1 when it does not, 2 with one paragraph on standard error when nothing can be planned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", required=True, help="JSON file of the experiment")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs of the run (1)")
    parser.add_argument("--gpu", default="v100-32gb", help=f"kind of GPU (v100-32gb): {', '.join(GPUS)}")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override a dotted key")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    try:
        gpu = find_gpu(arguments.gpu)
        experiment = load_experiment(arguments.deepspeed_config, arguments.overrides, require_data=False)
        experiment.check_device(True, arguments.gpus, gpu.capability)
        encoders = read_encoders(experiment.rdtf.encoders)
        setup, sources = describe(experiment, arguments.gpus, encoders)
        made = plan(setup, sources, gpu)
        report = _report(made, sources, encoders)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(report) if arguments.json else "\n".join(_lines(made, report)))
    return 0 if made.fits else 1


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


def _report(made: MemoryPlan, sources: Sources, encoders: Encoders) -> dict[str, Any]:
    """All that is printed, JSON-able."""
    assert made.gpu is not None
    groups = sources.groups(made.setup.group_size)
    report: dict[str, Any] = {
        "predicted": True,
        "gpu": made.gpu.name,
        "gpus": made.setup.ranks,
        "gpu_bytes": made.gpu.bytes,
        "parameters": sum(sum(group.sizes) for group in groups),
        "groups": len(groups),
        "micro_batch": made.setup.micro_batch,
        "accumulation": made.setup.accumulation,
        "phases": [{"name": phase.name, "total": phase.total, "bytes": phase.bytes} for phase in made.phases],
        "peak_phase": made.peak.name,
        "peak_bytes": made.peak.total,
        "margin_bytes": made.margin,
        "margin": made.margin / made.gpu.bytes,
        "fits": made.fits,
        "largest_micro_batch": largest_micro_batch(made.setup, sources, made.gpu),
        "changes": None,
        "assumed_encoders": list(encoders.assumed),
    }
    if not made.fits and (found := smallest_changes(made.setup, sources, made.gpu)) is not None:
        changes, changed = found
        report["changes"] = {"set": [change.told for change in changes], "peak_bytes": changed.peak.total, "margin_bytes": changed.margin}
    return report


def _lines(made: MemoryPlan, report: dict[str, Any]) -> list[str]:
    """The report as text; GB are 10^9 bytes."""
    phases = {phase.name: phase for phase in made.phases}
    categories = sorted({category for phase in made.phases for category in phase.bytes}, key=_rank_of_category)
    width = max(map(len, (*categories, "total")))
    lines = [
        f"{report['parameters']:,} parameters in {report['groups']} groups on {report['gpus']} x {report['gpu']}, micro-batch "
        f"{report['micro_batch']}, {report['accumulation']} in turn. GB of each GPU, predicted, not measured:",
        "",
        f"{'':<{width}}" + "".join(f"{name:>12}" for name in phases),
    ]
    for category in categories:
        cells = "".join(f"{phase.bytes.get(category, 0) / 1e9:>12.2f}" for phase in made.phases)
        lines.append(f"{category:<{width}}{cells}")
    lines.append(f"{'total':<{width}}" + "".join(f"{phase.total / 1e9:>12.2f}" for phase in made.phases))
    lines.append("")
    verdict = "fits, free" if made.fits else "DOES NOT FIT, short of"
    lines.append(
        f"Peak: {report['peak_phase']}, {report['peak_bytes'] / 1e9:.2f} of {report['gpu_bytes'] / 1e9:.2f} GB: {verdict} "
        f"{abs(report['margin_bytes']) / 1e9:.2f} GB ({abs(report['margin']):.0%})."
    )
    if made.fits:
        lines.append(f"Largest micro-batch that fits: {report['largest_micro_batch']}.")
    elif report["changes"] is None:
        lines.append("No set of the changes known here makes it fit.")
    else:
        changed = report["changes"]
        lines.append(f"It would fit with {' and '.join(changed['set'])}: {changed['margin_bytes'] / 1e9:.2f} GB free.")
    if report["assumed_encoders"]:
        lines.append(f"Not on this machine, so taken for Table 6's: {', '.join(report['assumed_encoders'])}.")
    if made.setup.checkpointing == "blocks_cpu_offload":
        lines.append("What blocks_cpu_offload moves to the CPU is counted as if it stayed: an upper bound.")
    return lines


def _rank_of_category(category: str) -> int:
    order = ("weights", "masters", "moments", "EMA", "gradients", "buckets", "fp32 working copies", "activations", "encoders")
    return order.index(category) if category in order else len(order)


if __name__ == "__main__":
    sys.exit(main())
