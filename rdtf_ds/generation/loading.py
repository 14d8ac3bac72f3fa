"""An exported model, loaded to make clips with, and what their files say of it."""

from __future__ import annotations

from pathlib import Path

import torch

from rdtf_ds import __version__
from rdtf_ds.errors import UserError
from rdtf_ds.exported_model import model_hash
from rdtf_ds.models.devices import DTYPES
from rdtf_ds.pipeline import RDTFPipeline


def load_pipeline(model: Path, device: str, dtype: str, offload: bool = False) -> RDTFPipeline:
    """The pipeline on its device.

    Args:
        device: ``cpu`` or ``cuda``, or one GPU of several, ``cuda:1``.
        dtype: a name of `DTYPES`.
        offload: its parts wait in CPU memory until they are needed.

    Raises:
        UserError: no model there or a damaged one, or the GPU has not the memory for it.
    """
    try:
        pipeline = RDTFPipeline.from_pretrained(model, torch_dtype=DTYPES[dtype])
    except (UserError, MemoryError):
        raise
    except Exception as error:  # transformers, tokenizers and diffusers have no common error for files they cannot use
        reason = (str(error).strip().splitlines() or ["no reason given"])[0].rstrip(".")
        raise UserError(
            f"'{model}' cannot be loaded ({type(error).__name__}: {reason}). Copy the folder again, or export once more with the "
            "versions of diffusers and transformers that are installed here."
        ) from error
    try:
        if offload:
            pipeline.enable_model_cpu_offload()
        else:
            pipeline.to(device)
    except torch.OutOfMemoryError as error:
        less = "--dtype float16, " if dtype == "float32" else ""
        raise UserError(
            f"'{model}' does not fit into the memory that is free on {device}, in {dtype}. Take {less}--offload of generate.py, or "
            "--device cpu; nvidia-smi says what else is on the GPU."
        ) from error
    return pipeline


def identity_of(model: Path, dtype: str) -> dict[str, str]:
    """What every clip's metadata say of what made it: the model's hash, the number format, this package's version."""
    return {"model": model_hash(model), "dtype": dtype, "rdtf_ds": __version__}
