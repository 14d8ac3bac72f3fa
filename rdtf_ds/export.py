"""From a training checkpoint to a self-contained folder in diffusers' layout, DFGN in fp16.

The weights are streamed: the safetensors header is written first, since all shapes are known, then one parameter after the other.
The folder appears under its name only when everything in it is on the disk.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from rdtf_ds.checkpoints.durable import sync
from rdtf_ds.checkpoints.manifest import CheckpointError, read_key
from rdtf_ds.checkpoints.store import find_step_folder
from rdtf_ds.checkpoints.tensor_files import write_safetensors
from rdtf_ds.checkpoints.weights import CheckpointWeights, Weights
from rdtf_ds.config import RDTFSection
from rdtf_ds.errors import UserError
from rdtf_ds.model_card import model_card
from rdtf_ds.models.autoencoder import load_autoencoder
from rdtf_ds.models.dfgn import DFGN
from rdtf_ds.models.text_conditioning import TextEncoders
from rdtf_ds.pipeline import RDTFPipeline, ddim_scheduler

FP16_MAX = 65504.0
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


class UnexportableWeight(UserError):
    """A weight that fp16 cannot hold, or that is no number."""


@dataclass(frozen=True)
class ExportReport:
    """What was written: ``folder``, from which ``checkpoint`` step, which ``weights``, how many ``parameters``, ``bytes`` in all."""

    folder: str
    checkpoint: str
    step: int
    weights: Weights
    parameters: int
    bytes: int


def export(
    checkpoint: str | Path, out: str | Path, weights: Weights = "ema", encoders: Mapping[str, str] | None = None
) -> ExportReport:
    """Writes the model of a checkpoint as a folder that :meth:`RDTFPipeline.from_pretrained` loads without a network or DeepSpeed.

    Args:
        checkpoint: a step folder, or a run folder for its newest complete step.
        out: the folder to make; may exist if empty.
        weights: the mean over training (``ema``), or the weights themselves (``master``).
        encoders: other sources than the run's config names, by ``autoencoder``, ``clip``, ``t5``.

    Raises:
        CheckpointError: no complete checkpoint, or one that does not hold this model.
        UnexportableWeight: NaN, infinity or a value beyond fp16; names the parameter.
        UserError: ``out`` holds something, or cannot be written.
        EncoderNotFound: an encoder is not where the config says.
    """
    source = CheckpointWeights(find_step_folder(checkpoint))
    out = Path(out)
    _refuse_occupied(out)
    section = _run_config(source, encoders or {})
    if section.checkpoint.key_file is not None:
        source = CheckpointWeights(source.folder, read_key(section.checkpoint.key_file))  # now that it must be signed
    unet = _empty_model(source)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        (partial / "unet").mkdir(parents=True)
        _write_parts(partial, unet, section)
        with open(partial / "unet" / WEIGHTS_FILE, "wb") as file:
            write_fp16(file, source.shapes(), source.parameters(weights))
        (partial / "README.md").write_text(model_card(section, source, weights), encoding="utf-8")
        size = _flush_to_disk(partial)
        partial.rename(out)  # replaces an empty folder
        sync(out.parent)
    except OSError as error:
        raise UserError(f"cannot write '{out}': {error.strerror or error}. Choose another folder, or make room.") from error
    finally:
        with suppress(FileNotFoundError):
            shutil.rmtree(partial)
    return ExportReport(str(out), str(source.folder), source.step, weights, unet.num_parameters(), size)


def write_fp16(file: BinaryIO, shapes: Mapping[str, tuple[int, ...]], parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Streams ``parameters`` into a safetensors file as fp16, rounded to nearest as ``Tensor.half`` does.

    Args:
        file: empty, open for writing.
        shapes: of every parameter, in the order they come.
        parameters: (name, floating tensor), each released before the next is asked for.

    Raises:
        UnexportableWeight: NaN, infinity, or a magnitude above 65504.
        ValueError: parameters that are not those of ``shapes``.
    """
    specs = {name: (torch.float16, tuple(shape)) for name, shape in shapes.items()}
    write_safetensors(file, specs, ((name, _as_fp16(name, tensor)) for name, tensor in parameters))


def _as_fp16(name: str, tensor: Tensor) -> Tensor:
    refuse_unexportable(name, tensor)
    return tensor.to(torch.float16)


def refuse_unexportable(name: str, tensor: Tensor) -> None:
    """Raises :class:`UnexportableWeight` if fp16 cannot hold every value of ``tensor``."""
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise UnexportableWeight(
            f"{name} holds {bad} values that are NaN or infinite: the training had diverged by this step. Export an earlier checkpoint."
        )
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    if largest > FP16_MAX:
        raise UnexportableWeight(
            f"{name} reaches {largest:g}, and fp16 ends at {FP16_MAX:g}: the training is diverging. Export an earlier checkpoint."
        )


def _refuse_occupied(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"'{out}' is a file; name a folder that does not exist yet.")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"'{out}' is not empty, and an export never overwrites. Name another folder, or remove it first.")


def _run_config(source: CheckpointWeights, encoders: Mapping[str, str]) -> RDTFSection:
    """The run's resolved experiment, with other encoder sources put in."""
    raw = source.run_config()
    raw["encoders"] = {**raw.get("encoders", {}), **encoders}
    return RDTFSection.model_validate_json(json.dumps(raw))


def _empty_model(source: CheckpointWeights) -> DFGN:
    """DFGN without memory behind it, checked against the checkpoint's parameters."""
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


def _write_parts(folder: Path, unet: DFGN, section: RDTFSection) -> None:
    """Everything but DFGN's weights and the model card."""
    encoders, sampling, diffusion = section.encoders, section.sampling, section.diffusion
    text = TextEncoders.from_pretrained(encoders.clip, encoders.t5, encoders.text_length)
    pipeline = RDTFPipeline(
        unet=unet,
        vae=load_autoencoder(encoders.autoencoder).vae,
        text_encoder=text.clip,
        tokenizer=text.clip_tokenizer,
        text_encoder_2=text.t5,
        tokenizer_2=text.t5_tokenizer,
        scheduler=ddim_scheduler(diffusion.schedule, diffusion.steps, diffusion.beta_start, diffusion.beta_end),
        image_size=section.data.image_size,
        max_frames=section.data.frames,
        text_length=encoders.text_length,
        background=section.data.background,
        steps=sampling.steps,
        eta=sampling.eta,
        text_scale=sampling.text_scale,
        image_scale=sampling.image_scale,
    )
    pipeline.save_config(folder)
    unet.save_config(folder / "unet")
    for name, part in pipeline.components.items():
        if name != "unet":
            part.save_pretrained(str(folder / name))


def _flush_to_disk(folder: Path) -> int:
    """fsync of every file and folder below; returns the bytes of all files."""
    size = 0
    for path in [*folder.rglob("*"), folder]:
        sync(path)
        size += path.stat().st_size if path.is_file() else 0
    return size
