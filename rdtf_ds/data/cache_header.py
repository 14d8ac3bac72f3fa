"""``cache.json`` of a feature cache: what its features were made with, and in what a run differs from that."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rdtf_ds.data.clips.writing import write_atomically
from rdtf_ds.errors import UserError

HEADER = "cache.json"
FORMAT = 2
_HASHES = ("weights", "tokenizer")


class CacheError(UserError):
    """A feature cache that is not there, does not fit the run, lacks a clip or is damaged."""


def make_command(cache: str | Path, data: str | Path = "DIR") -> str:
    """What to type to make, mend or extend a cache; with the keys of the run."""
    return f"python tools/cache_dataset.py --deepspeed_config CONFIG [--set ...] --data_dir {data} --out {cache}"


@dataclass(frozen=True)
class CacheHeader:
    """What a cache holds.

    Attributes:
        identity: By dotted key of the experiment, everything the features depend on. An encoder is ``{"source", "weights"}``, with
            ``"tokenizer"`` for text: the latter are hashes, or None where the files are not at hand.
        variants: Draws of hidden words for each caption.
        latent_channels, latent_side: Of the latents (C, h, w), h = w.
        clip_dim, t5_dim: Widths of the text features.
    """

    identity: dict[str, Any]
    variants: int
    latent_channels: int
    latent_side: int
    clip_dim: int
    t5_dim: int

    def differences(self, identity: Mapping[str, Any]) -> list[str]:
        """Keys in which a run's identity differs from the cache's, each with both values.

        Encoders are told apart by their weights where both sides know them, since folders are moved and copied, else by their source.
        """
        mine = self.identity
        return [
            f"{key} is {_told(identity.get(key))} here, but the cache was made with {_told(mine.get(key))}"
            for key in sorted(mine.keys() | identity.keys())
            if not _equal(mine.get(key), identity.get(key))
        ]


def write_header(folder: Path, header: CacheHeader) -> None:
    """Make a folder a cache.

    Raises:
        CacheError: it cannot be written.
    """
    path = folder / HEADER
    try:
        write_atomically(path, (json.dumps({"format": FORMAT, **asdict(header)}, indent=2) + "\n").encode())
    except OSError as error:
        raise CacheError(f"'{path}' cannot be written ({error.strerror}). Free some space, or make the cache in another folder.") from error


def read_header(folder: Path) -> CacheHeader:
    """The header of a cache.

    Raises:
        CacheError: there is none, or it cannot be read.
    """
    path = folder / HEADER
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        version = stored.pop("format")
        if version != FORMAT:
            raise CacheError(
                f"'{path}' is of format {version}, this version reads {FORMAT}. Make a cache in another folder: {make_command('OTHER')}"
            )
        return CacheHeader(**stored)
    except FileNotFoundError:
        raise CacheError(f"'{folder}' is no feature cache, it has no {HEADER}. Make one: {make_command(folder)}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CacheError(f"'{path}' cannot be read ({type(error).__name__}: {error}). Make a cache in another folder.") from error


def _equal(cached: Any, own: Any) -> bool:
    if isinstance(cached, dict) and isinstance(own, dict):
        known = [part for part in _HASHES if cached.get(part) and own.get(part)]
        return all(cached[part] == own[part] for part in known) and ("weights" in known or cached["source"] == own["source"])
    return bool(cached == own)


def _told(value: Any) -> str:
    if isinstance(value, dict):
        hashes = [f"{part} {value[part][:12]}" for part in _HASHES if value.get(part)]
        return json.dumps(value["source"]) + (f" ({', '.join(hashes)})" if hashes else "")
    return json.dumps(value)
