"""The shipped experiments, loaded with overrides, and the problems found in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from rdtf_ds.cross_checks import Problem
from rdtf_ds.experiment import ConfigError, Experiment, load_experiment

CONFIGS = Path(__file__).resolve().parents[1] / "ds_configs"
SHIPPED = ("v100", "v100_16gb", "full_cpu", "demo_cpu", "tiny_cpu")


def load(name: str = "tiny_cpu", *overrides: str, **options: object) -> Experiment:
    return load_experiment(CONFIGS / f"{name}.json", overrides, **{"require_data": False, **options})  # type: ignore[arg-type]


def problems(*overrides: str, name: str = "tiny_cpu", **options: object) -> dict[str, Problem]:
    with pytest.raises(ConfigError) as caught:
        load(name, *overrides, **options)
    found = {problem.path: problem for problem in caught.value.problems}
    assert len(found) == len(caught.value.problems), "one report a key"
    assert all(str(problem) in str(caught.value) for problem in caught.value.problems)
    return found
