"""Text to checked sections: JSON, overrides by dotted key, and pydantic's errors in our words.

``experiment.py`` calls these in order; each adds to one list of problems instead of raising at the first.
"""

from __future__ import annotations

import copy
import json
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from rdtf_ds.config import RDTFSection
from rdtf_ds.cross_checks import Problem
from rdtf_ds.deepspeed_keys import REFUSED, REMEDIES, DeepSpeedSection
from rdtf_ds.errors import UserError

Section = TypeVar("Section", bound=BaseModel)
REQUIRED: dict[str, Any] = {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}}
"""Stand-ins for absent or refused required keys, so that the other checks can still be made. Never part of an ``Experiment``."""


def read_json(path: Path) -> dict[str, Any]:
    """The experiment file as a dict; no key twice, no NaN. Raises UserError when it is missing or no JSON object."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give one of the files in ds_configs/") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is no UTF-8 text; an experiment is a JSON file such as those in ds_configs/") from error
    except ValueError as error:
        raise UserError(f"{path}: is no valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f'{path}: must hold one JSON object with DeepSpeed\'s keys and an "rdtf" object, not {_shown(raw)}')
    raw.pop("$schema", None)
    return raw


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise ValueError(f"key {', '.join(sorted(twice))} stands twice in one object; keep one")
    return dict(pairs)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number an experiment may hold")


def parse_value(text: str) -> Any:
    """The right side of ``--set key=value``: JSON, or else the text itself."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except ValueError:
        return text


def assign(raw: dict[str, Any], key: str, value: Any) -> list[Problem]:
    """Put ``value`` at a dotted key. Objects on the way start from our defaults, so that one entry of a default table can be set."""
    *parents, leaf = key.split(".")
    node: Any = raw
    default: Any = {"rdtf": RDTFSection().model_dump(mode="json")}
    for depth, name in enumerate(parents):
        default = default.get(name) if isinstance(default, dict) else None
        node = node.setdefault(name, copy.deepcopy(default) if isinstance(default, dict) else {})
        if not isinstance(node, dict):
            held = ".".join(parents[: depth + 1])
            return [Problem(key, value, f"{held} holds {_shown(node)}, which has no keys; set {held} as a whole")]
    node[leaf] = value
    return []


def take_refused(top: dict[str, Any]) -> list[Problem]:
    """Take DeepSpeed's keys we refuse out of ``top``. A ``false`` or null switch asks for nothing and goes without a word."""
    found = []
    for path, reason in REFUSED.items():
        *parents, leaf = path.split(".")
        node = top.get(parents[0]) if parents else top
        if isinstance(node, dict) and leaf in node:
            value = node.pop(leaf)
            if value is not None and value is not False:
                found.append(Problem(path, value, f"refused: {reason}"))
    return found


def validated(kind: type[Section], given: dict[str, Any], prefix: str, problems: list[Problem], bad: set[str]) -> Section | None:
    """The section, or, with what is wrong added to ``problems`` and its keys to ``bad``, a stand-in that lets the other checks run."""
    try:
        return kind.model_validate_json(json.dumps(given))
    except ValidationError as error:
        mended = copy.deepcopy(given)
        for detail in error.errors(include_url=False):
            problem = _translated(detail, kind, prefix)
            problems.append(problem)
            bad.add(problem.path)
            _drop(mended, detail["loc"])
    for key, stand_in in REQUIRED.items() if kind is DeepSpeedSection else ():
        if key not in mended:
            mended[key] = copy.deepcopy(stand_in)
        elif isinstance(mended[key], dict):
            mended[key].setdefault("stage", 2)
    try:
        return kind.model_validate_json(json.dumps(mended))
    except ValidationError:
        return None


def _translated(detail: Any, kind: type[BaseModel], prefix: str) -> Problem:
    """Pydantic's error in our words: dotted key, value, what is allowed."""
    names = [str(part) for part in detail["loc"] if part != "[key]"]
    path = prefix + ".".join(names)
    if detail["type"] == "missing":
        return Problem(path, None, "is required and missing")
    if detail["type"] == "extra_forbidden":
        return Problem(path, detail["input"], f"unknown key; the nearest is {nearest_key(path, section=isinstance(detail['input'], dict))}")
    if detail["type"] == "string_too_short":
        return Problem(path, detail["input"], "is empty; name something, or leave the key out")
    message = detail["msg"].replace("Input should be ", "allowed: ").replace("Input should have ", "allowed: ")
    remedy = REMEDIES.get(path)
    return Problem(path, detail["input"], message + (f" ({remedy})" if remedy else ""))


def nearest_key(path: str, *, section: bool = False) -> str:
    """The key (``section``: the object of keys) a mistyped one most probably means."""
    known = [*dotted_keys(DeepSpeedSection), *(f"rdtf.{key}" for key in dotted_keys(RDTFSection))]
    holders = {key.rpartition(".")[0] for key in known}
    parent, _, leaf = path.rpartition(".")
    spelled = path.replace("_", ".").removeprefix("rdtf.")

    def likeness(key: str) -> float:
        """Likeness to ``path``: two ratios in 0..1, of the whole keys and of their last parts, and what a name itself is worth."""
        key_parent, _, key_leaf = key.rpartition(".")
        whole = SequenceMatcher(None, spelled, key.replace("_", ".").removeprefix("rdtf.")).ratio()
        # A right name in the wrong place counts for most, then the begin of a name.
        return (
            whole + SequenceMatcher(None, leaf, key_leaf).ratio() + (leaf == key_leaf) + 0.5 * (parent == key_parent and leaf in key_leaf)
        )

    return max((key for key in known if (key in holders) == section), key=likeness)


def dotted_keys(kind: type[BaseModel]) -> list[str]:
    """Every key of a section and of the sections inside it, dotted."""
    keys = []
    for name, field in kind.model_fields.items():
        keys.append(name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += [f"{name}.{inner}" for inner in dotted_keys(field.annotation)]
    return keys


def _drop(node: Any, location: tuple[str | int, ...]) -> None:
    """Remove the innermost dict entry on the way to ``location``."""
    for depth, part in enumerate(location):
        deeper = node.get(part) if isinstance(node, dict) else None
        following = location[depth + 1] if depth + 1 < len(location) else None
        if not (isinstance(deeper, dict) and following in deeper):
            if isinstance(node, dict):
                node.pop(part, None)
            return
        node = deeper


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
