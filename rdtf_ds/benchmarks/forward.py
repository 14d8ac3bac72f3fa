"""One forward pass of one clip, DFGN beside I2VGenXLUNet and UNet3DConditionModel and beside the machine's matrix products."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from rdtf_ds.benchmarks.peers import (
    DTYPES,
    PEERS,
    SIZES,
    Size,
    call_dfgn,
    call_peer,
    channels_last,
    device_here,
    dfgn,
    made_in,
    make_clip,
    peer,
)
from rdtf_ds.benchmarks.report import Row, make_report
from rdtf_ds.benchmarks.timing import MATMUL_SIDES, Timing, best_rate, count_flops, square_products, take_turns
from rdtf_ds.memory.activations import without_data

OURS = "DFGN"
PEER_BAR = 0.70  # of I2VGenXLUNet, in time and in FLOP
RATE_BARS = {"fp32": 0.85, "bf16": 0.75}  # of the best square product


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``tools/benchmark.py forward``."""
    parser.add_argument("--size", choices=SIZES, default="full", help="of all networks (full)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--frames", type=int, default=8, help="of the clip (8)")
    parser.add_argument("--repetitions", type=int, default=3, help="of which the median is taken (3)")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=["I2VGenXLUNet"], help="whom to measure beside (I2VGenXLUNet)")
    parser.add_argument("--matmul_sides", type=int, nargs="+", default=MATMUL_SIDES, help="of the products that show the limit")
    parser.add_argument("--peers_channels_last", action="store_true", help="put the peers in channels-last memory too")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds, FLOP and parameters of ours and of each peer; our rate beside that of the best square product."""
    size, dtype, device = SIZES[arguments.size], DTYPES[arguments.dtype], device_here()
    products = square_products(dtype, device, arguments.matmul_sides)
    with made_in(dtype, device):
        calls = {OURS: _our_call(size, arguments.frames)}
        calls |= {name: _peer_call(name, size, arguments.frames, arguments.peers_channels_last) for name in arguments.peers}
        with torch.no_grad():
            timings = take_turns({**calls, **products}, arguments.repetitions)
    work = {name: count_work(name, size, arguments.frames, dtype) for name in calls}
    rate, limit = work[OURS][0] / timings[OURS].median, best_rate(products, timings)
    held = arguments.size == "full"
    rows = _own_rows(timings[OURS], *work[OURS], rate, limit, RATE_BARS.get(arguments.dtype) if held else None)
    for name in arguments.peers:
        bar = PEER_BAR if held and name == "I2VGenXLUNet" else None
        rows += _rows_beside(name, timings, work, bar)
    layout = "channels-last" if arguments.peers_channels_last else "their own"
    note = f"{arguments.size} size, {arguments.dtype}, 1x8x{arguments.frames}x{size.side}x{size.side} latents, the peers in {layout} memory"
    return make_report("forward", rows, [note])


def count_work(name: str, size: Size, frames: int, dtype: torch.dtype) -> tuple[int, int]:
    """FLOP and parameters of DFGN or a peer, without data."""
    with without_data(dtype), torch.no_grad():
        clip = make_clip(size, frames)
        if name == OURS:
            network: torch.nn.Module = dfgn(size, "sdpa")
            flops = count_flops(lambda: call_dfgn(network, clip))
        else:
            network = peer(name, size)
            flops = count_flops(lambda: call_peer(name, network, clip))
        return flops, sum(parameter.numel() for parameter in network.parameters())


def _our_call(size: Size, frames: int) -> Callable[[], object]:
    network, clip = channels_last(dfgn(size)).eval(), make_clip(size, frames)
    return lambda: call_dfgn(network, clip)


def _peer_call(name: str, size: Size, frames: int, like_ours: bool) -> Callable[[], object]:
    network, clip = peer(name, size), make_clip(size, frames)
    if like_ours:
        channels_last(network)
    return lambda: call_peer(name, network, clip)


def _own_rows(taken: Timing, flops: int, parameters: int, rate: float, limit: float, bar: float | None) -> list[Row]:
    return [
        Row("forward", taken.median, "s", spread=taken.spread),
        Row("work", flops / 1e12, "TFLOP"),
        Row("parameters", parameters / 1e9, "B"),
        Row("best matrix product", limit / 1e9, "GFLOP/s"),
        Row("rate", rate / 1e9, "GFLOP/s", "best matrix product", rate / limit, bar, at_least=True, spread=taken.spread),
    ]


def _rows_beside(name: str, timings: dict[str, Timing], work: dict[str, tuple[int, int]], bar: float | None) -> list[Row]:
    ours, theirs = timings[OURS], timings[name]
    (flops, parameters), (peer_flops, peer_parameters) = work[OURS], work[name]
    return [
        Row(f"forward of {name}", theirs.median, "s", spread=theirs.spread),
        Row("forward", ours.median, "s", name, ours.median / theirs.median, bar, spread=ours.spread),
        Row("work", flops / 1e12, "TFLOP", name, flops / peer_flops, bar),
        Row("parameters", parameters / 1e9, "B", name, parameters / peer_parameters),
    ]
