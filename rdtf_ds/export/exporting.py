"""From a training checkpoint to a self-contained folder in diffusers' layout.

Nothing is in memory as a whole: the frozen parts pass through one at a time, DFGN's weights one parameter at a time. The folder appears
under its name only when everything in it is on the disk.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from rdtf_ds import __version__
from rdtf_ds.checkpoints.durable import Digest, digest_file, sync, write_file
from rdtf_ds.checkpoints.manifest import CheckpointError, read_key
from rdtf_ds.checkpoints.store import find_step_folder
from rdtf_ds.checkpoints.weights import CheckpointWeights, Weights
from rdtf_ds.config import RDTFSection
from rdtf_ds.errors import UserError
from rdtf_ds.export.frozen_parts import write_frozen_parts
from rdtf_ds.export.weight_files import DEFAULT_SHARD, DTYPES, bytes_of, write_weights
from rdtf_ds.model_card import model_card
from rdtf_ds.models.dfgn import DFGN
from rdtf_ds.pipeline import RDTFPipeline
from rdtf_ds.samplers import make_sampler

RECORD = "export.json"
"""What was exported, from what, and the digest of every other file of the folder."""


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        folder: the exported model.
        checkpoint, step: the step folder it was made from, and attempted optimizer steps.
        weights, dtype: mean or masters; as what DFGN's weights are stored.
        parameters: of DFGN.
        bytes: of all files.
        seconds: of the whole export, the flush to the disk included.
        gb_per_second: 10^9 bytes of DFGN's fp32 weights in the checkpoint, each second of it.
    """

    folder: str
    checkpoint: str
    step: int
    weights: Weights
    dtype: str
    parameters: int
    bytes: int
    seconds: float
    gb_per_second: float


def export(
    checkpoint: str | Path,
    out: str | Path,
    weights: Weights = "ema",
    encoders: Mapping[str, str] | None = None,
    dtype: str = "float16",
    max_shard_size: str = DEFAULT_SHARD,
) -> ExportReport:
    """Writes the model of a checkpoint as a folder that :meth:`RDTFPipeline.from_pretrained` loads without a network or DeepSpeed.

    Args:
        checkpoint: a step folder, or a run folder for its newest complete step.
        out: the folder to make; may exist if empty.
        weights: the mean over training (``ema``), or the weights themselves (``master``).
        encoders: other sources than the run's config names, by ``autoencoder``, ``clip``, ``t5``.
        dtype: of DFGN's weights: ``float16``, ``bfloat16`` or ``float32``.
        max_shard_size: such as ``5GB``; a part above it is written as several files and their index.

    Raises:
        CheckpointError: no complete checkpoint, or one that does not hold this model.
        UnexportableWeight: NaN, infinity or a value beyond the dtype; names the parameter.
        UserError: ``out`` holds something, or cannot be written; a frozen part does not fit; no such dtype or size.
        EncoderNotFound: an encoder is not where the config says.
    """
    started = time.perf_counter()
    max_shard = bytes_of(max_shard_size)
    if dtype not in DTYPES:
        raise UserError(f"dtype is '{dtype}': choose {', '.join(DTYPES)}.")
    source, section = open_checkpoint(checkpoint, encoders or {})
    out = Path(out)
    _refuse_occupied(out)
    unet = empty_model(source)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        _clear_leftovers(out)
        (partial / "unet").mkdir(parents=True)
        _write_configs(partial, unet, section, write_frozen_parts(partial, unet, section.encoders, max_shard))
        written = write_weights(partial / "unet", source.shapes(), source.parameters(weights), DTYPES[dtype], max_shard)
        (partial / "README.md").write_text(model_card(section, source, weights, dtype), encoding="utf-8")
        about = {"weights": weights, "dtype": dtype, "parameters": unet.num_parameters(), **_origin(source, section)}
        size = _seal(partial, about, {f"unet/{name}": digest for name, digest in written.items()})
        partial.rename(out)  # replaces an empty folder
        sync(out.parent)
    except OSError as error:
        raise UserError(f"cannot write '{out}': {error.strerror or error}. Choose another folder, or make room.") from error
    finally:
        with suppress(FileNotFoundError):
            shutil.rmtree(partial)
    seconds = time.perf_counter() - started
    read = 4 * unet.num_parameters()
    return ExportReport(
        str(out), str(source.folder), source.step, weights, dtype, unet.num_parameters(), size, seconds, read / 1e9 / seconds
    )


def open_checkpoint(checkpoint: str | Path, encoders: Mapping[str, str] | None = None) -> tuple[CheckpointWeights, RDTFSection]:
    """The weights of a run's newest complete step, or of a step folder, and the run's experiment, with other encoder sources put in.

    Raises:
        CheckpointError: no complete checkpoint, one without its run's experiment, or one that is not signed where the run signs.
    """
    source = CheckpointWeights(find_step_folder(checkpoint))
    raw = source.run_config()
    raw["encoders"] = {**raw.get("encoders", {}), **(encoders or {})}
    try:
        section = RDTFSection.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        raise CheckpointError(
            f"the experiment of '{source.folder}' (config.json of its run) cannot be used: {error}. It was changed by hand, or written by "
            "another version of this package; export with that one."
        ) from error
    if section.checkpoint.key_file is not None:
        source = CheckpointWeights(source.folder, read_key(section.checkpoint.key_file))  # now that it must be signed
    return source, section


def empty_model(source: CheckpointWeights) -> DFGN:
    """DFGN without memory behind it, checked against the checkpoint's parameters.

    Raises:
        CheckpointError: the checkpoint's parameters are not those of the model that its manifest describes.
    """
    # The backend is a matter of the machine that trains; the one that generates picks its own.
    config = {**source.model_config, "attention_backend": "auto"}
    with torch.device("meta"):
        unet: DFGN = DFGN(**config)
    expected = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    found = source.shapes()
    for name in expected.keys() | found.keys():
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"'{source.folder}' does not hold the model its manifest describes: {name} is {found.get(name, 'absent')} in the shards "
                f"and {expected.get(name, 'absent')} in the model. It was written by another version of this package; export with that one."
            )
    return unet


def _refuse_occupied(out: Path) -> None:
    if not out.name:  # the folder that one is in cannot be replaced by another
        raise UserError(f"'{out}' is no name of a folder to be made; name one, such as '{out / 'model'}'.")
    if out.exists() and not out.is_dir():
        raise UserError(f"'{out}' is a file; name a folder that does not exist yet.")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"'{out}' is not empty, and an export never overwrites. Name another folder, or remove it first.")


def _clear_leftovers(out: Path) -> None:
    """Removes what exports to ``out`` left behind that were killed, and says so."""
    for path in sorted(out.parent.glob(f".{escape(out.name)}.*.partial")):
        number = path.name.removeprefix(f".{out.name}.").removesuffix(".partial")
        if re.fullmatch("[1-9][0-9]*", number, re.ASCII) and not path.is_symlink() and path.is_dir() and _has_ended(int(number)):
            shutil.rmtree(path)
            print(f"Removed '{path}', which an export that was killed had left.", file=sys.stderr)


def _has_ended(process: int) -> bool:
    """Whether no process but this one has the number: in a container, each export may have the same."""
    if process == os.getpid():
        return True
    try:
        os.kill(process, 0)  # only asks
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # somebody else's
        pass
    return False


def _write_configs(folder: Path, unet: DFGN, section: RDTFSection, frozen: Mapping[str, Any]) -> None:
    """The scheduler, DFGN's config and the pipeline's, which names all parts; no weights are needed for it."""
    sampling, diffusion = section.sampling, section.diffusion
    scheduler = make_sampler(sampling.sampler, diffusion.schedule, diffusion.steps, diffusion.beta_start, diffusion.beta_end)
    pipeline = RDTFPipeline(
        unet=unet,
        scheduler=scheduler,
        **frozen,
        image_size=section.data.image_size,
        max_frames=section.data.frames,
        text_length=section.encoders.text_length,
        background=section.data.background,
        steps=sampling.steps,
        eta=sampling.eta,
        text_scale=sampling.text_scale,
        image_scale=sampling.image_scale,
        frame_ms=sampling.frame_ms,
    )
    pipeline.save_config(folder)
    unet.save_config(folder / "unet")
    scheduler.save_pretrained(str(folder / "scheduler"))


def _origin(source: CheckpointWeights, section: RDTFSection) -> dict[str, Any]:
    """Where the weights come from, as the record has it."""
    manifest = source.manifest
    return {
        "checkpoint": source.folder.resolve().name,
        "step": source.step,
        "applied_steps": manifest.get("applied_steps", source.step),
        "model": source.model_config,
        "config": section.model_dump(mode="json"),
    }


def _seal(folder: Path, about: Mapping[str, Any], known: Mapping[str, Digest]) -> int:
    """Writes the record and puts every file and folder on the disk; returns the bytes of all files.

    Args:
        known: digests of files that are on the disk already, by their path in the folder.
    """
    files: dict[str, Digest] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in known:
            sync(path)
        if path.is_file():
            files[name] = known.get(name) or digest_file(path)
    record = {
        "format": 1,
        "rdtf_ds": __version__,
        **about,
        "files": {name: digest.to_json() for name, digest in files.items()},
    }
    written = write_file(folder / RECORD, lambda file: file.write(json.dumps(record, indent=1).encode() + b"\n"))
    for path in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        sync(path)
    return written.bytes + sum(digest.bytes for digest in files.values())
