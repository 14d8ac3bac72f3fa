"""Forward and backward of one clip, by activation checkpointing, beside the forward pass alone and beside a clip of half the frames."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from rdtf_ds.benchmarks.peers import (
    DTYPES,
    GUIDED,
    SIZES,
    Clip,
    Size,
    call_dfgn,
    channels_last,
    device_here,
    dfgn,
    forward_and_backward,
    made_in,
    make_clip,
    plain_training,
)
from rdtf_ds.benchmarks.report import Row, make_report
from rdtf_ds.benchmarks.timing import Timing, count_flops, take_turns
from rdtf_ds.memory.activations import TrainingTrace, trace_training, without_data
from rdtf_ds.models.dfgn import DFGN
from rdtf_ds.models.recompute import MODES

FORWARD, HALF, PLAIN = "forward", "step at half the frames", "plain PyTorch with AdamW"
# Of a step with selective checkpointing: seconds over forward's, bytes over those of keeping all, seconds at k = 4 over k = 8.
STEP_BAR, BYTES_BAR, HALF_BAR = 3.7, 1 / 3, 0.58


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``tools/benchmark.py train_step``."""
    parser.add_argument("--size", choices=SIZES, default="full", help="of DFGN (full)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--frames", type=int, default=8, help="of the clip; beside it stands one of half as many (8)")
    parser.add_argument("--repetitions", type=int, default=3, help="of which the median is taken (3)")
    parser.add_argument("--modes", nargs="*", choices=MODES, default=["none", "selective", "blocks"], help="of activation checkpointing")
    parser.add_argument("--plain", action="store_true", help="also a step of plain PyTorch with AdamW (two more numbers for each weight)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every mode, what it computes and keeps; the optimizer is in none of them but plain PyTorch's."""
    size, dtype, device, modes = SIZES[arguments.size], DTYPES[arguments.dtype], device_here(), arguments.modes
    with made_in(dtype, device):
        network = dfgn(size)
        channels_last(network)
        clip, half = make_clip(size, arguments.frames), make_clip(size, arguments.frames // 2)
        calls = {FORWARD: _forward(network, clip)} | {mode: _step(network, clip, mode) for mode in modes}
        if "selective" in modes:
            calls[HALF] = _step(network, half, "selective")
        if arguments.plain:
            network.set_activation_checkpointing("none")
            calls[PLAIN] = _in_mode(network, "none", plain_training(network, clip, _target(clip)))
        timings = take_turns(calls, arguments.repetitions)
    counted = {mode: count_step(size, arguments.frames, mode, dtype) for mode in {*modes, "none"}}
    with without_data(dtype), torch.no_grad():
        fake, fake_clip = dfgn(size, "sdpa"), make_clip(size, arguments.frames)
        forward_flops = count_flops(lambda: call_dfgn(fake, fake_clip))
    held = arguments.size == "full"
    rows = [Row(FORWARD, timings[FORWARD].median, "s", spread=timings[FORWARD].spread)]
    for mode in modes:
        rows += _rows_of(mode, timings, counted, forward_flops, held and mode == "selective")
    rows += _rows_beside_ours(timings, held)
    note = f"{arguments.size} size, {arguments.dtype}, a clip of {arguments.frames} frames, forward without graph, steps without optimizer"
    return make_report("train_step", rows, [note, "peak activations: counted on tensors without data"])


def count_step(size: Size, frames: int, mode: str, dtype: torch.dtype) -> tuple[int, int]:
    """FLOP of forward and backward, and the most bytes alive in them beyond weights, inputs and earlier gradients."""
    with without_data(dtype):
        network, clip = dfgn(size, "sdpa"), make_clip(size, frames)
        network.set_activation_checkpointing(mode)
        flops = count_flops(forward_and_backward(network, clip, _target(clip), item=False))
        network.zero_grad(set_to_none=True)
        inputs = tree_leaves((clip.sample, clip.timestep, clip.text))
        return flops, peak_bytes(trace_training(network, lambda: call_dfgn(network, clip), inputs))


def peak_bytes(trace: TrainingTrace) -> int:
    """The most bytes alive at once in forward and backward."""
    return max(trace.forward_peak, trace.backward_tail, *(arrival.peak for arrival in trace.arrivals))


def _target(clip: Clip) -> torch.Tensor:
    return torch.randn_like(clip.sample[:, :GUIDED])


def _forward(network: DFGN, clip: Clip) -> Callable[[], object]:
    return torch.no_grad()(lambda: call_dfgn(network, clip))


def _step(network: DFGN, clip: Clip, mode: str) -> Callable[[], object]:
    return _in_mode(network, mode, forward_and_backward(network, clip, _target(clip)))


def _in_mode(network: DFGN, mode: str, step: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        """The step with activations kept as ``mode`` says; no gradient is left, so that the next begins as this one did."""
        network.set_activation_checkpointing(mode)
        result = step()
        network.zero_grad(set_to_none=True)
        return result

    return run


def _rows_of(
    mode: str, timings: dict[str, Timing], counted: dict[str, tuple[int, int]], forward_flops: int, held: bool
) -> list[Row]:
    taken, forward, (flops, peak) = timings[mode], timings[FORWARD].median, counted[mode]
    kept = None if mode == "none" else "none"
    return [
        Row(f"step, {mode}", taken.median, "s", FORWARD, taken.median / forward, STEP_BAR if held else None, spread=taken.spread),
        Row(f"work, {mode}", flops / 1e12, "TFLOP", FORWARD, flops / forward_flops),
        Row(f"peak activations, {mode}", peak / 1e6, "MB", kept, peak / counted["none"][1] if kept else None,
            BYTES_BAR if held else None, predicted=True),
    ]  # fmt: skip


def _rows_beside_ours(timings: dict[str, Timing], held: bool) -> list[Row]:
    """Half the frames beside all of them, and ours beside plain PyTorch."""
    rows = []
    if HALF in timings:
        half, whole = timings[HALF], timings["selective"].median
        rows.append(Row(HALF, half.median, "s", "step, selective", half.median / whole, HALF_BAR if held else None, spread=half.spread))
    if PLAIN in timings:
        plain = timings[PLAIN]
        rows.append(Row(PLAIN, plain.median, "s", spread=plain.spread))
        rows += [
            Row(f"step, {mode}", timings[mode].median, "s", PLAIN, timings[mode].median / plain.median) for mode in MODES if mode in timings
        ]
    return rows
