"""Attention over all frames of a clip by backend, at the token counts of DFGN's temporal layers: seconds and bytes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rdtf_ds.benchmarks.peers import DTYPES, SIZES, Size, device_here
from rdtf_ds.benchmarks.report import Row, make_report
from rdtf_ds.benchmarks.timing import Timing, take_turns
from rdtf_ds.memory.activations import LiveBytes
from rdtf_ds.models.attention import BACKENDS, AttentionBackendError, attention, resolve_backend
from rdtf_ds.models.sti import default_gamma

HEADS, HEAD_DIM = 8, 32  # Table 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``tools/benchmark.py attention``."""
    parser.add_argument("--size", choices=SIZES, default="full", help="whose levels (full)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--frames", type=int, default=8, help="of the clip (8)")
    parser.add_argument("--repetitions", type=int, default=5, help="of which the median is taken (5)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every backend that runs here, beside ``math``; why the others do not is a note."""
    size, dtype, device = SIZES[arguments.size], DTYPES[arguments.dtype], device_here()
    backends, notes = runnable(device.type)
    rows: list[Row] = []
    for name, tokens in token_counts(size, arguments.frames).items():
        heads = [torch.randn(1, HEADS, tokens, HEAD_DIM, device=device).to(dtype) for _ in range(3)]
        calls = {backend: _call(backend, heads) for backend in backends}
        with torch.no_grad():
            timings = take_turns(calls, arguments.repetitions)
            peaks = {backend: _peak(call) for backend, call in calls.items()}
        for backend in backends:
            rows += _rows(f"{name}, {tokens} tokens", backend, timings, peaks)
    note = "bytes: tensors that operations return; what a kernel takes for itself is not seen"
    return make_report("attention", rows, [*notes, note])


def runnable(device_type: str) -> tuple[list[str], list[str]]:
    """Backends that run on this kind of device, and why the others do not."""
    backends, notes = [], []
    for backend in BACKENDS:
        try:
            backends.append(resolve_backend(backend, device_type))
        except AttentionBackendError as error:
            notes.append(str(error))
    return backends, notes


def token_counts(size: Size, frames: int) -> dict[str, int]:
    """Tokens F·(h/γ)·(w/γ) of each level's temporal layer, and of the first one's without γ."""
    sides = {f"level {i}": size.side >> i for i in range(len(size.widths)) if size.attends[i]}
    sides["middle"] = size.side >> (len(size.widths) - 1)
    tokens = {f"{name}, γ = {default_gamma(side)}": frames * (side // default_gamma(side)) ** 2 for name, side in sides.items()}
    return {**tokens, "level 0, γ = 1": frames * size.side**2}


def _call(backend: str, heads: list[Tensor]) -> Callable[[], Tensor]:
    query, key, value = heads
    return lambda: attention(query, key, value, backend=backend)


def _peak(call: Callable[[], Tensor]) -> int:
    with LiveBytes() as live:
        call()
    return live.peak


def _rows(name: str, backend: str, timings: dict[str, Timing], peaks: dict[str, int]) -> list[Row]:
    taken, beside = timings[backend], None if backend == "math" else "math"
    time_ratio, byte_ratio = (
        (taken.median / timings["math"].median, peaks[backend] / peaks["math"]) if beside else (None, None)
    )
    return [
        Row(f"{name}, {backend}", 1e3 * taken.median, "ms", beside, time_ratio, spread=taken.spread),
        Row(f"{name}, {backend}", peaks[backend] / 1e6, "MB", beside, byte_ratio),
    ]
