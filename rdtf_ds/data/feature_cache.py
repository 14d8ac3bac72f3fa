"""Features of the frozen encoders on disk, one file for each clip: what training reads when the encoders are not loaded.

A cache is a folder::

    cache.json                      what its features were made with: `CacheHeader`
    clips/3f/3f81….safetensors      `ClipFeatures` of one clip
    clips/3f/3f81….broken           in the place of one that could not be decoded: the reason

A clip goes by the hash of its bytes, which the index knows, and its caption (`clip_key`): one that changes is another clip, equal ones are
kept once, and the data folder may move. What its frames are chosen by is in the index, not here. Every file is written whole and renamed,
and what two processes write under one name is the same. Each row of a tensor has a checksum, which is compared whenever the row is read:
a sample costs a few rows, not the file.

Legend: F decoded frames of a clip (capped, thinned), C h w latent channels and size, T texts, L text tokens, Dc Dt widths of the CLIP and
T5 features.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from rdtf_ds.data.cache_header import CacheError, CacheHeader, make_command, read_header, write_header
from rdtf_ds.data.clips.writing import write_atomically
from rdtf_ds.data.indexing.index import ClipIndex
from rdtf_ds.data.sources.captions import NO_CAPTION, hide_words
from rdtf_ds.seeding import numpy_generator

_TOLD = "told"
_STORED, _BROKEN = ".safetensors", ".broken"
SHORT = 32
"""Letters of a key that tell it from every other: 128 bits."""


@dataclass(frozen=True, slots=True)
class ClipFeatures:
    """All that training may ask of one clip.

    Attributes:
        latents: (F, C, h, w), float32 or float16.
        texts: as `caption_texts` has them.
        clip, t5: (T, L, Dc) and (T, L, Dt), in the dtype the network computes in.
        pixels: RGB in [-1, 1] at latent size, (F, 3, h, w), for guidance by pixels; else None.
    """

    latents: torch.Tensor
    texts: tuple[str, ...]
    clip: torch.Tensor
    t5: torch.Tensor
    pixels: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class SampleFeatures:
    """Of k chosen frames and one text: latents (k, C, h, w), pixels (k, 3, h, w) or None, clip (L, Dc), t5 (L, Dt)."""

    latents: torch.Tensor
    pixels: torch.Tensor | None
    clip: torch.Tensor
    t5: torch.Tensor


def clip_key(content: str, caption: str) -> str:
    """Name of a clip in every cache, in hex: SHA-256 over its content's (`ClipIndex.content`) and its caption."""
    return hashlib.sha256(bytes.fromhex(content) + caption.encode()).hexdigest()


def caption_texts(caption: str, word_hide: float, variants: int) -> tuple[str, ...]:
    """The texts of a caption that are encoded, each once: it whole, with every word hidden, and ``variants`` draws of hidden words.

    The draws hang on the caption alone, so that every process and every rerun makes the same.
    """
    if not caption.strip():
        return (NO_CAPTION,)
    drawn = [hide_words(caption, word_hide, numpy_generator("caption variant", caption, number)) for number in range(variants)]
    return tuple(dict.fromkeys([caption, hide_words(caption, 1.0, numpy_generator("all")), *drawn]))


def nearest_text(texts: Sequence[str], wanted: str, rng: np.random.Generator) -> int:
    """Which text stands for the one that was drawn: the same if it is there, else any of the draws that hide some words.

    A whole caption and "no text" are always there; so only what lies between is taken from the few draws that were encoded.
    """
    if wanted in texts:
        return texts.index(wanted)
    return int(rng.integers(2, len(texts))) if len(texts) > 2 else 0


class FeatureCache:
    """A cache of whatever features its header tells of.

    Args:
        folder: with ``cache.json``.

    Raises:
        CacheError: there is no cache, or its header cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.header = read_header(self.folder)

    @classmethod
    def create(cls, folder: str | Path, header: CacheHeader) -> FeatureCache:
        """Begin a cache in a folder that has none."""
        write_header(Path(folder), header)
        return cls(folder)

    def make_command(self, data: str | Path = "DIR") -> str:
        """What to type to make, mend or extend this cache."""
        return make_command(self.folder, data)

    def require(self, identity: Mapping[str, Any]) -> None:
        """Refuse a cache that was made for another run.

        Raises:
            CacheError: names every key that differs, with both values.
        """
        if differing := self.header.differences(identity):
            raise CacheError(
                f"the feature cache '{self.folder}' does not fit this run: {'; '.join(differing)}. Restore these keys, or make a cache "
                f"for them in another folder: {make_command('OTHER')}"
            )

    def path(self, key: str) -> Path:
        """The file of a clip, whether it is there or not."""
        return self.folder / "clips" / key[:2] / f"{key}{_STORED}"

    def write(self, key: str, features: ClipFeatures) -> None:
        """Put a clip into the cache, in the place of whatever is there under its name.

        Raises:
            CacheError: the disk is full, or the folder may not be written.
        """
        tensors = {"latents": features.latents, "clip": features.clip, "t5": _trimmed(features.t5)}
        if features.pixels is not None:
            tensors["pixels"] = features.pixels
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        sums = {name: _checksums(tensors[name]) for name in sorted(tensors)}
        told = json.dumps({"sums": sums, "texts": features.texts, "t5_length": features.t5.shape[1]})
        # One entry, since safetensors writes several in any order, and equal clips should be equal files.
        self._put(self.path(key), save(tensors, {_TOLD: f"{zlib.crc32(told.encode())} {told}"}))
        self._broken_path(key).unlink(missing_ok=True)

    def open(self, key: str, name: str) -> StoredClip:
        """A clip of the cache, to read from.

        Args:
            name: the clip's, for messages.

        Raises:
            CacheError: it is not there, or damaged.
        """
        path = self.path(key)
        with self._blaming(path, name):
            return StoredClip(self, path, name)

    def flaw(self, key: str) -> str | None:
        """What is wrong with the file of a clip, all of it read; None: nothing."""
        try:
            self.open(key, key).verify()
        except CacheError as error:
            return str(error)
        return None

    def stored(self) -> tuple[np.ndarray, np.ndarray]:
        """Names of the clips that are there, and of those marked as broken, each cut to `SHORT` letters and sorted: S32 arrays.

        The folders are listed once, whatever the number of clips; nothing is opened.
        """
        found: dict[str, list[np.ndarray]] = {_STORED: [], _BROKEN: []}
        for number in range(256):
            names: dict[str, list[str]] = {_STORED: [], _BROKEN: []}
            try:
                with os.scandir(self.folder / "clips" / f"{number:02x}") as entries:
                    for entry in entries:
                        stem, dot, suffix = entry.name.rpartition(".")
                        if dot and f".{suffix}" in names:
                            names[f".{suffix}"].append(stem[:SHORT])
            except FileNotFoundError:
                continue
            for suffix, stems in names.items():
                found[suffix].append(np.array(sorted(stems), f"S{SHORT}"))
        nothing = np.array([], f"S{SHORT}")
        return np.concatenate([nothing, *found[_STORED]]), np.concatenate([nothing, *found[_BROKEN]])

    def mark_broken(self, key: str, reason: str) -> None:
        """Remember that a clip cannot be decoded, so that runs leave it out."""
        self._put(self._broken_path(key), reason.encode())

    def broken(self, key: str) -> str | None:
        """Why a clip could not be decoded, if it could not."""
        path = self._broken_path(key)
        return path.read_text(encoding="utf-8") if path.is_file() else None

    @staticmethod
    def _put(path: Path, data: bytes) -> None:
        try:
            write_atomically(path, data)
        except OSError as error:
            raise CacheError(f"'{path}' cannot be written ({error.strerror}). What was made so far is kept; free some space.") from error

    def _broken_path(self, key: str) -> Path:
        return self.path(key).with_suffix(_BROKEN)

    @contextmanager
    def _blaming(self, path: Path, name: str) -> Iterator[None]:
        """Errors of reading a file become one line that names the clip and the remedy."""
        try:
            yield
        except FileNotFoundError:
            raise CacheError(f"clip '{name}' is not in the feature cache '{self.folder}'. Extend it: {self.make_command()}") from None
        except (OSError, SafetensorError, ValueError, TypeError, LookupError) as error:
            raise CacheError(
                f"'{path}' of the feature cache is damaged (clip '{name}'): {error}. Have it made anew: {self.make_command()}"
            ) from error


class StoredClip:
    """One clip's file, of which rows are read as they are needed. Made by `FeatureCache.open`.

    Attributes:
        texts: T of them.
    """

    def __init__(self, cache: FeatureCache, path: Path, name: str) -> None:
        self._cache, self._path, self._name = cache, path, name
        self._file: Any = safe_open(path, framework="pt")
        checksum, _, text = self._file.metadata()[_TOLD].partition(" ")
        if zlib.crc32(text.encode()) != int(checksum):
            raise ValueError("the checksum of its header differs")
        told = json.loads(text)
        self._sums: dict[str, list[int]] = told["sums"]
        self.texts: tuple[str, ...] = tuple(told["texts"])
        self._t5_length: int = told["t5_length"]

    def take(self, frames: Sequence[int], text: int) -> SampleFeatures:
        """Features of some frames and one text.

        Raises:
            CacheError: the file is damaged there.
        """
        with self._cache._blaming(self._path, self._name):
            pixels = self._rows("pixels", frames) if "pixels" in self._sums else None
            clip, t5 = self._rows("clip", [text])[0], self._rows("t5", [text])[0]
            padded = t5.new_zeros(self._t5_length, t5.shape[1])
            padded[: len(t5)] = t5
            return SampleFeatures(self._rows("latents", frames), pixels, clip, padded)

    def verify(self) -> None:
        """Read everything.

        Raises:
            CacheError: the file is damaged.
        """
        with self._cache._blaming(self._path, self._name):
            for name, sums in self._sums.items():
                self._rows(name, range(len(sums)))
            if not len(self._sums["clip"]) == len(self._sums["t5"]) == len(self.texts):
                raise ValueError("its tensors do not belong together")

    def _rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        taken: torch.Tensor = self._file.get_tensor(name)[list(rows)]  # the tensor is the mapped file: only these rows are read
        for number, checksum in zip(rows, _checksums(taken), strict=True):
            if checksum != self._sums[name][number]:
                raise ValueError(f"the checksum of {name}[{number}] differs")
        return taken


def _checksums(rows: torch.Tensor) -> list[int]:
    """CRC-32 of each row."""
    return [zlib.crc32(row) for row in rows.contiguous().flatten(1).view(torch.uint8).numpy()]


def _trimmed(t5: torch.Tensor) -> torch.Tensor:
    """Without the tokens at the end that are zero in every text: T5's padding is, by `TextEncoders`, and most of a caption's 77 are."""
    used = (t5 != 0).any(dim=2).any(dim=0).nonzero()
    return t5[:, : int(used[-1]) + 1 if len(used) else 1]


@dataclass(frozen=True)
class CachedClips:
    """The clips of an index in a cache; their keys are made when they are asked for."""

    cache: FeatureCache
    index: ClipIndex

    def key(self, clip_id: int) -> str:
        """`clip_key` of a clip."""
        return clip_key(self.index.content(clip_id), self.index.caption(clip_id))

    def open(self, clip_id: int) -> StoredClip:
        """As `FeatureCache.open`."""
        return self.cache.open(self.key(clip_id), self.index.path(clip_id))
