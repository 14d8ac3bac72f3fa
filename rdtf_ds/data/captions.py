"""Captions: where they are read from, and how words of one are hidden from both text encoders.

A caption comes from a ``metadata.jsonl`` or ``metadata.csv`` (columns ``file_name`` and ``text``, the Hugging Face folder
convention; paths relative to that file) or from a ``.txt`` of the clip's own name beside it. Metadata goes before a sidecar.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from rdtf_ds.errors import UserError

HIDDEN = "#"
NO_CAPTION = " ".join([HIDDEN] * 4)
"""What the encoders read where there is no caption at all, in training and generation: a caption with every word hidden."""
CLIP_SUFFIXES = (".gif", ".webp", ".png", ".apng", ".webm", ".mp4")
_METADATA = ("metadata.jsonl", "metadata.csv")
_NAMED_AT_MOST = 5

_CJK = (
    "\u3005-\u3007"  # iteration mark, closing mark, zero
    "\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # Hiragana, Katakana
    "\u1100-\u11ff\u3131-\u318e\ua960-\ua97c\uac00-\ud7fb\uffa1-\uffdc"  # Hangul
    "\u3105-\u312f\u31a0-\u31bf"  # Bopomofo
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
)
_CJK_PUNCTUATION = "\u3001-\u3004\u3008-\u301c\u3030\u303d\u30a0\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
_WORD = re.compile(f"[{_CJK}]|[^\\s{_CJK}{_CJK_PUNCTUATION}]+")


def hide_words(caption: str, probability: float, rng: np.random.Generator) -> str:
    """Replace each word by ``#`` with a probability of its own; spaces and CJK punctuation stay.

    A word is a run without spaces, or a single character of a script that writes without them (Han, Kana, Hangul, Bopomofo).
    One number is drawn for each word, hidden or not, so that the same generator hides at least as much at a higher probability.

    Args:
        probability: 0..1; at 1 every word is hidden, which is how "no text" is told to the model.
    """
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"probability must be in 0..1, got {probability}")
    words = list(_WORD.finditer(caption))
    hidden = rng.random(len(words)) < probability  # random() < 1 always
    parts, end = [], 0
    for word, hide in zip(words, hidden, strict=True):
        parts += [caption[end : word.start()], HIDDEN if hide else word.group()]
        end = word.end()
    return "".join([*parts, caption[end:]])


def read_captions(root: str | Path) -> dict[str, str]:
    """All captions under a folder, by the clip's path relative to it, with ``/`` between folders.

    Raises:
        UserError: a metadata file is malformed, names an absent file or one outside the folder, or two of them disagree.
    """
    root = Path(root)
    captions: dict[str, str] = {}
    origin: dict[str, str] = {}
    absent: list[str] = []
    for metadata in sorted(path for name in _METADATA for path in root.rglob(name) if path.is_file()):
        read = _read_jsonl if metadata.suffix == ".jsonl" else _read_csv
        folder = metadata.parent.relative_to(root)
        for where, name, text in read(metadata):
            key = _inside(folder, name, where)
            if captions.setdefault(key, text) != text:
                raise UserError(f"{where} and {origin[key]} give '{key}' different captions. Keep one of them.")
            origin.setdefault(key, where)
            if not (root / key).is_file():
                absent.append(f"'{key}' ({where})")
    if absent:
        more = f" and {len(absent) - _NAMED_AT_MOST} more" if len(absent) > _NAMED_AT_MOST else ""
        raise UserError(
            f"{len(absent)} files named by metadata are absent from '{root}': {', '.join(absent[:_NAMED_AT_MOST])}{more}. "
            "Add the files, or take their lines out."
        )
    for sidecar in sorted(root.rglob("*.txt")):
        for suffix in CLIP_SUFFIXES:
            clip = sidecar.with_suffix(suffix)
            if clip.is_file():
                captions.setdefault(clip.relative_to(root).as_posix(), _read_text(sidecar).strip())
    return captions


def _inside(folder: Path, name: str, where: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{where}: file_name '{name}' leaves its folder. Name clips relative to the metadata file, without '..'.")
    return (PurePosixPath(folder.as_posix()) / path).as_posix()


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # editors on Windows write a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' cannot be read as UTF-8 text: {error}. Save it as UTF-8.") from error


def _read_jsonl(path: Path) -> Iterator[tuple[str, str, str]]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where} is not JSON: {error}. Each line is one object with file_name and text.") from error
        if not isinstance(row, dict):
            raise UserError(f"{where} is not an object with file_name and text.")
        yield where, *_row(row, where)


def _read_csv(path: Path) -> Iterator[tuple[str, str, str]]:
    reader = csv.DictReader(_read_text(path).splitlines(keepends=True))
    for row in reader:
        where = f"{path}:{reader.line_num}"
        yield where, *_row(row, where)


def _row(row: dict[str, object], where: str) -> tuple[str, str]:
    name, text = row.get("file_name"), row.get("text")
    if not isinstance(name, str) or not name or not isinstance(text, str):
        raise UserError(f"{where} needs file_name and text, both strings; it has {sorted(str(key) for key in row)}.")
    return name, text.strip()
