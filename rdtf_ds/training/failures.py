"""How a run ends when it cannot go on: one paragraph for what a user can mend, a file for what only a developer can."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path

from rdtf_ds.errors import UserError

USER_ERROR, BUG, INTERRUPTED = 2, 1, 130


def exit_code_of(command: Callable[[], None], run_folder: Callable[[], Path | None], with_traceback: bool) -> int:
    """Run ``command`` and turn its end into an exit code and a message on standard error.

    Args:
        run_folder: Where checkpoints are and a traceback goes; None or an unwritable one: the folder for temporary files.
        with_traceback: Show tracebacks instead.

    Returns:
        0, 2 for a `UserError`, 130 for Ctrl-C, 1 for a bug.
    """
    try:
        command()
        return 0
    except KeyboardInterrupt:
        _say_once(f"Interrupted; {_what_is_left(run_folder())}")
        return INTERRUPTED
    except UserError as error:
        if with_traceback:
            traceback.print_exc()
        elif _rank() == 0 or not error.everywhere:
            where = f" on rank {_rank()}" if _rank() else ""
            print(_paragraph(f"Error{where}: {_without_worker_traceback(error)}"), file=sys.stderr, flush=True)
        return USER_ERROR
    except Exception as error:
        if with_traceback:
            traceback.print_exc()
        else:
            path = _write_crash(run_folder())
            what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
            advice = f"This is a bug or a broken installation; the full traceback is in {path}."
            print(_paragraph(f"Error on rank {_rank()}: {what}. {advice}"), file=sys.stderr, flush=True)
        return BUG


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _say_once(text: str) -> None:
    if _rank() == 0:
        print(f"\n{text}", file=sys.stderr, flush=True)


def _what_is_left(folder: Path | None) -> str:
    steps = sorted(path.name for path in folder.glob("checkpoints/step*") if path.suffix != ".partial") if folder is not None else []
    if steps:
        return f"the same command goes on from the last complete checkpoint, {steps[-1]}."
    return "no checkpoint was written yet, so the same command starts from the beginning."


def _without_worker_traceback(error: UserError) -> str:
    """A loader worker's exception arrives with its traceback in the message; its own words come last."""
    text = str(error)
    if "Original Traceback" not in text:
        return text
    return re.split(rf"^\S*{type(error).__name__}: ", text, flags=re.MULTILINE)[-1]


def _paragraph(text: str) -> str:
    """Wrapped to a readable width; lines that were separate (a list of problems) stay so."""
    wrap = textwrap.TextWrapper(120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(wrap.fill(line) for line in text.strip().split("\n"))


def _write_crash(folder: Path | None) -> Path:
    name, text = f"crash_rank{_rank()}.txt", traceback.format_exc()
    for place in (folder, Path(tempfile.gettempdir())):
        if place is not None and place.is_dir():
            try:
                (place / name).write_text(text, encoding="utf-8")
                return place / name
            except OSError:
                continue
    sys.stderr.write(text)
    return Path("the lines above")
