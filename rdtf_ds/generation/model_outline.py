"""What an exported model's files say of it, read in milliseconds: enough to check every job before gigabytes of weights are loaded."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers

from rdtf_ds.errors import UserError
from rdtf_ds.exported_model import check_model
from rdtf_ds.pipeline import RDTFPipeline


class ModelOutline:
    """The pipeline's ``config``, ``scheduler`` and ``settings``, of a folder whose weights are not loaded.

    Raises:
        UserError: no exported model, or one of which something is missing or damaged.
    """

    settings = RDTFPipeline.settings

    def __init__(self, folder: str | Path) -> None:
        check_model(folder)
        defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(RDTFPipeline.__init__).parameters.items()
            if parameter.default is not inspect.Parameter.empty
        }
        index = Path(folder) / "model_index.json"
        named = json.loads(index.read_text(encoding="utf-8"))
        for name in defaults.keys() & named.keys():
            if not _alike(named[name], defaults[name]):
                raise UserError(f"'{index}' has {name} {named[name]!r}, where {defaults[name]!r} could stand. Export the model once more.")
        self.config = SimpleNamespace(**(defaults | {name: value for name, value in named.items() if name in defaults}))
        self.scheduler = _scheduler(Path(folder) / "scheduler" / "scheduler_config.json")


def _scheduler(path: Path) -> Any:
    config = json.loads(path.read_text(encoding="utf-8"))
    name = str(config.get("_class_name"))
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise UserError(f"'{path}' names the scheduler {name!r}, which diffusers {diffusers.__version__} does not have.")
    try:
        return kind.from_config(config)
    except Exception as error:  # whatever torch and diffusers say of numbers that make no schedule
        first_line = str(error).partition("\n")[0]
        raise UserError(f"'{path}' describes no {name}: {first_line}. Export the model once more.") from error


def _alike(value: Any, default: Any) -> bool:
    """Whether a value may stand for a default: a number, for whole ones one above 0; or as many whole numbers."""
    if isinstance(default, tuple):
        return isinstance(value, list) and len(value) == len(default) and all(isinstance(part, int) for part in value)
    if isinstance(default, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
