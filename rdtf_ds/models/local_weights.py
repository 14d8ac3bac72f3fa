"""Where the weights of a frozen encoder lie on this machine, and their hash: without loading them, without a network."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from rdtf_ds.models.missing import Part

# In the order in which transformers and diffusers look for them.
_STEMS = {".safetensors": ("model", "diffusion_pytorch_model"), ".bin": ("pytorch_model", "diffusion_pytorch_model")}
_SCALE = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


def made_on_the_spot(source: str) -> bool:
    """Whether a source is one of ours, whose name says all about its weights."""
    return source.partition(":")[0] in ("tiny", "haar")


def is_here(source: str, *parts: Part) -> bool:
    """Whether the parts of a source can be loaded from this machine alone."""
    if made_on_the_spot(source):
        return True
    folders = [local_folder(source, part) for part in parts]
    # A tokenizer has no weights; what has a config of its own has.
    return all(folder and (part.markers != ("config.json",) or weight_files(folder)) for folder, part in zip(folders, parts, strict=True))


def weights_hash(source: str, part: Part) -> str | None:
    """SHA-256 of the weights and of an autoencoder's latent scale, in hex; None if they are not here or made on the spot."""
    folder = None if made_on_the_spot(source) else local_folder(source, part)
    if folder is None or not (files := weight_files(folder)):
        return None
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256(json.dumps([config.get(key) for key in _SCALE]).encode())
    for path in files:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def local_folder(source: str, part: Part) -> Path | None:
    """The folder that holds a part: below the source, or in the hub's cache of it; None if neither has it."""
    folder = Path(source).expanduser()
    for subfolder in part.subfolders:
        for marker in part.markers:
            if folder.is_dir():
                found = folder / subfolder / marker
                if found.is_file():
                    return found.parent
            elif isinstance(cached := _in_hub_cache(source, f"{subfolder}/{marker}".lstrip("/")), str):
                return Path(cached).parent
    return None


def weight_files(folder: Path) -> list[Path]:
    """The files that a library would load from a folder, whole or in shards."""
    for suffix, stems in _STEMS.items():
        for stem in stems:
            if (whole := folder / f"{stem}{suffix}").is_file():
                return [whole]
            if shards := sorted(folder.glob(f"{stem}-*-of-*{suffix}")):
                return shards
    return []


def _in_hub_cache(source: str, file: str) -> object:
    try:
        return try_to_load_from_cache(source, file)
    except HFValidationError:  # a path that leads nowhere
        return None
