"""One clip to make, as a value; which jobs make one batch; and what can be known to be wrong with them before a model is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rdtf_ds.clip_requests import check_text, clip_requests, frame_durations
from rdtf_ds.errors import UserError
from rdtf_ds.generation.pictures import as_frames, open_pictures
from rdtf_ds.pipeline import Settings

Picture = Path | np.ndarray | Image.Image

_LONGEST_NAME = 200  # bytes, which leaves room for a suffix on every file system
_MOST_TOLD = 20


@dataclass(frozen=True)
class Job:
    """One clip. None takes the model's default.

    Attributes:
        name: of the file, without its suffix.
        prompt: the caption, None or blank for none.
        pictures: visible frames by number, the first is 0: files, uint8 arrays (H, W, 3 or 4) or PIL images.
        seed: of the clip's noise.
        frames: how many, visible ones included.
        steps: of sampling.
        sampler: one of ``rdtf_ds.samplers.SAMPLERS``.
        eta: DDIM's η, 0 to 1.
        text_scale, image_scale: guidance by the caption and by the visible frames.
        durations_ms: milliseconds each frame is shown: one number, or one for each frame.
    """

    name: str
    prompt: str | None = None
    pictures: Mapping[int, Picture] = field(default_factory=dict)
    seed: int = 0
    frames: int | None = None
    steps: int | None = None
    sampler: str | None = None
    eta: float | None = None
    text_scale: float | None = None
    image_scale: float | None = None
    durations_ms: int | Sequence[int] | None = None

    @property
    def captioned(self) -> bool:
        """Whether there is a caption."""
        return bool(self.prompt and self.prompt.strip())


def settings_of(model: Any, job: Job) -> Settings:
    """What the pipeline will go by; ``model`` is a pipeline, or its `ModelOutline`.

    Raises:
        UserError: a value the model or the sampler has no use for.
    """
    try:
        settings: Settings = model.settings(job.frames, job.steps, job.sampler, job.eta, job.text_scale, job.image_scale)
    except OverflowError as error:
        raise UserError("eta, text_scale or image_scale is too large for any float; choose a number, such as 7.5.") from error
    return settings


def durations_of(model: Any, job: Job) -> list[int]:
    """Milliseconds each frame of the job's clip is shown.

    Raises:
        UserError: durations that do not fit the clip.
    """
    frames = model.config.max_frames if job.frames is None else job.frames
    return frame_durations(model.config.frame_ms if job.durations_ms is None else job.durations_ms, frames)


def batches(jobs: Sequence[Job], size: int) -> Iterator[list[Job]]:
    """Jobs that one call of the pipeline can make, at most ``size`` in each, those of the first job's kind first.

    They agree in everything but caption, pictures, seed and durations, and all or none have a caption, and pictures: else those without
    would be taken through passes of guidance that they have no use for. The list alone decides, not what is made already.
    """
    groups: dict[tuple[Any, ...], list[Job]] = {}
    for job in jobs:
        groups.setdefault(_call_of(job), []).append(job)
    for group in groups.values():
        yield from (group[first : first + size] for first in range(0, len(group), size))


def _call_of(job: Job) -> tuple[Any, ...]:
    kinds = (job.captioned, bool(job.pictures))
    return job.frames, job.steps, job.sampler, job.eta, job.text_scale, job.image_scale, *kinds


def check_jobs(jobs: Sequence[Job], model: Any, fit: bool = False, told: Mapping[str, str] | None = None) -> None:
    """Look at everything about jobs that can be wrong: names, numbers, pictures (each file is opened).

    Args:
        model: the pipeline, or its `ModelOutline`.
        fit: pictures that are not the model's square, or have transparent pixels, are fitted.
        told: where a job comes from, by its name, for the messages: ``{"a": "prompts.txt, line 3"}``.

    Raises:
        UserError: all that is wrong, together.
    """
    problems: list[str] = []
    seen: dict[str, str] = {}
    for job in jobs:
        where = (told or {}).get(job.name, "") or (f"clip '{job.name}'" if len(jobs) > 1 else "")
        problems += [f"{where}: {problem}" if where else problem for problem in _problems(job, model, fit)]
        other = seen.get(job.name.casefold())  # some file systems know no case
        if other is not None:
            problems.append(f"{where}: the name '{job.name}' is taken by another clip" + (f", '{other}'." if other != job.name else "."))
        seen.setdefault(job.name.casefold(), job.name)
    refuse(problems)


def refuse(problems: Sequence[str]) -> None:
    """Raises UserError with all problems, if there are any: one as it is, several as a list."""
    problems = list(dict.fromkeys(problems))
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        more = [f"  … and {len(problems) - _MOST_TOLD} more"] if len(problems) > _MOST_TOLD else []
        raise UserError("\n".join([f"{len(problems)} things are wrong:", *(f"  {problem}" for problem in problems[:_MOST_TOLD]), *more]))


def _problems(job: Job, model: Any, fit: bool) -> Iterator[str]:
    if flaw := _flaw_of_name(job.name):
        yield flaw
    if isinstance(job.seed, bool) or not isinstance(job.seed, int):
        yield f"the seed is {job.seed!r}; give a whole number."
    try:
        settings = settings_of(model, job)
    except UserError as error:
        yield str(error)
        return
    for check in (lambda: durations_of(model, job), lambda: _check_request(job, model, settings.num_frames, fit)):
        try:
            check()
        except UserError as error:
            yield str(error)


def _check_request(job: Job, model: Any, num_frames: int, fit: bool) -> None:
    opened = open_pictures(job.pictures)
    (request,) = clip_requests(job.prompt, opened, [0], None, num_frames)
    as_frames(request.pictures, model.config, fit)


def _flaw_of_name(name: str) -> str | None:
    if re.search(r'^$|^[.\s-]|[\x00-\x1f\x7f/\\:*?"<>|]|[.\s]$', name):
        return f"the name {name!r} is no name for a file; use letters, digits, '-', '_', and no '/' or leading '.'."
    try:
        check_text("the name", name)
    except UserError as error:
        return str(error)
    if len(name.encode("utf-8")) > _LONGEST_NAME:
        return f"the name {name[:40]!r}… is longer than {_LONGEST_NAME} bytes; shorten it."
    return None
