"""The folder of an exported model: whether all of it is there and whole, and a hash that names it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from rdtf_ds.errors import UserError
from rdtf_ds.models.dfgn import DFGN

# Parts by their folder: the file that describes each, and whether it has weights.
PARTS = {
    "unet": ("config.json", True),
    "vae": ("config.json", True),
    "text_encoder": ("config.json", True),
    "text_encoder_2": ("config.json", True),
    "tokenizer": ("tokenizer_config.json", False),
    "tokenizer_2": ("tokenizer_config.json", False),
    "scheduler": ("scheduler_config.json", False),
}
# Of a tokenizer's files those that hold no words; from these alone transformers makes one without any complaint.
_WORDLESS = {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"}
_BY_BYTES = "ByT5Tokenizer"  # needs no vocabulary
_SHARD = re.compile(r"(.+)-\d+-of-\d+\.safetensors")
_REMEDY = "Copy the folder again, or export once more: python tools/export_fp16.py CHECKPOINT OUT."


def check_model(folder: str | Path, given: Collection[str] = ()) -> None:
    """Looks at every part of an exported model without loading weights.

    Whether all files are there, can be read, and are as long as their headers say; whether tokenizers have their words; and whether the
    U-Net's are the parameters of the model its config describes. (What was changed inside of a file without its length is not seen here.)

    Args:
        given: parts that come from elsewhere and need not be in the folder.

    Raises:
        UserError: the first thing that is missing or damaged, with the file and the remedy.
    """
    root = Path(folder)
    index = root / "model_index.json"
    if not index.is_file():
        raise UserError(f"'{folder}' is no exported model: it has no model_index.json. Make one with tools/export_fp16.py CHECKPOINT OUT.")
    named = _read_json(index)
    if named.get("_class_name") != "RDTFPipeline":
        raise UserError(f"'{index}' names the pipeline {named.get('_class_name')}, not RDTFPipeline: it is the model of another program.")
    for part, (description, has_weights) in PARTS.items():
        if part in given:
            continue
        place = root / part
        if not place.is_dir():
            raise UserError(f"'{folder}' lacks its part {part}: there is no folder '{place}'. {_REMEDY}")
        config = _read_json(place / description)
        if part.startswith("tokenizer"):
            _check_words(place, config)
        shapes = _shapes(place) if has_weights else {}
        if part == "unet":
            _check_network(place, config, shapes)


def model_hash(folder: str | Path) -> str:
    """16 hex digits that name a model: SHA-256 over model_index.json and every file of its parts, with their names.

    Weights, configs and tokenizers, that is, but not the model card beside them. Reads all of it: about a second for a gigabyte.

    Raises:
        UserError: no exported model there, or a file that cannot be read.
    """
    root = Path(folder)
    files = [root / "model_index.json", *(path for part in PARTS for path in (root / part).rglob("*") if path.is_file())]
    whole = hashlib.sha256()
    try:
        for path in sorted(files, key=lambda path: path.relative_to(root).as_posix()):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            whole.update(f"{path.relative_to(root).as_posix()}\0{digest}\n".encode())
    except OSError as error:
        raise UserError(f"'{folder}' cannot be read as an exported model: {error.filename}: {error.strerror}. {_REMEDY}") from error
    return whole.hexdigest()[:16]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"'{path}' is missing. {_REMEDY}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read: {error}. {_REMEDY}") from error
    if not isinstance(content, dict):
        raise UserError(f"'{path}' holds no JSON object. {_REMEDY}")
    return content


def _check_words(place: Path, config: dict[str, Any]) -> None:
    """Without its vocabulary a tokenizer takes every word for an unknown one, and the model would make clips of no caption."""
    files = {path.name: path for path in place.iterdir() if path.is_file()}
    if config.get("tokenizer_class") != _BY_BYTES and files.keys() <= _WORDLESS:
        raise UserError(f"'{place}' has no vocabulary (tokenizer.json, vocab.json or spiece.model), so no caption could be read. {_REMEDY}")
    for name in sorted(files):
        if name.endswith(".json"):
            _read_json(files[name])


def _shapes(place: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a part's tensors by name, from the headers of its one file or of all shards that its index names."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, expected in _weight_files(place):
        found = _header(path)
        if expected is not None and (absent := expected - found.keys()):
            raise UserError(f"'{path}' lacks {min(absent)}, which the index beside it says is there. {_REMEDY}")
        shapes.update(found)
    return shapes


def _weight_files(place: Path) -> Iterator[tuple[Path, set[str] | None]]:
    """The files, each with the tensors it must hold, if something says which."""
    indexes = sorted(place.glob("*.safetensors.index*.json"))
    if not indexes:
        files = sorted(place.glob("*.safetensors"))
        if not files:
            raise UserError(f"'{place}' has no weights: no file there ends in .safetensors. {_REMEDY}")
        if shards := [match for path in files if (match := _SHARD.fullmatch(path.name))]:
            raise UserError(f"'{place}' lacks {shards[0][1]}.safetensors.index.json, which says what is in which of its shards. {_REMEDY}")
        yield from ((path, None) for path in files)
    for index in indexes:
        where = _read_json(index).get("weight_map")
        if not isinstance(where, dict) or not where:
            raise UserError(f"'{index}' names no shards. {_REMEDY}")
        shards = list(where.values())
        if any(not isinstance(shard, str) or shard in ("", "..") or Path(shard).name != shard for shard in shards):
            raise UserError(f"'{index}' names no shards: a weight_map gives each tensor a file beside it. {_REMEDY}")
        for shard in sorted(set(shards)):
            yield place / shard, {name for name, file in where.items() if file == shard}


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    if not path.is_file():
        raise UserError(f"the weights '{path}' are missing. {_REMEDY}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  it is no dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"the weights '{path}' ({path.stat().st_size} bytes) are cut short or damaged: {error}. {_REMEDY}") from error


def _check_network(place: Path, config: dict[str, Any], found: dict[str, tuple[int, ...]]) -> None:
    """diffusers would fill what is absent with random numbers."""
    try:
        with torch.device("meta"):
            unet = DFGN.from_config(config)
    except Exception as error:  # torch and diffusers have no common error for sizes that make no network
        raise UserError(f"'{place / 'config.json'}' describes no DFGN: {error}. {_REMEDY}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"the weights in '{place}' are not those of the model its config.json describes: {name} is "
                f"{found.get(name, 'absent')} in the file and {expected.get(name, 'absent')} in the model. {_REMEDY}"
            )
