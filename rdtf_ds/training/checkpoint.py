"""Checkpoints that resume a run exactly, committed as a whole or not at all.

``checkpoints/step00000005/`` holds the state after 5 attempted steps: DeepSpeed's shards (weights, masters, moments, loss scale,
counters), ``ema_rank0000.safetensors`` of each rank, ``curriculum.json`` (PID, schedule position, pending plans) and ``MANIFEST.json``:
size and SHA-256 of every file, what the run must share to go on from here, and the layout of the flat groups. Everything is written
to ``step00000005.partial``, the manifest last, and renamed; a folder without the suffix was once complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rdtf_ds.errors import UserError, on_every_rank
from rdtf_ds.training.ema import ShardedEMA
from rdtf_ds.training.engine import TrainingEngine, gather_objects
from rdtf_ds.training.optimizer import ParameterGroup

FORMAT = 1
MANIFEST = "MANIFEST.json"
CURRICULUM = "curriculum.json"
PARTIAL = ".partial"
PACKAGES = ("torch", "deepspeed", "bitsandbytes", "diffusers")


@dataclass(frozen=True)
class Identity:
    """What a run must have in common with a checkpoint to go on from it.

    Attributes:
        must_match: Nested, JSON-able: model shape, seed, batch, ranks. Any difference is refused.
        may_differ: The same for what only deserves a warning: the data's fingerprint.
    """

    must_match: Mapping[str, Any]
    may_differ: Mapping[str, Any]


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on: ``step`` attempted steps are behind it, ``state`` is what was given to `save`."""

    step: int
    state: dict[str, Any]
    notes: tuple[str, ...] = ()


def tag_of(step: int) -> str:
    """Folder name of the checkpoint after ``step`` attempted steps."""
    return f"step{step:08d}"


def describe_groups(groups: Sequence[ParameterGroup]) -> list[dict[str, Any]]:
    """How each flat fp32 group is put together: its parameters in order, their shapes, then the padding at its end."""
    return [
        {
            "name": group.name,
            "bits": group.bits,
            "parameters": [{"name": name, "shape": list(p.shape), "numel": p.numel()} for name, p in group.parameters],
            "padding": group.padding,
            "numel": group.numel + group.padding,
        }
        for group in groups
    ]


def save(
    engine: TrainingEngine,
    ema: ShardedEMA | None,
    folder: Path,
    state: Mapping[str, Any],
    identity: Identity,
    description: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write a checkpoint of all ranks and commit it; then delete the oldest beyond ``keep``. Called by all ranks.

    Args:
        folder: The run's ``checkpoints``.
        state: JSON-able, into ``curriculum.json``.
        description: More for the manifest: model config, precision, hash of the experiment.

    Raises:
        UserError: Some rank could not write; nothing was committed, and every rank says so.
    """
    final = folder / tag_of(engine.attempted_steps)
    partial = final.with_name(final.name + PARTIAL)
    failure = None
    if engine.rank == 0:
        try:
            _clear(folder, final)
            partial.mkdir(parents=True)
        except OSError as error:
            failure = f"{partial}: {error.strerror}"
    _vote(failure)
    failure = engine.save_shards(folder, partial.name)
    _vote(failure or _save_beside(engine, ema, partial, state))
    if engine.rank == 0:
        try:
            _commit(engine, partial, final, identity, description)
            _prune(folder, keep, final)
        except OSError as error:
            failure = f"{error.filename or final}: {error.strerror}"
    _vote(failure)
    return final


def _save_beside(engine: TrainingEngine, ema: ShardedEMA | None, partial: Path, state: Mapping[str, Any]) -> str | None:
    """This rank's files beside DeepSpeed's; returns what went wrong."""
    try:
        if ema is not None:
            save_file({name: tensor.contiguous() for name, tensor in ema.state_dict().items()}, partial / _ema_name(engine.rank))
        if engine.rank == 0:
            _write(partial / CURRICULUM, json.dumps(state, indent=1))
    except (OSError, SafetensorError) as error:
        return f"{partial}: {error}"
    return None


def _commit(engine: TrainingEngine, partial: Path, final: Path, identity: Identity, description: Mapping[str, Any]) -> None:
    manifest = {
        "format": FORMAT,
        "step": engine.attempted_steps,
        "applied_steps": engine.applied_steps,
        "world_size": engine.world_size,
        "versions": {name: version(name) for name in PACKAGES},
        "must_match": identity.must_match,
        "may_differ": identity.may_differ,
        **description,
        "groups": describe_groups(engine.groups),
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(partial.iterdir())},
    }
    _write(partial / MANIFEST, json.dumps(manifest, indent=1))
    partial.rename(final)
    _sync_folder(final.parent)


def _vote(failure: str | None) -> None:
    """Every rank learns whether any failed; all raise or none."""
    failures = [f"rank {rank}: {text}" for rank, text in enumerate(gather_objects(failure)) if text]
    if failures:
        told = (
            f"The checkpoint could not be written ({'; '.join(failures)}). Is the disk full or the folder read-only? Free some space and "
            f"run the same command again: it goes on from the last complete checkpoint."
        )
        raise on_every_rank(UserError(told))


def find_latest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose every byte is as it was committed, and why newer ones were passed over.

    Returns:
        (None, []) when there is nothing to resume.

    Raises:
        UserError: There are checkpoints, but none is complete: starting over would hide a loss.
    """
    candidates = sorted((path for path in folder.glob("step*") if not path.name.endswith(PARTIAL)), reverse=True) if folder.is_dir() else []
    reasons: list[str] = []
    for path in candidates:
        flaw = _flaw(path)
        if flaw is None:
            return path, reasons
        reasons.append(f"{path.name}: {flaw}")
    if reasons:
        raise UserError(
            f"{folder} holds {len(reasons)} checkpoint(s), but none is complete ({'; '.join(reasons)}). Bring one back from a backup, or "
            f"delete the folder or choose another --output_dir to start from step 0."
        )
    return None, []


def _flaw(path: Path) -> str | None:
    try:
        manifest = read_manifest(path)
        for name, expected in manifest["files"].items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if (path / name).stat().st_size != expected["bytes"]:
                return f"{name} has another size than was written"
            if _sha256(path / name) != expected["sha256"]:
                return f"{name} was changed or damaged"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return str(error) or type(error).__name__
    return None


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder.

    Raises:
        ValueError: None there, not JSON, or of a format this version does not know.
    """
    if not (path / MANIFEST).is_file():
        raise ValueError(f"it has no {MANIFEST}")
    manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
    if manifest.get("format") != FORMAT:
        raise ValueError(f"its format is {manifest.get('format')!r}, this version reads {FORMAT}")
    return manifest


def resume(engine: TrainingEngine, ema: ShardedEMA | None, folder: Path, identity: Identity) -> Resumed | None:
    """Load the newest complete checkpoint into engine and EMA; None when there is none. Called by all ranks.

    Raises:
        UserError: None is complete, or the newest belongs to another run; nothing was loaded.
    """
    found: tuple[Path | None, list[str]] | str = (None, [])
    if engine.rank == 0:
        try:
            found = find_latest(folder)
        except UserError as error:
            found = str(error)
    found = gather_objects(found)[0]
    if isinstance(found, str):
        raise on_every_rank(UserError(found))
    path, notes = found
    if path is None:
        return None
    manifest = read_manifest(path)
    differences = _differences(manifest["must_match"], identity.must_match)
    if differences:
        told = (
            f"{path} belongs to another run: {'; '.join(differences)}. Restore these to resume it, or choose another --output_dir for a "
            f"new run."
        )
        raise on_every_rank(UserError(told))
    changed = _differences(manifest["may_differ"], identity.may_differ)
    notes = [f"Passed over a damaged checkpoint: {note}" for note in notes] + [f"Changed since the checkpoint: {what}" for what in changed]
    engine.load_shards(folder, path.name)
    if ema is not None:
        ema.load_state_dict(load_file(path / _ema_name(engine.rank)))
    if engine.attempted_steps != manifest["step"]:
        raise UserError(f"{path}: shards are of step {engine.attempted_steps}, the manifest of step {manifest['step']}; delete the folder.")
    return Resumed(manifest["step"], json.loads((path / CURRICULUM).read_text()), tuple(notes))


def _differences(then: Any, now: Any, key: str = "") -> list[str]:
    """Leaves in which two nested JSON values differ, as "key: checkpoint ..., now ..."."""
    now = json.loads(json.dumps(now))
    if isinstance(then, dict) and isinstance(now, dict):
        names = sorted(then.keys() | now.keys())
        return [line for name in names for line in _differences(then.get(name), now.get(name), f"{key}.{name}".lstrip("."))]
    return [] if then == now else [f"{key} was {json.dumps(then)} and is now {json.dumps(now)}"]


def _ema_name(rank: int) -> str:
    return f"ema_rank{rank:04d}.safetensors"


def _clear(folder: Path, final: Path) -> None:
    """Remove what an interrupted save left, and a checkpoint that this one replaces (a damaged one a resume passed over)."""
    for path in [*folder.glob(f"step*{PARTIAL}"), final]:
        shutil.rmtree(path, ignore_errors=not path.exists())


def _prune(folder: Path, keep: int, newest: Path) -> None:
    """Keep the ``keep`` newest up to ``newest``; what lies ahead of it is damaged, for a resume passed it over to get here."""
    present = sorted(path for path in folder.glob("step*") if not path.name.endswith(PARTIAL))
    ahead = [path for path in present if path.name > newest.name]
    for path in ahead + present[: len(present) - len(ahead)][:-keep]:
        doomed = path.with_name(path.name + PARTIAL)
        path.rename(doomed)  # half deleted, it must not look like a checkpoint
        shutil.rmtree(doomed)


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
