"""What guidance costs: a whole call of the pipeline with both guidances, three passes in one batch, beside one with a single pass.

The network has the paper's widths at its first levels (320, 640) and random weights; text comes from tiny encoders and pixels through the
Haar autoencoder, so that what is timed is the sampling loop. Both contestants get the same caption, picture and seed; only the scales
differ. Processor seconds stand beside those of the clock: other work on the machine changes them less.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from rdtf_ds.benchmarks.peers import DTYPES, channels_last, device_here, made_in
from rdtf_ds.benchmarks.report import Row, make_report
from rdtf_ds.benchmarks.timing import take_turns
from rdtf_ds.models.autoencoder import HaarAutoencoder
from rdtf_ds.models.dfgn import DFGN
from rdtf_ds.models.tiny_encoders import tiny_clip, tiny_t5
from rdtf_ds.pipeline import RDTFPipeline
from rdtf_ds.samplers import make_sampler

BAR = 3.0
TEXT_WIDTH, FACTOR, CHANNELS = 64, 2, 12  # Haar at f = 2 has 3·2² channels
# s_I, s_T: three different passes, two (the default scales are equal), one by scales of 1, and one by scales of 0.
SCALES = {"three passes": (7.5, 4.0), "two passes": (7.5, 7.5), "one pass": (1.0, 1.0), "one pass, scales 0": (0.0, 0.0)}
PASSES = {"three passes": 3, "two passes": 2, "one pass": 1, "one pass, scales 0": 1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``tools/benchmark.py guidance``."""
    parser.add_argument("--widths", type=int, nargs="+", default=[320, 640], help="of the network's levels (320 640)")
    parser.add_argument("--side", type=int, default=16, help="of the latents (16)")
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--repetitions", type=int, default=1, help="of which the median is taken (1)")
    parser.add_argument("--all", action="store_true", help="two passes and scales of 0 too")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a call by its number of passes; that they are so many is counted, not assumed."""
    with made_in(DTYPES[arguments.dtype], device_here()):
        pipeline = make_pipeline(arguments.widths, arguments.side, arguments.frames)
    names = list(SCALES) if arguments.all else ["three passes", "one pass"]
    picture = np.full((FACTOR * arguments.side, FACTOR * arguments.side, 3), 200, np.uint8)

    def call(name: str, steps: int) -> None:
        """A whole call with the scales of ``name``, to latents; a new one each time, from the same seed."""
        image_scale, text_scale = SCALES[name]
        pipeline(
            "a red star slides left", {0: picture}, num_inference_steps=steps, eta=0.0, seeds=0,
            image_scale=image_scale, text_scale=text_scale, output_type="latent",
        )  # fmt: skip

    for name in names:  # counts, and warms up
        made = count_rows(pipeline, partial(call, name, 1))
        assert made == PASSES[name], f"{name}: {made} rows went through the network"
    processor: dict[str, list[float]] = {name: [] for name in names}

    def measured(name: str) -> None:
        """A call of all steps; its processor seconds, of all threads, are kept beside."""
        before = time.process_time()
        call(name, arguments.steps)
        processor[name].append(time.process_time() - before)

    taken = take_turns({name: partial(measured, name) for name in names}, arguments.repetitions, warm_up=0)
    single = taken["one pass"]
    rows = [Row(f"{arguments.steps} steps, one pass", single.median, "s", spread=single.spread)]
    for name in names:
        if name != "one pass":
            ratio, bar = taken[name].median / single.median, BAR if name == "three passes" else None
            rows.append(Row(f"{arguments.steps} steps, {name}", taken[name].median, "s", "one pass", ratio, bar, spread=taken[name].spread))
            work = median(processor[name])
            ratio = work / median(processor["one pass"])
            rows.append(Row(f"{arguments.steps} steps, {name}", work, "processor s", "one pass", ratio))
    shape = f"widths {arguments.widths}, {arguments.frames} frames of {arguments.side} x {arguments.side} latents, {arguments.dtype}"
    return make_report("guidance", rows, [shape, "whole calls: text, visual guidance and sampling; without decoding"])


def make_pipeline(widths: list[int], side: int, frames: int) -> RDTFPipeline:
    """Random weights in the default dtype, on the default device, its kernels in the memory order a run has them in."""
    unet = DFGN(
        in_channels=2 * CHANNELS, out_channels=CHANNELS, block_out_channels=tuple(widths), attention_levels=(True,) * len(widths),
        clip_dim=TEXT_WIDTH, t5_dim=TEXT_WIDTH,
    )  # fmt: skip
    channels_last(unet)
    clip, clip_tokenizer = tiny_clip(TEXT_WIDTH)
    t5, t5_tokenizer = tiny_t5(TEXT_WIDTH)
    pipeline = RDTFPipeline(
        unet=unet.eval(), vae=HaarAutoencoder(FACTOR), text_encoder=clip, tokenizer=clip_tokenizer, text_encoder_2=t5,
        tokenizer_2=t5_tokenizer, scheduler=make_sampler("ddim", "linear", 1000, 0.00085, 0.012), image_size=FACTOR * side,
        max_frames=frames,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def count_rows(pipeline: RDTFPipeline, call: Any) -> int:
    """How many clips × passes go through the network in the one step of ``call``."""
    rows: list[int] = []
    handle = pipeline.unet.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    try:
        call()
    finally:
        handle.remove()
    return sum(rows)
