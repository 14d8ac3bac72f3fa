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
        named = json.loads((Path(folder) / "model_index.json").read_text(encoding="utf-8"))
        self.config = SimpleNamespace(**(defaults | {name: value for name, value in named.items() if name in defaults}))
        self.scheduler = _scheduler(Path(folder) / "scheduler" / "scheduler_config.json")


def _scheduler(path: Path) -> Any:
    config = json.loads(path.read_text(encoding="utf-8"))
    name = str(config.get("_class_name"))
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise UserError(f"'{path}' names the scheduler {name!r}, which diffusers {diffusers.__version__} does not have.")
    return kind.from_config(config)
