"""Small DFGNs of two sizes with real inputs, and what PyTorch itself says of the memory they take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from rdtf_ds.memory.activations import ClipShape
from rdtf_ds.models.dfgn import DFGN
from rdtf_ds.models.text_conditioning import TextFeatures

SHAPES = {
    "tiny": {"block_out_channels": (8, 16), "attention_levels": (False, True), "head_channels": 8, "norm_groups": 4},
    "small": {"block_out_channels": (32, 64, 64), "attention_levels": (True, True, False), "head_channels": 16, "norm_groups": 8},
}
CLIP_SHAPES = {"tiny": ClipShape(8, 8, 7, 16, 24), "small": ClipShape(5, 16, 20, 32, 16)}


def build(size: str) -> DFGN:
    shape = CLIP_SHAPES[size]
    settings = {"layers_per_block": 1, "context_dim": 32, "sti_heads": 2, "sti_head_dim": 8}
    return DFGN(clip_dim=shape.clip_dim, t5_dim=shape.t5_dim, **settings, **SHAPES[size])


def arguments(size: str, clips: int, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """What `DFGNTracer` calls the network on, with data."""
    shape = CLIP_SHAPES[size]
    sample = torch.randn(clips, 8, shape.frames, shape.side, shape.side, dtype=dtype)
    text = TextFeatures(*(torch.randn(clips, shape.text_length, width, dtype=dtype) for width in (shape.clip_dim, shape.t5_dim)))
    mask = torch.ones(clips, shape.frames, dtype=torch.bool) if clips > 1 else None
    return sample, torch.zeros(clips, dtype=torch.int64), text, mask


def saved_for_backward(network: DFGN, inputs: tuple[Any, ...]) -> int:
    """Bytes of the distinct storages that autograd keeps after forward, weights and inputs left out, and of the prediction."""
    given = {t.untyped_storage().data_ptr() for t in tree_leaves((list(network.parameters()), inputs)) if isinstance(t, Tensor)}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)  # held here, so no address comes twice
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        predicted = network(*inputs)
    kept.setdefault(predicted.untyped_storage().data_ptr(), predicted)
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in given)


def allocator_peak(folder: Path, run: Callable[[], object]) -> int:
    """Bytes that the CPU allocator had out at most while ``run`` ran, beyond those before, as the profiler saw it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    profiled.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    peak = now = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak
