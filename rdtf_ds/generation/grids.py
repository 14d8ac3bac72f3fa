"""Every combination: of prompts with seeds, and with values of settings to compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from rdtf_ds.errors import UserError
from rdtf_ds.generation.jobs import Job, refuse

AXES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "text_scale": ("text", float),
    "image_scale": ("image", float),
    "steps": ("steps", int),
    "eta": ("eta", float),
    "frames": ("frames", int),
    "sampler": ("", str),
}
"""What can be varied: the word for it in names, and how its values are read."""


def parse_axes(texts: Sequence[str]) -> dict[str, list[Any]]:
    """``["text_scale=1,4,7.5", "steps=25,50"]`` as values by name, in this order.

    Raises:
        UserError: all that cannot be read, together.
    """
    axes: dict[str, list[Any]] = {}
    problems = []
    for text in texts:
        name, _, values = text.partition("=")
        if name not in AXES or not values.strip():
            problems.append(f"--grid {text}: write NAME=VALUE,VALUE, with NAME one of {', '.join(AXES)}.")
        elif name in axes:
            problems.append(f"--grid {text}: {name} is varied twice; put all its values into one.")
        else:
            try:
                axes[name] = [AXES[name][1](value.strip()) for value in values.split(",")]
            except ValueError:
                example = "1,4,7.5" if AXES[name][1] is float else "25,50"
                problems.append(f"--grid {text}: the values of {name} are numbers, such as {example}.")
            else:
                if len(set(axes[name])) < len(axes[name]):
                    problems.append(f"--grid {text}: a value stands there twice.")
    refuse(problems)
    return axes


def grid(jobs: Sequence[Job], seeds: Sequence[int], axes: Mapping[str, Sequence[Any]]) -> list[Job]:
    """Each job with every seed and every combination of the axes' values; the last axis changes fastest.

    Names tell them apart: ``_s3`` where there are several seeds, and a word for each axis, as in ``star_s3_text4_steps25``. No seeds:
    each job keeps its own.

    Raises:
        UserError: a seed twice.
    """
    if len(set(seeds)) < len(seeds):
        raise UserError(f"the seeds {', '.join(map(str, seeds))} name one twice; every clip of it would be the same.")
    made = []
    for job in jobs:
        for seed in seeds or (job.seed,):
            for values in product(*axes.values()):
                chosen = dict(zip(axes, values, strict=True))
                words = [f"s{seed}"] if len(seeds) > 1 else []
                words += [f"{AXES[name][0]}{told(value)}" for name, value in chosen.items()]
                made.append(replace(job, name="_".join([job.name, *words]), seed=seed, **chosen))
    return made


def told(value: Any) -> str:
    """A value as people write it: 4, 7.5, dpm++."""
    return f"{value:g}" if isinstance(value, float) else str(value)
