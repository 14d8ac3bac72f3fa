"""Computing the k frames of a clip alone beside padding them to 8: seconds of forward and backward, and whether the losses agree."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rdtf_ds.benchmarks.peers import DTYPES, GUIDED, SIZES, Clip, channels_last, device_here, dfgn, made_in, make_clip
from rdtf_ds.benchmarks.report import Row, make_report
from rdtf_ds.benchmarks.timing import take_turns
from rdtf_ds.diffusion.loss import masked_mse
from rdtf_ds.models.dfgn import DFGN

FRAMES = 8
# Of the loss: the same sums in another order. bf16 has 8 bits and fp16 11, and every layer rounds.
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``tools/benchmark.py trim``."""
    parser.add_argument("--size", choices=SIZES, default="full", help="of DFGN (full)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--k", type=int, nargs="+", choices=range(3, FRAMES), default=[4], metavar="K", help="frames, 3 to 7 (4)")
    parser.add_argument("--repetitions", type=int, default=3, help="of which the median is taken (3)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """For each k: a step on k frames beside one on 8 of which k count, with selective checkpointing and without optimizer."""
    size, dtype, device = SIZES[arguments.size], DTYPES[arguments.dtype], device_here()
    tolerance, rows = TOLERANCES[arguments.dtype], []
    with made_in(dtype, device):
        network = dfgn(size)
        channels_last(network)
        _wake(network)
        network.set_activation_checkpointing("selective")
        clip = make_clip(size, FRAMES)
        target = torch.randn_like(clip.sample[:, :GUIDED])
        for k in arguments.k:
            trimmed = Clip(clip.sample[:, :, :k], clip.timestep, clip.text)
            calls = {
                "trimmed": _step(network, trimmed, target[:, :, :k], torch.ones(1, k, dtype=torch.bool), padded=False),
                "padded": _step(network, clip, target, torch.arange(FRAMES)[None] < k, padded=True),
            }
            with torch.no_grad():
                losses = {name: call() for name, call in calls.items()}
            taken = take_turns(calls, arguments.repetitions)
            difference = abs(losses["trimmed"] / losses["padded"] - 1)
            ratio = taken["trimmed"].median / taken["padded"].median
            rows += [
                Row(f"step, k = {k} padded to {FRAMES}", taken["padded"].median, "s", spread=taken["padded"].spread),
                Row(f"step, k = {k} frames alone", taken["trimmed"].median, "s", "padded", ratio, spread=taken["trimmed"].spread),
                Row(f"difference of the loss, k = {k}", difference, "relative", f"tolerance {tolerance:g}", difference / tolerance, 1.0),
            ]
    return make_report("trim", rows, [f"{arguments.size} size, {arguments.dtype}, selective checkpointing, without optimizer"])


def _wake(network: DFGN) -> None:
    """Draws what starts at zero: else no frame would be seen by another, and the loss would not depend on the network at all."""
    parameters = dict(network.named_parameters())
    for name in sorted(network.zero_initialised_parameters()):
        torch.nn.init.normal_(parameters[name], std=0.02)


def _step(network: DFGN, clip: Clip, target: Tensor, frame_mask: Tensor, padded: bool) -> Callable[[], float]:
    """Loss over the frames of the mask, which the network is told only where some are padded; and gradients, where they are on."""
    mask = frame_mask if padded else None

    def step() -> float:
        """Mean of the samples' losses; no gradient is left."""
        predicted = network(clip.sample, clip.timestep, clip.text, mask)
        loss = masked_mse(predicted.float(), target.float(), frame_mask).mean()
        if loss.requires_grad:
            loss.backward()
            network.zero_grad(set_to_none=True)
        return loss.item()

    return step
