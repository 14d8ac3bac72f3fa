"""One evaluation from beginning to end: the test set, its clips, the figures, the files that tell them.

``EVAL/settings.json`` says what the folder's clips are made with, before there are any. Once there are, another evaluation is refused
there, and the same one goes on.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rdtf_ds import __version__
from rdtf_ds.data.clips.writing import write_atomically
from rdtf_ds.data.indexing.index import ClipIndex
from rdtf_ds.errors import UserError
from rdtf_ds.evaluation.clip_making import REAL, SUFFIX, Making, make_missing, read_clips, told_unless_written, write_real
from rdtf_ds.evaluation.measures import Instruments, Measures, told_if_full
from rdtf_ds.evaluation.page import render, view_clips
from rdtf_ds.evaluation.protocol import TASKS, Task, differences
from rdtf_ds.evaluation.tables import Report, Table, markdown
from rdtf_ds.evaluation.test_set import RealClips
from rdtf_ds.exported_model import model_hash
from rdtf_ds.generation.model_outline import ModelOutline

SETTINGS, JSON, MARKDOWN, PAGE = "settings.json", "tables.json", "tables.md", "page.html"


@dataclass(frozen=True)
class Wishes:
    """How the clips are to be made; None takes the model's own.

    Attributes:
        seed: Of the test set and the clips.
        split: As it was asked for.
    """

    seed: int
    split: str
    frames: int
    batch: int
    keep_given: bool
    device: str
    dtype: str
    threads: int
    steps: int | None = None
    sampler: str | None = None
    eta: float | None = None
    text_scale: float | None = None
    image_scale: float | None = None


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make the folder, and keep other evaluations out of it for so long.

    Raises:
        UserError: It cannot be made or written, or one is running there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115  it is held for as long as the context
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror}). Name a folder that you may write to.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"--out {folder}: another evaluation is writing there. Wait for it, or name another folder.") from error
        yield


def plan(folder: Path, model: Path, tasks: tuple[Task, ...], clips: RealClips, wishes: Wishes) -> tuple[Making, dict[str, Any]]:
    """What is to be made, and the settings that say so; they are written down unless they are there already.

    Raises:
        UserError: As `settle`, or the model cannot make what is asked for.
    """
    outline: Any = ModelOutline(model)
    asked = {name: getattr(wishes, name) for name in ("steps", "sampler", "eta", "text_scale", "image_scale")}
    sampling = outline.settings(wishes.frames, *asked.values())
    settings = {
        "rdtf_ds": __version__,
        "model": model_hash(model),
        "test set": clips.fingerprint,
        "split": wishes.split,
        "seed": wishes.seed,
        "frames": sampling.num_frames,
        "image size": outline.config.image_size,
        "given frames": "given frames stand as given" if wishes.keep_given else "given frames are redrawn by the model",
        **{name: getattr(sampling, name) for name in asked},
        "device": wishes.device,
        "dtype": wishes.dtype,
        "threads": wishes.threads,
        "batch": wishes.batch,
        "visible": {task.name: task.mask for task in tasks},
    }
    settle(folder, settings)
    making = Making(
        folder=folder,
        model=model,
        tasks=tasks,
        clips=clips.clips,
        side=outline.config.image_size,
        background=tuple(outline.config.background),
        device=wishes.device,
        dtype=wishes.dtype,
        threads=wishes.threads,
        batch=wishes.batch,
        keep_given=wishes.keep_given,
        sampling=asked,
        identity={name: settings[name] for name in ("model", "dtype", "rdtf_ds")},
    )
    return making, settings


def settle(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write down the settings of a folder's clips; tasks may join those that are there.

    Settings that no clip was made with bind nobody: those of a run that failed before its first, or of a task without any.

    Raises:
        UserError: It has clips of other settings, or of nobody knows which, or the file cannot be read or written.
    """
    path, asked = folder / SETTINGS, dict(settings)
    with_clips = {entry.name for entry in folder.iterdir() if entry.is_dir() and any(entry.glob(f"*{SUFFIX}"))}
    if path.is_file() and not with_clips.isdisjoint({REAL, *TASKS}):
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            masks = {name: mask for name, mask in kept["visible"].items() if name in with_clips}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"'{path}' cannot be read ({error}). Name another folder by --out, or remove this one.") from error
        common = {name: mask for name, mask in masks.items() if name in asked["visible"]}
        told = differences(kept | {"visible": common}, asked | {"visible": {name: asked["visible"][name] for name in common}})
        if told:
            raise UserError(f"--out {folder}: an evaluation of other settings is there ({'; '.join(told)}). Name another folder.")
        asked["visible"] = masks | asked["visible"]
    elif with_clips and not path.is_file():
        raise UserError(f"--out {folder}: clips are there, but no {SETTINGS} that says of which settings. Name another folder.")
    with told_unless_written(path):
        write_atomically(path, (json.dumps(asked, indent=1) + "\n").encode())


def evaluate(
    making: Making,
    settings: Mapping[str, Any],
    index: ClipIndex,
    clips: RealClips,
    instruments: Instruments,
    *,
    names: tuple[str, str],
    processes: int = 1,
    shown: int = 12,
    progress: Any = None,
) -> Report:
    """Make what is missing, measure it, and write ``tables.json``, ``tables.md`` and ``page.html``.

    Args:
        names: What people call the model and the data.
        processes: That make clips at once.
        shown: Clips on the page.
        progress: Called with (what, clips in all) at the start of each part; gives what is then called with numbers of clips done.

    Raises:
        UserError: As `make_missing`, or a clip that is there cannot be read, a file cannot be written, or the GPU is too full to measure.
    """
    told = progress or (lambda what, total: lambda count: None)
    started, before = time.perf_counter(), making.made()
    write_real(making, index, told("real clips", len(making.clips)))
    total = len(making.tasks) * len(making.clips)
    on_clips = told("made clips", total)
    on_clips(before)
    make_missing(making, processes, on_clips)
    made_at = time.perf_counter()
    torch.set_num_threads(making.threads)
    tables, variants = _measure(making, clips, instruments, told)
    timing = {
        "clips made": total - before,
        "clips kept": before,
        "processes": processes,
        "seconds making": round(made_at - started, 1),
        "seconds measuring": round(time.perf_counter() - made_at, 1),
    }
    report = Report(*names, clips, settings, tables, variants, instruments.missing(), timing)
    page = render(report, view_clips(making, shown))
    for name, text in ((JSON, report.json_text()), (MARKDOWN, markdown(report)), (PAGE, page)):
        path = making.folder / name
        with told_unless_written(path):
            write_atomically(path, text.encode("utf-8", "backslashreplace"))
    return report


@told_if_full()
def _measure(making: Making, clips: RealClips, instruments: Instruments, told: Any) -> tuple[list[Table], dict[str, str]]:
    """One process measures, with the clips in their order, so that the figures hang on nothing else."""
    captions = [clip.caption for clip in clips.clips] if clips.captioned else []
    done = told("measured sets", 1 + len(making.tasks))
    measures = Measures(instruments, lambda: read_clips(making, REAL), captions, making.tasks[0].frames)
    done(1)
    tables = []
    for task in making.tasks:
        tables.append(Table(task, measures.of(task, lambda name=task.name: read_clips(making, name))))  # type: ignore[misc]
        done(1)
    return tables, measures.variants()
