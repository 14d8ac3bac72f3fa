"""Saving and resuming by all ranks together: a checkpoint is committed as a whole or not at all, and loaded as a whole or not at all.

A folder of `CheckpointStore` holds DeepSpeed's shards (weights, masters, moments, loss scale, counters), ``ema_rank0000.safetensors``
of each rank, ``curriculum.json`` (PID, schedule position, pending plans, quarantine, incidents) and the manifest. No rank raises alone
between two collectives: what goes wrong on one is put to a vote, and all ranks take the same way.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial as partial_of
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from rdtf_ds.checkpoints import durable
from rdtf_ds.checkpoints.durable import Digest, digest_file, write_file
from rdtf_ds.checkpoints.manifest import CheckpointError, flaw_of
from rdtf_ds.checkpoints.resharding import ema_shard
from rdtf_ds.checkpoints.store import CheckpointStore
from rdtf_ds.checkpoints.tensor_files import write_safetensors
from rdtf_ds.checkpoints.weights import ema_name
from rdtf_ds.errors import UserError, on_every_rank
from rdtf_ds.exit_codes import DISK
from rdtf_ds.training.collectives import gather_objects
from rdtf_ds.training.ema import ShardedEMA
from rdtf_ds.training.engine import TrainingEngine
from rdtf_ds.training.optimizer import ParameterGroup
from rdtf_ds.training.shard_files import recovery_script

CURRICULUM = "curriculum.json"
RECOVERY_SCRIPT = "zero_to_fp32.py"
PACKAGES = ("torch", "deepspeed", "bitsandbytes", "diffusers")


class SaveFailed(UserError):
    """A checkpoint could not be written. Nothing was committed, what was there before is whole, and training can go on."""

    everywhere = True
    exit_code = DISK


class WeightsNotFinite(UserError):
    """The weights hold NaN or infinity: a checkpoint of them would be of no use."""

    everywhere = True


@dataclass(frozen=True)
class Identity:
    """What a run must have in common with a checkpoint to go on from it.

    Attributes:
        must_match: Nested, JSON-able: model shape, seed, batch. Any difference is refused.
        may_differ: The same for what only deserves a warning: the data's fingerprint.
    """

    must_match: Mapping[str, Any]
    may_differ: Mapping[str, Any]


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint: its folder, its bytes, how long all of it took, and what went wrong after the commit."""

    path: Path
    bytes: int
    seconds: float
    trouble: str | None = None


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on: ``step`` attempted steps are behind it, ``state`` is what was given to `save_checkpoint`."""

    step: int
    state: dict[str, Any]
    notes: tuple[str, ...] = ()


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


def save_checkpoint(
    engine: TrainingEngine,
    ema: ShardedEMA | None,
    store: CheckpointStore,
    state: Mapping[str, Any],
    identity: Identity,
    description: Mapping[str, Any],
    trouble: str | None = None,
) -> Saved:
    """Write a checkpoint of all ranks, verify it on each, commit it, then let the oldest go. Called by all ranks.

    Args:
        state: JSON-able, into ``curriculum.json``.
        description: More for the manifest: model config, precision, hash of the experiment.
        trouble: What already went wrong on this rank, such as a log that could not be written: put to the vote like all else.

    Raises:
        WeightsNotFinite: On some rank; nothing was written.
        SaveFailed: Some rank could not write; nothing was committed.
    """
    started = time.monotonic()
    bad = [name for name in gather_objects(engine.first_bad_weight()) if name]
    if bad:
        steps = engine.attempted_steps
        raise WeightsNotFinite(f"{bad[0]} cannot be held in {engine.dtype} after {steps} steps, so no checkpoint was written.")
    _vote(store, None, trouble)
    partial = _begin(engine, ema, store)
    failure, files = engine.save_shards(partial)
    failure = failure or _save_beside(engine, ema, partial, state, files) or _not_as_written(partial, files)
    _vote(store, partial, failure)
    files = {name: digest for part in gather_objects(files) for name, digest in part.items()}
    final = None
    if engine.rank == 0:
        try:
            final = store.commit(partial, _manifest(engine, identity, description, files))
        except OSError as error:
            failure = str(error)
    _vote(store, partial, failure)
    trouble = _tidy(store) if engine.rank == 0 else None
    path, trouble = gather_objects((final, trouble))[0]
    return Saved(path, sum(digest.bytes for digest in files.values()), time.monotonic() - started, trouble)


def _begin(engine: TrainingEngine, ema: ShardedEMA | None, store: CheckpointStore) -> Path:
    expected = sum(gather_objects(engine.shard_bytes() + (ema.nbytes if ema is not None else 0)))
    partial, failure = None, None
    if engine.rank == 0:
        try:
            partial = store.begin(engine.attempted_steps, expected)
        except OSError as error:
            failure = str(error)
    _vote(store, None, failure)
    agreed: Path = gather_objects(partial)[0]
    _vote(store, agreed, None if agreed.is_dir() else f"{agreed} is not there: do all nodes share the output folder?")
    return agreed


def _save_beside(
    engine: TrainingEngine, ema: ShardedEMA | None, partial: Path, state: Mapping[str, Any], files: dict[str, Digest]
) -> str | None:
    """This rank's files beside DeepSpeed's, entered in ``files``; returns what went wrong."""
    try:
        if ema is not None:
            tensors = ema.state_dict()
            specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
            fill = partial_of(write_safetensors, specs=specs, tensors=tensors.items())
            files[ema_name(engine.rank)] = write_file(partial / ema_name(engine.rank), fill)
        if engine.rank == 0:
            files[CURRICULUM] = write_file(partial / CURRICULUM, lambda file: file.write(json.dumps(state, indent=1).encode()))
        durable.sync(partial)
    except Exception as error:  # whatever it is, the other ranks must hear of it
        return f"{partial}: {error}"
    return None


def _not_as_written(partial: Path, files: Mapping[str, Digest]) -> str | None:
    """Reads this rank's files again: what the disk gives back is what is committed."""
    try:
        wrong = [name for name, digest in files.items() if digest_file(partial / name) != digest]
    except OSError as error:
        return str(error)
    return f"{partial / wrong[0]} does not hold what was written" if wrong else None


def _manifest(
    engine: TrainingEngine, identity: Identity, description: Mapping[str, Any], files: Mapping[str, Digest]
) -> dict[str, Any]:
    return {
        "step": engine.attempted_steps,
        "applied_steps": engine.applied_steps,
        "world_size": engine.world_size,
        "versions": {name: version(name) for name in PACKAGES},
        "must_match": identity.must_match,
        "may_differ": identity.may_differ,
        **description,
        "groups": describe_groups(engine.groups),
        "files": {name: files[name].to_json() for name in sorted(files)},
    }


def _tidy(store: CheckpointStore) -> str | None:
    """What follows a commit and may fail without harm to it; what went wrong is tried again after the next."""
    try:
        store.point_latest()
        store.prune()
        script = store.folder / RECOVERY_SCRIPT
        if not script.is_file() or script.read_bytes() != recovery_script():
            durable.replace_file(script, recovery_script())
    except OSError as error:
        return f"The checkpoint is committed, but what is old could not be removed or '{store.folder}' not be brought up to date: {error}."
    return None


def _vote(store: CheckpointStore, partial: Path | None, failure: str | None) -> None:
    """Every rank learns whether any failed; all raise or none."""
    failures = [f"rank {rank}: {text}" for rank, text in enumerate(gather_objects(failure)) if text]
    if failures:
        if partial is not None:
            store.abandon(partial)
        raise SaveFailed(
            f"The checkpoint could not be written ({'; '.join(failures)}). The one before it is whole. Free some space, or see that the "
            f"folder may be written."
        )


def resume_checkpoint(engine: TrainingEngine, ema: ShardedEMA | None, store: CheckpointStore, identity: Identity) -> Resumed | None:
    """Load the newest checkpoint that verifies on all ranks into engine and EMA; None when there is none. Called by all ranks.

    Files are checked and read by every rank before the live state of any changes. A checkpoint of another number of ranks is cut anew.

    Raises:
        UserError: There are checkpoints, but none can be used, or the newest whole one belongs to another run; nothing was loaded.
    """
    notes: list[str] = []
    candidates: list[Path] = gather_objects(store.candidates() if engine.rank == 0 else None)[0]
    for path in candidates:
        manifest, averages, flaw = _read(engine, ema, store, path)
        if flaw is not None or manifest is None:
            notes.append(f"{path.name}: {flaw}")
            continue
        _refuse_another_run(path, manifest, identity)
        store.verified(path)
        engine.load_shards(path)
        if ema is not None:
            ema.load_state_dict(averages)
        if engine.attempted_steps != manifest["step"]:
            steps = f"shards are of step {engine.attempted_steps}, the manifest of step {manifest['step']}"
            raise on_every_rank(UserError(f"{path}: {steps}; delete the folder."))
        state = json.loads((path / CURRICULUM).read_text())
        return Resumed(manifest["step"], state, tuple(_notes(engine, store, notes, manifest, identity)))
    if notes:
        told = (
            f"{store.folder} holds {len(notes)} checkpoint(s), but none can be used ({'; '.join(notes)}). Bring one back from a backup, or "
            f"delete the folder or choose another --output_dir to start from step 0."
        )
        raise on_every_rank(UserError(told))
    return None


def _read(
    engine: TrainingEngine, ema: ShardedEMA | None, store: CheckpointStore, path: Path
) -> tuple[dict[str, Any] | None, dict[str, Tensor], str | None]:
    """A candidate's manifest and averages, its shards ready in the engine, or the flaw that any rank found."""
    manifest, flaw = None, None
    if engine.rank == 0:
        try:
            manifest = store.manifest(path)
            missing = {"step", "world_size", "must_match", "may_differ"} - manifest.keys()
            if missing:
                manifest, flaw = None, f"its manifest lacks {', '.join(sorted(missing))}"
        except (CheckpointError, OSError) as error:
            flaw = str(error)
    manifest, flaw = gather_objects((manifest, flaw))[0]
    if manifest is None:
        return None, {}, flaw
    averages: dict[str, Tensor] = {}
    mine = sorted(manifest["files"])[engine.rank :: engine.world_size]
    flaw = _agreed(flaw_of(path, manifest, mine))
    if flaw is None and ema is not None and not _has_averages(manifest):
        return manifest, averages, None  # told by `_refuse_another_run`, in better words
    if flaw is None:
        flaw = engine.read_shards(path, manifest["world_size"])
        try:
            if ema is not None and flaw is None:
                averages = _read_averages(path, manifest["world_size"], engine)
        except (OSError, SafetensorError, UserError, KeyError) as error:
            flaw = f"{type(error).__name__}: {error}"
        flaw = _agreed(flaw)
    return manifest, averages, flaw


def _agreed(flaw: str | None) -> str | None:
    """The first flaw that any rank found."""
    return next((found for found in gather_objects(flaw) if found), None)


def _has_averages(manifest: Mapping[str, Any]) -> bool:
    return ema_name(0) in manifest["files"]


def _read_averages(path: Path, written_by: int, engine: TrainingEngine) -> dict[str, Tensor]:
    """This rank's part of the mean weights, from those who wrote them."""
    ranks = [engine.rank] if written_by == engine.world_size else list(range(written_by))
    shards = []
    for rank in ranks:
        with safe_open(path / ema_name(rank), framework="pt") as file:
            shards.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118  it is no dict
    return shards[0] if written_by == engine.world_size else ema_shard(shards, engine.rank, engine.world_size)


def _refuse_another_run(path: Path, manifest: Mapping[str, Any], identity: Identity) -> None:
    differences = _differences(manifest["must_match"], identity.must_match)
    if differences:
        told = (
            f"{path} belongs to another run: {'; '.join(differences)}. Restore these to resume it, or choose another --output_dir for a "
            f"new run."
        )
        raise on_every_rank(UserError(told))


def _notes(
    engine: TrainingEngine, store: CheckpointStore, passed_over: list[str], manifest: Mapping[str, Any], identity: Identity
) -> list[str]:
    notes = [f"Passed over a damaged checkpoint: {note}" for note in passed_over]
    notes += [f"Changed since the checkpoint: {what}" for what in _differences(manifest["may_differ"], identity.may_differ)]
    if manifest["world_size"] != engine.world_size:
        notes.append(
            f"The checkpoint is of {manifest['world_size']} rank(s) and was cut anew for {engine.world_size}: the same state and sample "
            f"order; sums over ranks may round otherwise."
        )
    stray = store.stray_latest()
    return [*notes, *([stray] if stray else [])]


def _differences(then: Any, now: Any, key: str = "") -> list[str]:
    """Leaves in which two nested JSON values differ, as "key: checkpoint ..., now ..."."""
    now = json.loads(json.dumps(now))
    if isinstance(then, dict) and isinstance(now, dict):
        names = sorted(then.keys() | now.keys())
        return [line for name in names for line in _differences(then.get(name), now.get(name), f"{key}.{name}".lstrip("."))]
    return [] if then == now else [f"{key} was {json.dumps(then)} and is now {json.dumps(now)}"]
