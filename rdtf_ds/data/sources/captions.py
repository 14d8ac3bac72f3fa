"""Captions: the files they are read from, and how words of one are hidden from both text encoders.

Rows of ``file_name``, ``text`` and ``group`` come from a ``metadata.jsonl`` or ``metadata.csv`` (the Hugging Face folder convention) or a
manifest of the same form; a ``.txt`` holds the caption of one clip. What they are laid over is in `sources`.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from rdtf_ds.data.clips.clip import ClipError
from rdtf_ds.data.clips.places import open_regular, read_at, relative_name, unreadable
from rdtf_ds.data.sources.listing import RowBuffer
from rdtf_ds.errors import UserError

HIDDEN = "#"
NO_CAPTION = " ".join([HIDDEN] * 4)
"""What the encoders read where there is no caption at all, in training and generation: a caption with every word hidden."""
CLIP_SUFFIXES = (".gif", ".webp", ".png", ".apng", ".webm", ".mp4")
METADATA = ("metadata.jsonl", "metadata.csv")
MAX_TEXT_BYTES = 1 << 20
_QUOTE = "Quote texts that hold commas, quotes or line breaks, and write a quote inside of one twice."
_FIELDS = ("file_name", "text", "group")
ROWS = pa.schema([("file_name", pa.string()), ("text", pa.string()), ("group", pa.string()), ("line", pa.int64())])

_CJK = (
    "\u3005-\u3007"  # iteration mark, closing mark, zero
    "\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # Hiragana, Katakana
    "\u1100-\u11ff\u3131-\u318e\ua960-\ua97c\uac00-\ud7fb\uffa1-\uffdc"  # Hangul
    "\u3105-\u312f\u31a0-\u31bf"  # Bopomofo
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
)
_CJK_PUNCTUATION = "\u3001-\u3004\u3008-\u301c\u3030\u303d\u30a0\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
_WORD = re.compile(f"[{_CJK}]|[^\\s{_CJK}{_CJK_PUNCTUATION}]+")


def words(caption: str) -> list[str]:
    """The words of a caption, as `hide_words` tells them apart; punctuation stays with the word before or after it."""
    return _WORD.findall(caption)


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


def read_rows(file: Path, *, demand_text: bool) -> pa.Table:
    """The rows of a metadata file or a manifest, CSV or JSON lines.

    Args:
        demand_text: A row must have a text or a group; else ``file_name`` is enough.
    Returns:
        `ROWS`; a file_name is as `relative_name` makes it.
    Raises:
        UserError: It cannot be read, or a line is malformed or names a path outside of the file's folder.
    """
    rows = RowBuffer(ROWS)
    read = _json_lines if file.suffix.lower() == ".jsonl" else _csv_rows
    for number, row in read(file):
        where = f"{file}:{number}"
        _demand_names(row, where)
        name = row.get("file_name")
        try:
            text, group = text_of(row, "text"), group_of(row)
        except ValueError as error:
            raise UserError(f"{where}: {error}.") from error
        if not isinstance(name, str) or not name or (demand_text and text is None and group is None):
            needs = "file_name and text, both strings" if demand_text else "file_name, a string"
            raise UserError(f"{where} needs {needs}; it has {sorted(str(key) for key in row)}.")
        inside = relative_name(name)
        if inside is None:
            raise UserError(f"{where}: file_name '{_shown(name)}' leaves its folder. Name clips relative to '{file.name}', without '..'.")
        rows.add(inside, text, group, number)
    return rows.table()


def _demand_names(row: Mapping[str, object], where: str) -> None:
    """A caption or group under a name that is nearly the right one would be lost without a word."""
    for key, value in row.items():
        meant = _meant(key)
        if meant is not None and value not in (None, "") and row.get(meant) is None:
            raise UserError(f"{where} has '{_shown(key)}' and no '{meant}', which is what is read. Call it '{meant}'.")


@lru_cache
def _meant(key: str) -> str | None:
    """The field that a key of another spelling stands for; None if it is that field, or one of its own."""
    plain = key.strip().lower()
    meant = "text" if plain in ("caption", "captions") else plain
    return meant if meant in _FIELDS and key != meant else None


def read_caption_file(path: Path) -> str:
    """The caption in a ``.txt``.

    Raises:
        ClipError: It is no regular file, too long, or not UTF-8.
    """
    descriptor = open_regular(path)
    try:
        data = read_at(descriptor, 0, MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise unreadable(path, error) from error
    finally:
        os.close(descriptor)
    if len(data) > MAX_TEXT_BYTES:
        raise ClipError(path, f"is longer than {MAX_TEXT_BYTES} bytes")
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ClipError(path, "is not UTF-8 text") from error


def text_of(row: Mapping[str, object], *names: str) -> str | None:
    """The first of these fields that is there, without space around it; None if none is.

    Raises:
        ValueError: It is no text.
    """
    for name in names:
        value = row.get(name)
        if value is None:
            continue
        if not isinstance(value, str):
            raise ValueError(f"{name} is {json.dumps(value, default=str)[:40]}, not a string")
        if not _is_unicode(value):
            raise ValueError(f"{name} holds half of a surrogate pair, which no UTF-8 text can")
        return value.strip()
    return None


def group_of(row: Mapping[str, object]) -> str | None:
    """The group a row names, a string or a whole number; None if it names none.

    Raises:
        ValueError: It is neither.
    """
    value = row.get("group")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return text_of(row, "group") or None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


def _json_lines(file: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    for number, line in enumerate(_lines(file, "\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}:{number} is not JSON: {error}. Each line is one object with file_name and text.") from error
        if not isinstance(row, dict):
            raise UserError(f"{file}:{number} is not an object with file_name and text.")
        yield number, row


def _csv_rows(file: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    # strict: a quote that never ends would make one caption of all lines behind it
    reader = csv.DictReader(_lines(file, ""), strict=True)
    try:
        for row in reader:
            # DictReader has None for a cell the row is too short for, and a list under None for those it is too long for
            if any(cell.strip() for cell in row.get(None) or ()):  # a text with a bare comma would lose all behind it
                cells = f"more cells than the {len(reader.fieldnames or ())} columns of its first line"
                raise UserError(f"{file}:{reader.line_num} has {cells}. {_QUOTE}")
            yield reader.line_num, {key: value for key, value in row.items() if key is not None}
    except csv.Error as error:
        number = reader.line_num + 1  # where the row begins: a quote that is left open may end many lines further
        raise UserError(f"{file}:{number} is not CSV: {error}. {_QUOTE}") from error


def _lines(file: Path, newline: str) -> Iterator[str]:
    try:
        with open(open_regular(file), encoding="utf-8-sig", newline=newline) as text:  # editors on Windows write a byte-order mark
            number = 0
            while line := text.readline(MAX_TEXT_BYTES):
                number += 1
                if len(line) == MAX_TEXT_BYTES:
                    raise UserError(f"{file}:{number} is longer than {MAX_TEXT_BYTES} characters. A line is one clip.")
                yield line
    except ClipError as error:
        raise UserError(f"'{file}' {error.reason}. Put a regular file there.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"'{file}' cannot be read as UTF-8 text: {error}. Save it as UTF-8.") from error
