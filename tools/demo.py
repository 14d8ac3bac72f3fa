"""The whole job in small, on a CPU: make stickers, train with two ranks, export, draw clips from text alone, judge the GIF files.

Everything lands under runs/demo/ (``--out``): the run (run/), the exported model (model/), GIFs (gifs/) and contact_sheet.png.
Run it again to go on where it stopped, or to judge other clips of the same model (``--noise_seed``); ``--fresh`` starts over.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from rdtf_ds.data.clips.clip import ClipError, DecodeLimits  # noqa: E402
from rdtf_ds.data.clips.decoding import decode_clip, probe_clip  # noqa: E402
from rdtf_ds.data.clips.writing import contact_sheet, write_clip  # noqa: E402
from rdtf_ds.data.synthetic import MOTIONS, Sticker, all_stickers, on_white, render  # noqa: E402
from rdtf_ds.diffusion.masks import evenly_spaced  # noqa: E402
from rdtf_ds.errors import UserError  # noqa: E402
from rdtf_ds.evaluation.sticker_match import Report, judge  # noqa: E402
from rdtf_ds.pipeline import RDTFPipeline  # noqa: E402
from rdtf_ds.seeding import numpy_generator  # noqa: E402

CLIPS = 48  # from text alone, half of them of colour x shape pairs that training never showed
BATCH = 12
ENLARGED = 6  # a 24-pixel sticker is hard to look at
FRAMES = 8
SHEET_ROWS = 16
FRAME_MS = 120
LIMITS = DecodeLimits()


def main() -> int:
    """Exit code 0; 2 with one paragraph when something cannot be done here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "ds_configs" / "demo_cpu.json")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--max_steps", type=int, help="train less, to see that everything works; the clips will be poor")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--noise_seed", type=int, help="draw the clips of the same prompts from other noise; training is as it was")
    parser.add_argument("--fresh", action="store_true", help="remove what an earlier demo left")
    arguments = parser.parse_args()
    try:
        report = run_demo(arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join([*report.lines(), *validation_lines(arguments.out / "run" / "validation.jsonl")]))
    print(f"look at {arguments.out / 'contact_sheet.png'}, {arguments.out / 'gifs'} and: tensorboard --logdir {arguments.out / 'run'}")
    return 0


def run_demo(arguments: argparse.Namespace) -> Report:
    """Train, export, generate, judge; each stage says how long it took."""
    out: Path = arguments.out
    if arguments.fresh:
        shutil.rmtree(out, ignore_errors=True)
    for made in ("model", "gifs"):  # of an earlier demo: the run goes on, what was made from it is made again
        shutil.rmtree(out / made, ignore_errors=True)
    with stage("training"):
        train(arguments)
    with stage("exporting"):
        _run("exporting", [sys.executable, str(ROOT / "tools" / "export_fp16.py"), str(out / "run"), str(out / "model")])
    with stage(f"drawing {CLIPS} clips from text alone, and one of each other task"):
        torch.manual_seed(arguments.seed)
        pipeline = RDTFPipeline.from_pretrained(out / "model", torch_dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=not sys.stderr.isatty())
        noise_seed = arguments.seed if arguments.noise_seed is None else arguments.noise_seed
        asked = draw_text_clips(pipeline, out / "gifs", prompts(arguments.seed), noise_seed)
        draw_other_tasks(pipeline, out / "gifs")
    return report_on(asked, out)


def train(arguments: argparse.Namespace) -> None:
    """One launch of the training command, as a person would type it.

    Raises:
        UserError: the launch failed; its own message stands above.
    """
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [str(launcher), "--num_gpus", str(arguments.ranks), str(ROOT / "rdtf_ds" / "train.py")]
    command += ["--deepspeed_config", str(arguments.config), "--output_dir", str(arguments.out / "run")]
    command += ["--seed", str(arguments.seed)]
    if arguments.max_steps:
        command += ["--max_steps", str(arguments.max_steps)]
    _run("training", command)


def prompts(seed: int) -> list[Sticker]:
    """What the clips are asked to show: half held-out pairs, half trained ones, motions in equal numbers."""
    rng = numpy_generator(seed, "demo prompts")
    chosen = []
    for held_out in (True, False):
        stickers = all_stickers(held_out=held_out)
        by_motion = [[sticker for sticker in stickers if sticker.motion == motion] for motion in MOTIONS]
        for group in by_motion:
            chosen += [group[i] for i in rng.permutation(len(group))[: CLIPS // 2 // len(MOTIONS)]]
    return chosen


def draw_text_clips(pipeline: RDTFPipeline, folder: Path, stickers: list[Sticker], noise_seed: int) -> list[tuple[Sticker, Path]]:
    """Writes one GIF for each sticker, drawn from its caption; returns what was asked of which file."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = []
    for first in range(0, len(stickers), BATCH):
        batch = stickers[first : first + BATCH]
        clips = pipeline([sticker.caption for sticker in batch], num_frames=FRAMES, seeds=noise_seed + first).frames
        for i, (sticker, clip) in enumerate(zip(batch, clips, strict=True), start=first):
            kind = "held-out" if sticker.held_out else "trained"
            path = folder / f"{i:02d} {kind} {sticker.caption}.gif"
            write_clip(enlarged(clip), path, FRAME_MS)
            asked.append((sticker, path))
    return asked


def draw_other_tasks(pipeline: RDTFPipeline, folder: Path) -> None:
    """One GIF each of picture + text, prediction and interpolation, on a sticker of a held-out pair."""
    sticker = all_stickers(held_out=True)[0]
    size = pipeline.config.image_size
    real = on_white(render(sticker, FRAMES, size, numpy_generator(0, "demo picture")))
    tasks = {"picture and text": [0], "prediction": [0, 1, 2], "interpolation": [0, FRAMES - 1]}
    visible = [{number: real[number] for number in numbers} for numbers in tasks.values()]
    clips = pipeline([sticker.caption] * len(tasks), visible, num_frames=FRAMES, seeds=0).frames
    for task, clip in zip(tasks, clips, strict=True):
        write_clip(enlarged(clip), folder / f"{task} - {sticker.caption}.gif", FRAME_MS)
    write_clip(enlarged(real), folder / f"the real one - {sticker.caption}.gif", FRAME_MS)


def report_on(asked: list[tuple[Sticker, Path]], out: Path) -> Report:
    """Judges the GIF files against their prompts and the training clips' motion; makes the contact sheet."""
    size = ENLARGED * decode_size(asked[0][1])
    clips = [(sticker, decode_clip(path, size // ENLARGED, (255, 255, 255), LIMITS)) for sticker, path in asked]
    shown = clips[:: max(1, len(clips) // SHEET_ROWS)]
    pictures = [clip.repeat(4, axis=1).repeat(4, axis=2) for _, clip in shown]
    contact_sheet(pictures, [sticker.caption for sticker, _ in shown], out / "contact_sheet.png")
    training = list(training_clips(out / "run" / "stickers", clips[0][1].shape[1], CLIPS))
    return judge(clips, training)


def validation_lines(log: Path) -> list[str]:
    """How much of training's time validation took, and how the loss on held-out stickers fell."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    measured = [(line["step"], line["losses"]["loss"]) for line in lines if line["losses"]]
    told = [f"validation while training: {lines[-1]['share']:.1%} of the time"] if lines else []
    if measured:
        (first, before), (last, after) = measured[0], measured[-1]
        told.append(f"loss on held-out stickers: {before:.3f} after {first} steps, {after:.3f} after {last}")
    return told


def decode_size(path: Path) -> int:
    """Side of a GIF in pixels before it was enlarged."""
    return probe_clip(path, LIMITS).width // ENLARGED


def training_clips(folder: Path, size: int, count: int) -> Iterator[np.ndarray]:
    """The first ``count`` training stickers of at least eight frames, eight of them evenly spaced."""
    found = 0
    for path in sorted(folder.iterdir()):
        if found == count:
            return
        try:
            frames = decode_clip(path, size, (255, 255, 255), LIMITS)
        except ClipError:  # metadata.jsonl is no clip
            continue
        if len(frames) >= FRAMES:
            found += 1
            yield frames[evenly_spaced(len(frames), FRAMES)]


def enlarged(clip: np.ndarray) -> np.ndarray:
    """Each pixel ENLARGED times as wide and high."""
    return clip.repeat(ENLARGED, axis=1).repeat(ENLARGED, axis=2)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Announces a stage and says how long it took."""
    started = time.perf_counter()
    print(f"{name} ...", flush=True)
    yield
    print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)


def _run(name: str, command: list[str]) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")  # unsaid, every process of DeepSpeed's warns that it chose this
    code = subprocess.run(command, env=environment).returncode
    if code:
        raise UserError(f"{name} ended with exit code {code}; what it said stands above. The command was: {' '.join(command)}")


if __name__ == "__main__":
    sys.exit(main())
