"""Where the weights of a frozen encoder lie on this machine, and their hash: without loading them, without a network.

Hashing gigabytes at every start takes long, so `KnownHashes` remembers the hash of a file for as long as it looks the same from outside.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from rdtf_ds.models.missing import EncoderNotFound, Part

# In the order in which transformers and diffusers look for them.
_STEMS = {".safetensors": ("model", "diffusion_pytorch_model"), ".bin": ("pytorch_model", "diffusion_pytorch_model")}
_SCALE = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
_TOKENIZER_CONFIG = "tokenizer_config.json"
_TOKENIZER_FILES = ("added_tokens.json", "merges.txt", "special_tokens_map.json", "spiece.model", "tokenizer.json", "vocab.json")
_OF_NO_MEANING = ("_commit_hash", "name_or_path", "processor_class", "transformers_version")
_HASHES = "weights.json"


class KnownHashes:
    """SHA-256 of files, kept in a JSON file beside what hangs on them.

    A file counts as the same while its path, size, time and inode are. The list saves time alone: where it cannot be read or written,
    files are hashed again.

    Args:
        folder: the list is ``weights.json`` in it; None: nothing is remembered.
        write: whether new hashes are added to it.
    """

    def __init__(self, folder: str | Path | None = None, write: bool = True) -> None:
        self._write = write
        self._path = None if folder is None else Path(folder) / _HASHES
        self._known: dict[str, str] = {}
        if self._path is not None:
            try:
                stored = json.loads(self._path.read_text(encoding="utf-8"))
                self._known = {str(key): str(value) for key, value in stored.items()}
            except (OSError, ValueError, AttributeError):
                self._known = {}

    def sha256(self, path: Path) -> str:
        """Of a file's bytes, in hex."""
        status = os.stat(path)
        look = json.dumps([str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ino])
        if look not in self._known:
            with open(path, "rb") as file:
                self._known[look] = hashlib.file_digest(file, "sha256").hexdigest()
            self._keep()
        return self._known[look]

    def _keep(self) -> None:
        if self._path is None or not self._write:
            return
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        try:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self._known, indent=1) + "\n", encoding="utf-8")
            temporary.replace(self._path)
        except OSError:  # a folder that may only be read
            with suppress(OSError):
                temporary.unlink()


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


def weights_hash(source: str, part: Part, hashes: KnownHashes | None = None) -> str | None:
    """SHA-256 of the weights and of an autoencoder's latent scale, in hex; None if they are not here or made on the spot.

    Raises:
        EncoderNotFound: the config beside them cannot be read.
    """
    hashes = hashes or KnownHashes()
    folder = None if made_on_the_spot(source) else local_folder(source, part)
    if folder is None or not (files := weight_files(folder)):
        return None
    config = _read_config(folder / "config.json", source, part)
    digest = hashlib.sha256(json.dumps([config.get(key) for key in _SCALE]).encode())
    for path in files:
        digest.update(bytes.fromhex(hashes.sha256(path)))
    return digest.hexdigest()


def tokenizer_hash(source: str, part: Part) -> str | None:
    """SHA-256 over the files of a tokenizer, in hex; None if they are not here or made on the spot.

    Of its config, what only tells where it came from is left out.

    Raises:
        EncoderNotFound: the config cannot be read.
    """
    folder = None if made_on_the_spot(source) else local_folder(source, part)
    if folder is None:
        return None
    digest = hashlib.sha256()
    if (folder / _TOKENIZER_CONFIG).is_file():
        config = _read_config(folder / _TOKENIZER_CONFIG, source, part)
        told = {key: value for key, value in config.items() if key not in _OF_NO_MEANING}
        digest.update(json.dumps(told, sort_keys=True).encode())
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            digest.update(name.encode() + hashlib.sha256((folder / name).read_bytes()).digest())
    return digest.hexdigest()


def _read_config(path: Path, source: str, part: Part) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EncoderNotFound(part, source, f"'{path}' cannot be read ({error})") from error
    if not isinstance(config, dict):
        raise EncoderNotFound(part, source, f"'{path}' holds no JSON object")
    return config


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
