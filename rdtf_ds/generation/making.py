"""Makes the clips of a list of jobs into a folder, each file with its metadata, and goes on where it was interrupted.

What a clip's bytes are depends on the list and the size of a batch alone, never on where an earlier run stopped: a batch of which anything
is missing is made whole.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rdtf_ds.clip_requests import clip_requests
from rdtf_ds.data.clips.metadata import read_metadata
from rdtf_ds.data.clips.writing import write_clip
from rdtf_ds.errors import UserError
from rdtf_ds.generation.jobs import Job, batches, check_jobs, durations_of, refuse, settings_of
from rdtf_ds.generation.pictures import as_frames, open_pictures, picture_hash
from rdtf_ds.wording import counted

OnClip = Callable[[Job, Path, bool], None]
_SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True)
class Made:
    """What a folder holds now: files that were ``made``, and those that were there already and ``kept``, each in the jobs' order."""

    made: tuple[Path, ...] = ()
    kept: tuple[Path, ...] = ()


def make_clips(
    pipeline: Any,
    jobs: Sequence[Job],
    folder: Path,
    *,
    batch: int,
    suffix: str,
    identity: Mapping[str, Any],
    keep_given: bool = True,
    fit: bool = False,
    scale: int = 1,
    overwrite: bool = False,
    on_clip: OnClip | None = None,
) -> Made:
    """Make every job's clip that is not in the folder yet.

    Args:
        pipeline: RDTFPipeline, or what is called like one and has its ``config`` and ``settings``.
        jobs: names are distinct.
        folder: made if it is missing.
        batch: clips made at once.
        suffix: of the files, with its dot; see `write_clip`.
        identity: what else the metadata say, such as the model's hash. A clip that is there is kept only if it was made with the same.
        keep_given: given frames stand in the clip as they were given, rather than as the model draws them.
        fit: pictures that are not the model's square, or have transparent pixels, are fitted.
        scale: each pixel becomes so many times as wide and high.
        overwrite: clips that are there but of other settings are made again, rather than refused.
        on_clip: called with the job, its file, and whether it was made now, when it is there.

    Raises:
        UserError: a job that cannot be made, a clip of other settings that is there, a file that cannot be written; or what the pipeline
            raises. Clips that were made by then stay.
    """
    check_jobs(jobs, pipeline, fit)
    notes = {job.name: metadata_of(pipeline, job, identity, keep_given=keep_given, fit=fit, scale=scale) for job in jobs}
    there = find_made(notes, folder, suffix, overwrite)
    clear_leftovers(notes, folder, suffix)
    for group in batches(jobs, batch):
        clips = _make(pipeline, group, keep_given, fit) if any(job.name not in there for job in group) else ()
        for number, job in enumerate(group):
            path = folder / f"{job.name}{suffix}"
            if job.name not in there:
                clip = clips[number].repeat(scale, axis=1).repeat(scale, axis=2)
                _write(clip, path, durations_of(pipeline, job), notes[job.name])
            if on_clip is not None:
                on_clip(job, path, job.name not in there)
    paths = {job.name: folder / f"{job.name}{suffix}" for job in jobs}
    made = tuple(path for name, path in paths.items() if name not in there)
    return Made(made, tuple(path for name, path in paths.items() if name in there))


def metadata_of(
    model: Any, job: Job, identity: Mapping[str, Any], *, keep_given: bool = True, fit: bool = False, scale: int = 1
) -> dict[str, Any]:
    """What a clip's file says of itself: every value that it depends on, the model's defaults filled in.

    ``visible`` has the SHA-256 of each given frame's RGB pixels as the model sees it, see `picture_hash`; ``eta`` is null for samplers
    without one. ``model`` is the pipeline, or its `ModelOutline`.
    """
    settings = settings_of(model, job)
    (request,) = clip_requests(job.prompt, open_pictures(job.pictures), [job.seed], None, settings.num_frames)
    visible = as_frames(request.pictures, model.config, fit)
    note = {
        "prompt": request.prompt,
        "seed": job.seed,
        "frames": settings.num_frames,
        "steps": settings.steps,
        "sampler": settings.sampler,
        "eta": None if settings.eta is None else float(settings.eta),
        "text_scale": float(settings.text_scale),
        "image_scale": float(settings.image_scale),
        "visible": {str(number): picture_hash(frame) for number, frame in visible.items()},
        "keep_given": keep_given,
        "scale": scale,
        "durations_ms": durations_of(model, job),
        **identity,
    }
    plain: dict[str, Any] = json.loads(json.dumps(note))  # as it will be read back
    return plain


def find_made(notes: Mapping[str, Mapping[str, Any]], folder: Path, suffix: str, overwrite: bool = False) -> set[str]:
    """Which clips are in the folder already, with the metadata that they should have.

    Args:
        notes: metadata by the clips' names.
        overwrite: others under these names do not matter.

    Raises:
        UserError: they do, and there are some; folders have their names; or the folder is none and cannot become one.
    """
    files = _list(folder)
    there, problems = set(), []
    for name, note in notes.items():
        path = folder / f"{name}{suffix}"
        if path.name not in files:
            continue
        if path.is_dir():
            problems.append(f"'{path}' is a folder, so no clip can be written there; give another name.")
            continue
        flaw = _difference(path, note)
        if flaw is None:
            there.add(name)
        elif not overwrite:
            problems.append(f"{flaw} Give another name or folder, or --overwrite to make it again.")
    refuse(problems)
    return there


def clear_leftovers(names: Collection[str], folder: Path, suffix: str) -> None:
    """Take away what a killed run left half-written of these clips."""
    pattern = re.compile(rf"\.(.+{re.escape(suffix)})\.(\d+)(?:\.[0-9a-f]+)?\.tmp")  # as `write_atomically` names them
    for file in _list(folder):
        match = pattern.fullmatch(file)
        if match and match[1][: -len(suffix)] in names and not Path(f"/proc/{match[2]}").exists():
            (folder / file).unlink(missing_ok=True)


def _list(folder: Path) -> set[str]:
    for place in (folder, *folder.parents):
        if place.exists():
            if not place.is_dir():
                raise UserError(f"'{place}' is a file, so no clips can be put into '{folder}'; choose another folder.")
            if not os.access(place, os.W_OK | os.X_OK):
                raise UserError(f"'{place}' cannot be written to; choose another folder, or see to its permissions.")
            break
    return set(os.listdir(folder)) if folder.exists() else set()


def _difference(path: Path, note: Mapping[str, Any]) -> str | None:
    """None if a file has just this metadata."""
    try:
        found = read_metadata(path)
    except UserError as error:
        return f"{error}"
    if found is None:
        return f"'{path}' is there already, and says nothing of how it was made."
    keys = [key for key in sorted(found.keys() | note.keys()) if found.get(key) != note.get(key)]
    if not keys:
        return None
    told = "; ".join(f"{key} {_short(found.get(key))}, now {_short(note.get(key))}" for key in keys)
    return f"'{path}' is there already, made with other settings: {told}."


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _make(pipeline: Any, group: Sequence[Job], keep_given: bool, fit: bool) -> np.ndarray:
    """One call: uint8 (B, F, H, W, 3)."""
    first = group[0]
    try:
        clips: np.ndarray = pipeline(
            [job.prompt for job in group],
            [open_pictures(job.pictures) for job in group],
            num_frames=first.frames,
            num_inference_steps=first.steps,
            sampler=first.sampler,
            eta=first.eta,
            text_scale=first.text_scale,
            image_scale=first.image_scale,
            seeds=[job.seed for job in group],
            keep_given_frames=keep_given,
            fit=fit,
        ).frames
    except torch.OutOfMemoryError as error:
        less = "fewer at once (--batch)" if len(group) > 1 else "float16 (--dtype), or in generate.py --offload"
        told = f"the GPU's memory does not do for {counted(len(group), 'clip')} at once. Take {less}. Clips made before are there."
        raise UserError(told) from error
    return clips


def _write(clip: np.ndarray, path: Path, durations_ms: Sequence[int], note: Mapping[str, Any]) -> None:
    try:
        write_clip(clip, path, durations_ms, note)
    except OSError as error:
        raise UserError(f"'{path}' cannot be written: {error.strerror or error}. Clips made before it are there.") from error
