"""The command's arguments as an order: which clips, where to, with what. All of it is checked before the model is loaded."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rdtf_ds.errors import UserError
from rdtf_ds.generation.grids import grid, parse_axes
from rdtf_ds.generation.jobs import Job, batches, check_jobs, refuse
from rdtf_ds.generation.loading import identity_of, load_pipeline
from rdtf_ds.generation.making import find_made, make_clips, metadata_of
from rdtf_ds.generation.model_outline import ModelOutline
from rdtf_ds.generation.prompts import is_frame_number, read_prompts, slug
from rdtf_ds.generation.sheets import MOST_CLIPS, write_sheets
from rdtf_ds.models.devices import choose_device

SUFFIXES = (".gif", ".webp", ".png", ".apng", ".mp4", ".webm")
SHEET = "contact_sheet"
_MOST_CLIPS = 100_000  # of one prompt; their names and seeds are held in memory
_LARGEST_SIDE = 4096  # pixels of an enlarged clip; beyond, minutes and gigabytes go into a file that no viewer plays
_SETTINGS = ("frames", "steps", "sampler", "eta", "text_scale", "image_scale")


@dataclass
class Order:
    """What was asked for, once it is known to be possible.

    Attributes:
        model: folder of the exported model.
        jobs: the clips.
        options: of `make_clips`, but for the pipeline, the jobs and the folder.
        sheet: where sheets go, without their suffixes; None for none. ``columns``: of the playing one.
        done: clips that are there so far.
    """

    model: Path
    jobs: list[Job]
    folder: Path
    options: dict[str, Any]
    device: str
    dtype: str
    offload: bool = False
    sheet: Path | None = None
    columns: int | None = None
    done: int = field(default=0, init=False)

    def fill(self) -> dict[str, object]:
        """Load the model, make what is missing, write the sheets; returns what the command reports."""
        started = time.perf_counter()
        pipeline = load_pipeline(self.model, self.device, self.dtype, self.offload)
        calls = sum(1 for _ in batches(self.jobs, self.options["batch"]))
        # Either steps or clips are counted on the screen.
        pipeline.set_progress_bar_config(disable=calls > 1)  # type: ignore[no-untyped-call]
        with tqdm(total=len(self.jobs), unit="clip", disable=calls == 1) as bar:

            def count(job: Job, path: Path, made: bool) -> None:
                """A clip is there, made now or before; ``done`` says so even if a later one fails."""
                self.done += 1
                bar.update()

            made = make_clips(pipeline, self.jobs, self.folder, on_clip=count, **self.options)
        files = [self.folder / f"{job.name}{self.options['suffix']}" for job in self.jobs]
        sheets = [] if self.sheet is None else write_sheets(self.jobs, files, self.sheet, self.columns)
        prompts = list(dict.fromkeys(job.prompt for job in self.jobs))
        frames = sorted({job.frames or pipeline.config.max_frames for job in self.jobs})
        return {
            "files": [str(file) for file in files],
            "made": len(made.made),
            "kept": len(made.kept),
            "sheets": [str(sheet) for sheet in sheets],
            "shown": min(len(files), MOST_CLIPS),
            "seeds": [job.seed for job in self.jobs],
            "prompt": prompts[0] if len(prompts) == 1 else prompts,
            "frames": frames[0] if len(frames) == 1 else frames,
            "device": self.device,
            "seconds": time.perf_counter() - started,
        }


def take_order(arguments: argparse.Namespace) -> Order:
    """Checks everything that can be checked without loading weights.

    Raises:
        UserError: all that is wrong with the arguments; then all that is wrong with prompts, pictures, numbers and files.
    """
    _check_arguments(arguments)
    problems: list[str] = []
    outline = _try(problems, lambda: ModelOutline(arguments.model))
    device, dtype = _try(problems, lambda: _device(arguments.device, arguments.dtype, arguments.offload)) or ("", "")
    ordered = _try(problems, lambda: _jobs(arguments))
    if outline is not None and arguments.scale > (most := max(1, _LARGEST_SIDE // outline.config.image_size)):
        wide = arguments.scale * outline.config.image_size
        problems.append(f"--scale {arguments.scale} makes clips of {wide} pixels a side; with this model give at most {most}.")
    refuse(problems)
    assert outline is not None and ordered is not None
    jobs, told = ordered
    check_jobs(jobs, outline, arguments.fit, told)
    if arguments.out_dir is not None:
        taken = [job.name for job in jobs if job.name.casefold() == SHEET]
        refuse([f"{told.get(name, 'a clip')}: the name '{name}' is that of the sheets in --out_dir; give another." for name in taken])
    folder = arguments.out_dir if arguments.out is None else arguments.out.parent
    options = {
        "batch": arguments.batch,
        "suffix": arguments.suffix if arguments.out is None else arguments.out.suffix,
        "identity": identity_of(arguments.model, dtype),
        "keep_given": not arguments.redraw_frames,
        "fit": arguments.fit,
        "scale": arguments.scale,
        "overwrite": arguments.overwrite or arguments.out is not None,
    }
    named = {key: options[key] for key in ("keep_given", "fit", "scale")}
    notes = {job.name: metadata_of(outline, job, options["identity"], **named) for job in jobs}
    find_made(notes, folder, options["suffix"], options["overwrite"])
    sheet = None
    if arguments.sheet or arguments.grid:
        sheet = folder / (SHEET if arguments.out is None else f"{arguments.out.stem}_sheet")
    columns = math.prod(len(values) for values in parse_axes(arguments.grid).values()) if arguments.grid else None
    return Order(arguments.model, jobs, folder, options, device, dtype, arguments.offload, sheet, columns)


def _try(problems: list[str], work: Any) -> Any:
    """What ``work`` returns, or None and its error among the problems."""
    try:
        return work()
    except UserError as error:
        problems.append(str(error))
        return None


def _check_arguments(arguments: argparse.Namespace) -> None:
    """One argument against another, and those that need no file to be looked at."""
    problems: list[str] = []
    if arguments.model is None:
        problems.append("--model is missing: the folder of an exported model, made by tools/export_fp16.py.")
    if (arguments.out is None) == (arguments.out_dir is None):
        problems.append("give --out FILE for one prompt, or --out_dir FOLDER for many: one of the two.")
    if arguments.prompts is not None and arguments.prompt.strip():
        problems.append("--prompt and --prompts are both given; give one of them.")
    if arguments.prompts is None and not arguments.prompt.strip() and not arguments.frame:
        problems.append("neither --prompt nor --frame is given, so there is nothing to go by. Give a caption, pictures, or both.")
    for name in ("prompts", "grid"):
        if getattr(arguments, name) and arguments.out is not None:
            problems.append(f"--{name} makes many clips: give --out_dir FOLDER in place of --out.")
    if arguments.seeds is not None and (arguments.seed is not None or arguments.count != 1):
        problems.append("--seeds stands in place of --seed and --count; give the one or the others.")
    if arguments.out is not None and arguments.out.suffix.lower() not in SUFFIXES:
        problems.append(f"--out {arguments.out}: the suffix is not one of {' '.join(SUFFIXES)}.")
    for name in ("count", "batch", "scale"):
        if getattr(arguments, name) < 1:
            problems.append(f"--{name} is {getattr(arguments, name)}; it must be at least 1.")
    if arguments.count > _MOST_CLIPS:
        problems.append(f"--count is {arguments.count}; give at most {_MOST_CLIPS}, and the rest in further calls with another --seed.")
    refuse(problems)


def _jobs(arguments: argparse.Namespace) -> tuple[list[Job], dict[str, str]]:
    """The jobs, and where those of a file come from."""
    problems: list[str] = []
    axes = _try(problems, lambda: parse_axes(arguments.grid)) or {}
    seeds = _try(problems, lambda: _seeds(arguments)) or []
    common = {name: getattr(arguments, name) for name in _SETTINGS}
    common["pictures"] = _try(problems, lambda: _pictures(arguments.frame)) or {}
    common["durations_ms"] = _try(problems, lambda: _durations(arguments.duration_ms))
    problems += [f"--{name} is given, and --grid varies it; leave one of them out." for name in axes if common[name] is not None]
    refuse(problems)
    if arguments.prompts is not None:
        several = arguments.seeds is not None or arguments.count > 1
        settled = {name: f"--grid varies {name}" for name in axes} | ({"seed": "--seeds or --count gives seeds to all"} if several else {})
        jobs, told = read_prompts(arguments.prompts, common | {"seed": seeds[0]}, settled)
        made = grid(jobs, seeds if several else (), axes)
        each = len(made) // len(jobs)
        return made, {job.name: told[jobs[number // each].name] for number, job in enumerate(made)}
    name = arguments.out.stem if arguments.out is not None else slug(arguments.prompt)
    made = grid([Job(name, arguments.prompt, **common)], seeds, axes)
    if arguments.out is not None and len(made) > 1:
        made = [replace(job, name=f"{name}_{number}") for number, job in enumerate(made)]
    return made, {}


def _seeds(arguments: argparse.Namespace) -> list[int]:
    """Of each prompt."""
    if arguments.seeds is not None:
        return _whole_numbers("--seeds", arguments.seeds)
    first = arguments.seed or 0
    return list(range(first, first + arguments.count))


def _durations(text: str | None) -> int | list[int] | None:
    if text is None:
        return None
    numbers = _whole_numbers("--duration_ms", text)
    return numbers if len(numbers) > 1 else numbers[0]


def _whole_numbers(flag: str, text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise UserError(f"{flag} {text}: write whole numbers with commas in between, such as 0,1,2.") from error


def _pictures(pairs: Sequence[str]) -> dict[int, Path]:
    """What was given as N=PICTURE."""
    pictures: dict[int, Path] = {}
    problems = []
    for pair in pairs:
        number, equals, path = pair.partition("=")
        if not equals or not is_frame_number(number.strip()) or not path:
            problems.append(f"--frame {pair}: write N=PICTURE, with N the frame's number, 0 for the first.")
        elif int(number) in pictures:
            problems.append(f"--frame {pair}: frame {int(number)} is given twice.")
        else:
            pictures[int(number)] = Path(path)
    refuse(problems)
    return pictures


def _device(device: str, dtype: str, offload: bool) -> tuple[str, str]:
    device, dtype = choose_device(device, dtype)
    if offload and device == "cpu":
        raise UserError("--offload keeps the GPU's memory free, but the clips are made on the CPU; leave it out.")
    return device, dtype
