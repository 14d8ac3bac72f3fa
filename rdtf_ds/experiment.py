"""From an experiment's JSON file and command line to one checked, frozen ``Experiment``.

DeepSpeed's keys stand at the top of the file, ours in its ``"rdtf"`` object. ``--set dotted.key=value`` reaches both. All problems are
reported together, each with its dotted key, the value given and what is allowed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rdtf_ds.config import RDTFSection
from rdtf_ds.config_parsing import assign, parse_value, read_json, take_refused, validated
from rdtf_ds.cross_checks import Problem, cross_problems, cross_warnings, divisors
from rdtf_ds.deepspeed_keys import DeepSpeedSection
from rdtf_ds.errors import UserError

Precision = Literal["fp32", "fp16", "bf16"]
RANK_QUANTUM = 192
"""A run may have as many ranks as divide this: its optimizer groups are padded so that those can share them in whole 8-bit blocks."""


class ExperimentError(UserError):
    """An experiment that does not fit itself or this machine: the same for all ranks."""

    everywhere = True


class ConfigError(ExperimentError):
    """An experiment that cannot run: ``problems`` holds every reason found."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        super().__init__(f"{source}: {count} in this experiment:\n" + "\n".join(f"  - {problem}" for problem in problems))


@dataclass(frozen=True)
class Experiment:
    """A checked experiment, the same on every machine and any number of GPUs."""

    rdtf: RDTFSection
    deepspeed: dict[str, Any]
    precision: Precision
    global_batch: int
    micro_batch: int
    warnings: tuple[str, ...] = ()

    def accumulation(self, world_size: int) -> int:
        """Micro-batches each of ``world_size`` GPUs works through in one optimizer step.

        Raises:
            UserError: the global batch or the optimizer's state cannot be split that way; names the GPU counts and micro-batches that can.
        """
        if world_size < 1:
            raise ExperimentError(f"{world_size} GPUs: at least one process is needed")
        each = self.micro_batch * world_size
        fits = self.global_batch % each == 0
        if fits and RANK_QUANTUM % world_size == 0:
            return self.global_batch // each
        worlds = ", ".join(str(world) for world in divisors(self.global_batch // self.micro_batch) if RANK_QUANTUM % world == 0)
        if fits:
            raise ExperimentError(
                f"{world_size} GPUs cannot share the optimizer's 8-bit state in whole blocks, so that checkpoints could not be moved to "
                f"another number of them. GPU counts that can and that fit train_batch_size = {self.global_batch}: {worlds}."
            )
        micros = ", ".join(map(str, divisors(self.global_batch // world_size))) if self.global_batch % world_size == 0 else "none"
        raise ExperimentError(
            f"train_batch_size = {self.global_batch} cannot be split over {world_size} GPUs with train_micro_batch_size_per_gpu = "
            f"{self.micro_batch}: it is no multiple of {each}. GPU counts that fit this micro-batch: {worlds}; micro-batches that fit "
            f"{world_size} GPUs: {micros}."
        )

    def deepspeed_config(self, world_size: int) -> dict[str, Any]:
        """A fresh dict for ``deepspeed.initialize(config=...)`` on ``world_size`` GPUs."""
        config = copy.deepcopy(self.deepspeed)
        config["gradient_accumulation_steps"] = self.accumulation(world_size)
        return config

    def resolved(self) -> dict[str, Any]:
        """The whole experiment, JSON-able, every default filled in; loading it again gives an equal experiment."""
        return {**copy.deepcopy(self.deepspeed), "rdtf": self.rdtf.model_dump(mode="json")}

    def check_device(self, cuda_available: bool, world_size: int, capability: tuple[int, int] | None = None) -> None:
        """Refuse a machine this experiment cannot run on, before anything is allocated.

        Args:
            cuda_available: whether torch sees a GPU.
            world_size: processes of the run.
            capability: compute capability of the GPU, such as (7, 0) for V100; None skips that check.

        Raises:
            UserError: fp16 without a GPU, bf16 on a GPU older than 8.0, or a batch that cannot be split.
        """
        self.accumulation(world_size)
        if self.precision == "fp16" and not cuda_available and not self.rdtf.verify_fp16_on_cpu:
            raise ExperimentError(
                "fp16.enabled = true, but torch sees no GPU here and fp16 training needs one. Run on a GPU machine (python "
                "tools/doctor.py says what is missing), or train in fp32 with --set fp16.enabled=false, or, to verify an fp16 experiment "
                "slowly on CPU, add --set rdtf.verify_fp16_on_cpu=true."
            )
        if self.precision == "bf16" and cuda_available and capability is not None and capability < (8, 0):
            raise ExperimentError(
                f"bf16.enabled = true, but this GPU is of compute capability {capability[0]}.{capability[1]} and bf16 needs 8.0. "
                "On V100 use --set bf16.enabled=false --set fp16.enabled=true."
            )


def load_experiment(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    data_dir: str | Path | None = None,
    output_dir: str | Path | None = None,
    max_steps: int | None = None,
    seed: int | None = None,
    require_data: bool = True,
) -> Experiment:
    """Read, override and check one experiment.

    Args:
        path: the JSON file.
        overrides: ``dotted.key=value`` texts; the value is JSON, or else a plain string. Later ones win.
        data_dir, output_dir, max_steps, seed: the command line's own options, stronger than ``overrides``.
        require_data: False for commands that never touch clips, such as the memory planner.

    Raises:
        ConfigError: with every problem found.
        UserError: the file is missing or no JSON object.
    """
    raw = read_json(Path(path))
    problems: list[Problem] = []
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator or not all(key.split(".")):
            problems.append(Problem(f"--set {text}", None, "write it as dotted.key=value, such as rdtf.max_steps=100"))
        else:
            problems += assign(raw, key, parse_value(value))
    for key, option in (("data.data_dir", data_dir), ("output_dir", output_dir), ("max_steps", max_steps), ("seed", seed)):
        if option is not None:
            problems += assign(raw, f"rdtf.{key}", str(option) if isinstance(option, Path) else option)
    given = bool(overrides) or any(option is not None for option in (data_dir, output_dir, max_steps, seed))
    return _check(raw, f"{path} with what the command line sets" if given else str(path), problems, require_data)


def json_schema() -> dict[str, Any]:
    """JSON schema of an experiment file, for editors."""
    ours = DeepSpeedSection.model_json_schema()
    rdtf = RDTFSection.model_json_schema()
    definitions = {**ours.pop("$defs", {}), **rdtf.pop("$defs", {}), "RDTFSection": rdtf}
    ours["properties"]["rdtf"] = {"$ref": "#/$defs/RDTFSection"}
    ours["properties"]["$schema"] = {"type": "string"}
    ours["required"] = [*ours["required"], "rdtf"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **ours, "title": "RDTF experiment", "$defs": definitions}


def _check(raw: dict[str, Any], source: str, problems: list[Problem], require_data: bool) -> Experiment:
    top = {key: value for key, value in raw.items() if key != "rdtf"}
    problems = problems + take_refused(top)
    bad: set[str] = {problem.path for problem in problems}
    if not isinstance(raw.get("rdtf"), dict):
        bad.add("rdtf")
        problems.append(Problem("rdtf", raw.get("rdtf"), 'an object is needed here; "rdtf": {} takes every default'))
    ours = raw["rdtf"] if isinstance(raw.get("rdtf"), dict) else {}
    deepspeed = validated(DeepSpeedSection, top, "", problems, bad)
    rdtf = validated(RDTFSection, ours, "rdtf.", problems, bad)
    if deepspeed is not None and rdtf is not None:
        crossed = cross_problems(deepspeed, rdtf, require_data=require_data)
        problems += [
            problem for problem in crossed if not any(_same(key, told) for key in (problem.path, *problem.involved) for told in bad)
        ]
    if problems or deepspeed is None or rdtf is None:
        raise ConfigError(source, problems)
    return Experiment(
        rdtf=rdtf,
        deepspeed=deepspeed.model_dump(mode="json", exclude_none=True),
        precision="fp16" if deepspeed.fp16.enabled else "bf16" if deepspeed.bf16.enabled else "fp32",
        global_batch=deepspeed.train_batch_size,
        micro_batch=deepspeed.train_micro_batch_size_per_gpu,
        warnings=tuple(map(str, cross_warnings(deepspeed, rdtf))),
    )


def _same(key: str, told: str) -> bool:
    """Whether a key a check read is, holds or lies in one that is reported already."""
    key = key.partition("[")[0]
    return key == told or key.startswith(told + ".") or told.startswith(key + ".")
