"""Quality per step: DPM-Solver++ in 25 steps and UniPC in 25 beside DDIM, by the share of clips that show what was asked for.

The model is one that tools/demo.py trained on made-up stickers, because there a program can tell from the frames whether colour and motion
are right (`rdtf_ds.evaluation.sticker_match`). Every sampler gets the same prompts, half of them of colour-shape pairs that training
never showed, and the same seeds, so the same starting noise. Without fresh noise (η = 0) all samplers solve the same differential equation;
how far each ends from its solution in 100 steps tells more than the shares do where all of them are near 1.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from rdtf_ds.benchmarks.report import Row, make_report
from rdtf_ds.data.synthetic import MOTIONS, Sticker, all_stickers
from rdtf_ds.evaluation.sticker_match import Report, judge
from rdtf_ds.pipeline import RDTFPipeline
from rdtf_ds.seeding import numpy_generator


class Contestant(NamedTuple):
    """A sampler, its steps, and η where it has one."""

    sampler: str
    steps: int
    eta: float | None

    @property
    def name(self) -> str:
        """As rows and notes have it, such as ``ddim 50, η = 1``."""
        return f"{self.sampler} {self.steps}" + ("" if self.eta is None else f", η = {self.eta:g}")


CONTESTANTS = (
    Contestant("ddim", 50, 0.0),
    Contestant("ddim", 50, 1.0),
    Contestant("ddim", 25, 0.0),
    Contestant("dpm++", 25, None),
    Contestant("unipc", 25, None),
)
EXACT = Contestant("dpm++", 100, None)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``tools/benchmark.py samplers``."""
    parser.add_argument("--model", type=Path, required=True, help="of tools/demo.py: its OUT/model")
    parser.add_argument("--clips", type=int, default=96, help="for each sampler (96)")
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """For each sampler the shares of clips of the right colour and of the right motion, how far it ends from the solution, and its work.

    Raises:
        UserError: no exported model there.
    """
    pipeline = RDTFPipeline.from_pretrained(arguments.model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    stickers = prompts(arguments.seed, arguments.clips)
    rows: list[Row] = []
    exact, _ = draw(pipeline, EXACT, stickers[: arguments.batch], arguments)
    for contestant in CONTESTANTS:
        made, seconds = draw(pipeline, contestant, stickers, arguments)
        report = judge(list(zip(stickers, made, strict=True)))
        rows += rows_of(contestant, report, seconds / len(stickers), float(np.abs(made[: len(exact)].astype(float) - exact).mean()))
    config = pipeline.config
    notes = [
        f"{len(stickers)} clips each, {config.image_size} pixels, {config.max_frames} frames, scales {config.text_scale:g} (text) "
        f"and {config.image_scale:g} (image); seeds {arguments.seed} and up",
        f"chance: colour {report.colour_match_shuffled:.2f}, motion {report.motion_match_shuffled:.2f} (prompts shuffled)",
    ]
    return make_report("samplers", rows, notes)


def rows_of(contestant: Contestant, report: Report, seconds: float, distance: float) -> list[Row]:
    """What was found of one sampler."""
    rows = [
        Row(f"{contestant.name}: colour right", report.colour_match, "of 1"),
        Row(f"{contestant.name}: motion right", report.motion_match, "of 1"),
        Row(f"{contestant.name}: change between frames", report.frame_change, "of 255 levels"),
        Row(f"{contestant.name}: work for a clip", seconds, "processor s"),
    ]
    if not contestant.eta:  # with fresh noise it solves another equation
        rows.append(Row(f"{contestant.name}: distance from {EXACT.name}", distance, "of 255 levels"))
    return rows


def prompts(seed: int, count: int) -> list[Sticker]:
    """Stickers to ask for: every second one of a colour-shape pair held out from the demo's training, motions in turn."""
    rng = numpy_generator(seed, "sampler prompts")
    kinds = [all_stickers(held_out=held_out) for held_out in (True, False)]
    chosen = []
    for number in range(count):
        motion = MOTIONS[number // 2 % len(MOTIONS)]
        fitting = [sticker for sticker in kinds[number % 2] if sticker.motion == motion]
        chosen.append(fitting[int(rng.integers(len(fitting)))])
    return chosen


def draw(
    pipeline: RDTFPipeline, contestant: Contestant, stickers: Sequence[Sticker], arguments: argparse.Namespace
) -> tuple[np.ndarray, float]:
    """Clips uint8 (N, F, H, W, 3) from text alone, and the processor seconds they took together."""
    made = []
    started = time.process_time()
    for first in range(0, len(stickers), arguments.batch):
        captions = [sticker.caption for sticker in stickers[first : first + arguments.batch]]
        sampler, steps, eta = contestant
        made.append(pipeline(captions, sampler=sampler, num_inference_steps=steps, eta=eta, seeds=arguments.seed + first).frames)
    return np.concatenate(made), time.process_time() - started
