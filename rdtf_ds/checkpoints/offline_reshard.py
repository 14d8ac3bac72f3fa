"""A checkpoint for another number of ranks, made from a committed one without a training run."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import partial as partial_of
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from rdtf_ds.checkpoints.durable import Digest, digest_file, write_file
from rdtf_ds.checkpoints.manifest import CheckpointError, flaw_of, read_manifest
from rdtf_ds.checkpoints.resharding import ema_shard, model_states, optimizer_shard
from rdtf_ds.checkpoints.store import CheckpointStore
from rdtf_ds.checkpoints.tensor_files import write_safetensors
from rdtf_ds.checkpoints.weights import MODEL_STATES, ema_name, shard_path


def reshard(checkpoint: Path, world: int, out: Path, read: Callable[[Path], Any], key: bytes | None = None) -> Path:
    """Commit to ``out``, a folder of checkpoints, what ``world`` ranks would have saved in the place of ``checkpoint``.

    At most one new shard is in memory at a time. Nothing that ``out`` holds is removed.

    Args:
        checkpoint: A committed folder; all its bytes are verified first.
        read: Gives the content of one of DeepSpeed's files, memory-mapped.
        key: Of the manifests of both.

    Returns:
        The new checkpoint.

    Raises:
        CheckpointError: One that is damaged or not ours, another number of ranks than it can be cut for, or no room to write.
    """
    try:
        manifest = read_manifest(checkpoint, key)
    except CheckpointError as error:
        raise CheckpointError(f"'{checkpoint}' cannot be used: {error}. Choose another checkpoint of the run.") from error
    flaw = flaw_of(checkpoint, manifest)
    if flaw is not None:
        raise CheckpointError(f"'{checkpoint}' cannot be used: {flaw}. Choose another checkpoint of the run.")
    store, partial = CheckpointStore(out, keep_every=1, key=key), None  # every 1: none leaves to make room
    try:
        partial = store.begin(manifest["step"], sum(digest["bytes"] for digest in manifest["files"].values()))
        files = _write_files(checkpoint, manifest, world, partial, read)
        if any(digest_file(partial / name) != digest for name, digest in files.items()):
            raise OSError("the disk does not give back what was written")
        body = {name: value for name, value in manifest.items() if name != "tag"} | {
            "world_size": world,
            "resharded_from": {"tag": manifest["tag"], "world_size": manifest["world_size"]},
            "files": {name: files[name].to_json() for name in sorted(files)},
        }
        final = store.commit(partial, body)
        store.point_latest()
        return final
    except (OSError, RuntimeError, KeyError, EOFError, UnpicklingError, SafetensorError) as error:
        raise CheckpointError(f"'{checkpoint}' cannot be written anew for {world} ranks into '{out}': {error}") from error
    finally:
        if partial is not None:
            store.abandon(partial)  # a committed one has another name by now


def _write_files(checkpoint: Path, manifest: Mapping[str, Any], world: int, folder: Path, read: Callable[[Path], Any]) -> dict[str, Digest]:
    """All files of the new checkpoint but the manifest."""
    ranks = range(manifest["world_size"])
    old_shards, old_averages = [shard_path(checkpoint, rank) for rank in ranks], [checkpoint / ema_name(rank) for rank in ranks]
    files = {}
    shards = [read(path) for path in old_shards]
    for rank in range(world):
        name = old_shards[0].name.replace("rank_0_", f"rank_{rank}_", 1)
        files[name] = write_file(folder / name, partial_of(torch.save, optimizer_shard(shards, rank, world)))
    files[MODEL_STATES] = write_file(folder / MODEL_STATES, partial_of(torch.save, model_states(read(checkpoint / MODEL_STATES), world)))
    if ema_name(0) in manifest["files"]:
        averages = [load_file(path) for path in old_averages]
        for rank in range(world):
            part = ema_shard(averages, rank, world)
            specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in part.items()}
            fill = partial_of(write_safetensors, specs=specs, tensors=part.items())
            files[ema_name(rank)] = write_file(folder / ema_name(rank), fill)
    for name in sorted(manifest["files"].keys() - {path.name for path in (*old_shards, *old_averages, checkpoint / MODEL_STATES)}):
        with open(checkpoint / name, "rb") as source:
            files[name] = write_file(folder / name, partial_of(shutil.copyfileobj, source))
    return files
