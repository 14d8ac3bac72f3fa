"""A file of prompts: a line each (.txt), or with pictures, seeds and settings of their own (.jsonl, .csv).

Pictures are looked for beside the file and in folders below it, nowhere else: a file from somebody else must not choose what of this
machine is read.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rdtf_ds.clip_requests import check_text
from rdtf_ds.errors import UserError
from rdtf_ds.generation.jobs import Job, refuse

SUFFIXES = (".txt", ".jsonl", ".csv")
_SLUG = 40  # characters of a prompt in a file's name
_DIGITS = 9  # of a frame's number; Python refuses to read thousands of them


class Prompts(NamedTuple):
    """``jobs`` in the file's order; ``told``: where each stands, by its name: ``{"0000_a-star": "prompts.txt, line 1"}``."""

    jobs: list[Job]
    told: dict[str, str]


def read_prompts(path: str | Path, defaults: Mapping[str, Any] | None = None, settled: Mapping[str, str] | None = None) -> Prompts:
    """The jobs of a file. Lines without a name are named after their number and their first words.

    Args:
        path: UTF-8. In .txt, blank lines and lines that start with ``#`` are passed over. In .jsonl and .csv, keys and columns are the
            fields of `Job`; ``pictures`` is ``{"0": "a.png"}``, in .csv ``0=a.png;7=b.png``.
        defaults: values of fields that a line does not give.
        settled: fields that no line may give, each with the reason.

    Raises:
        UserError: all lines that will not do, together, with their numbers.
    """
    path = Path(path)
    read = {".txt": _text_rows, ".jsonl": _json_rows, ".csv": _csv_rows}.get(path.suffix.lower())
    if read is None:
        raise UserError(f"'{path}': a file of prompts ends in {', '.join(SUFFIXES)}, not in '{path.suffix}'.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror or str(error)
        raise UserError(f"the prompts '{path}' cannot be read: {reason}.") from error
    jobs: list[Job] = []
    told: dict[str, str] = {}
    problems: list[str] = []
    for line, row in read(text):
        where = f"{path.name}, line {line}"
        try:
            if isinstance(row, str):
                raise UserError(row)
            job = _job(row, len(jobs), path.parent, defaults or {}, settled or {})
        except UserError as error:
            problems.append(f"{where}: {error}")
            continue
        if job.name in told:
            problems.append(f"{where}: the name '{job.name}' is that of {told[job.name].rpartition(', ')[2]} too.")
        told.setdefault(job.name, where)
        jobs.append(job)
    refuse(problems)
    if not jobs:
        raise UserError(f"the prompts '{path}' hold no prompt.")
    return Prompts(jobs, told)


def slug(prompt: str | None) -> str:
    """The first words of a prompt as part of a file's name: letters and digits of any script, ``-`` in between; ``clip`` for none."""
    words = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFKC", prompt or "").lower()).strip("-")
    return words[:_SLUG].rstrip("-") or "clip"


Rows = Iterator[tuple[int, "dict[str, Any] | str"]]
"""Line numbers, each with the line's fields, or with what is wrong with it."""


def _text_rows(text: str) -> Rows:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() and not line.startswith("#"):
            yield number, {"prompt": line.strip()}


def _json_rows(text: str) -> Rows:
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would cut at U+2028 inside of strings too
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_distinct)
            check_text("the line", json.dumps(row, ensure_ascii=False))
        except UserError as error:
            yield number, str(error)
            continue
        except (ValueError, RecursionError) as error:
            yield number, f"no JSON: {error}."
            continue
        yield number, row if isinstance(row, dict) else f'not an object like {{"prompt": "…"}} but {line.strip()[:40]}.'


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values; JSON itself would keep the last of equal keys."""
    names = [name for name, _ in pairs]
    if twice := _twice(names):
        raise UserError(f"'{twice}' stands there twice; leave one of them out.")
    return dict(pairs)


def _twice(names: Sequence[str]) -> str | None:
    return next((name for number, name in enumerate(names) if name in names[:number]), None)


def _csv_rows(text: str) -> Rows:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        columns = [name.strip() for name in reader.fieldnames or ()]
        if twice := _twice(columns):
            yield reader.line_num, f"the column '{twice}' stands there twice; leave one of them out."
            return
        for row in reader:
            if any(cell.strip() for cell in row.pop(None, None) or ()):  # blank ones are what spreadsheets leave behind
                yield reader.line_num, f"more cells than the {len(row)} columns; quote cells that hold commas."
                continue
            filled = {name.strip(): cell for name, cell in row.items() if cell is not None and cell.strip()}
            try:
                yield reader.line_num, {name: _cell(name, cell) for name, cell in filled.items()}
            except UserError as error:
                yield reader.line_num, str(error)
    except csv.Error as error:
        yield reader.line_num, f"{error}."


def _cell(name: str, cell: str) -> Any:
    """A cell as JSON would have it; what cannot be converted stays text, which its field then refuses."""
    if name == "pictures":
        pairs = [pair.partition("=") for pair in cell.split(";")]
        return _distinct([(number.strip(), file.strip()) for number, _, file in pairs])
    if name in ("prompt", "name", "sampler"):
        return cell
    try:
        return json.loads(f"[{cell}]" if "," in cell else cell)
    except (ValueError, RecursionError):
        return cell


def _job(row: dict[str, Any], number: int, folder: Path, defaults: Mapping[str, Any], settled: Mapping[str, str]) -> Job:
    values = {name: value for name, value in row.items() if value is not None}
    for name, value in values.items():
        if name not in _FIELDS:
            near = difflib.get_close_matches(name, _FIELDS, 1)
            raise UserError(f"'{name}' is not known here" + (f"; is '{near[0]}' meant?" if near else f"; known are {', '.join(_FIELDS)}."))
        if name in settled:
            raise UserError(f"it has its own {name}, but {settled[name]}; leave one of them out.")
        fits, wanted = _FIELDS[name]
        if not fits(value):
            raise UserError(f"{name} is {json.dumps(value, ensure_ascii=False)[:60]}; give {wanted}.")
    given = {int(key): _place(file, folder) for key, file in values.get("pictures", {}).items()}
    if len(given) < len(values.get("pictures", {})):
        raise UserError(f"pictures is {json.dumps(values['pictures'], ensure_ascii=False)[:60]}; a frame stands there twice.")
    values["pictures"] = given or defaults.get("pictures", {})
    values.setdefault("name", f"{number:04d}_{slug(values.get('prompt'))}")
    return Job(**{**defaults, **values})


def _place(file: str, folder: Path) -> Path:
    path = folder / file
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError) as error:  # a zero byte; links in a circle
        raise UserError(f"the picture {file[:60]!a} is no name of a file: {error}.") from error
    if not inside:
        raise UserError(
            f"the picture '{file}' is outside of the folder of the prompts; "
            "put it there or below, or the file of prompts into a folder that holds both."
        )
    return path


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can be
        return False


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_durations(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, list) and all(map(_is_whole, value)))


def is_frame_number(text: str) -> bool:
    """Whether a text is a frame's number, of at most so many digits as anyone's clips have."""
    return text.isdecimal() and len(text) <= _DIGITS


def _is_pictures(value: Any) -> bool:
    return isinstance(value, dict) and all(is_frame_number(key) and isinstance(file, str) and file for key, file in value.items())


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (_is_text, "a name for the file, without suffix"),
    "prompt": (_is_text, "a caption"),
    "pictures": (_is_pictures, 'files by frame number, {"0": "a.png"}, in .csv 0=a.png;7=b.png'),
    "seed": (_is_whole, "a whole number"),
    "frames": (_is_whole, "a whole number"),
    "steps": (_is_whole, "a whole number"),
    "sampler": (_is_text, "a sampler's name"),
    "eta": (_is_number, "a number from 0 to 1"),
    "text_scale": (_is_number, "a number"),
    "image_scale": (_is_number, "a number"),
    "durations_ms": (_is_durations, "milliseconds: one number, or one for each frame"),
}
