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

from rdtf_ds.checkpoints.store import CheckpointStore
from rdtf_ds.errors import UserError
from rdtf_ds.exit_codes import BUG, DONE, INTERRUPTED, RESTART

_LOST_RANK = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|socket timeout", re.IGNORECASE)


def exit_code_of(command: Callable[[], int | None], run_folder: Callable[[], Path | None], with_traceback: bool) -> int:
    """Run ``command`` and turn its end into an exit code and a message on standard error.

    Args:
        run_folder: Where checkpoints are and a traceback goes; None or an unwritable one: the folder for temporary files.
        with_traceback: Show tracebacks instead.

    Returns:
        What ``command`` returned, that of a `UserError` (mostly 2), 130 for Ctrl-C, 1 for a bug.
    """
    try:
        return command() or DONE
    except KeyboardInterrupt:
        _say_once(f"Interrupted; {_what_is_left(run_folder())}")
        return INTERRUPTED
    except UserError as error:
        if with_traceback:
            traceback.print_exc()
        elif _rank() == 0 or not error.everywhere:
            where = f" on rank {_rank()}" if _rank() else ""
            print(_paragraph(f"Error{where}: {_without_worker_traceback(error)}"), file=sys.stderr, flush=True)
        return error.exit_code
    except Exception as error:
        if with_traceback:
            traceback.print_exc()
        if is_lost_rank(error):
            what = str(error).splitlines()[0] if str(error) else type(error).__name__
            _say(f"Rank {_rank()}: another rank is gone ({what}). {_what_is_left(run_folder()).capitalize()}")
            return RESTART
        if not with_traceback:
            path = _write_crash(run_folder())
            what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
            advice = f"This is a bug or a broken installation; the full traceback is in {path}."
            _say(f"Error on rank {_rank()}: {what}. {advice}")
        return BUG


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error says that a collective lost the other side: what kills that rank is told by its own supervisor."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in names or ("RuntimeError" in names and _LOST_RANK.search(str(error)) is not None)


def _say(text: str) -> None:
    print(_paragraph(text), file=sys.stderr, flush=True)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _say_once(text: str) -> None:
    if _rank() == 0:
        print(f"\n{text}", file=sys.stderr, flush=True)


def _what_is_left(folder: Path | None) -> str:
    committed = CheckpointStore(folder / "checkpoints").candidates() if folder is not None else []
    if committed:
        return f"the same command goes on from the last complete checkpoint, {committed[0].name}."
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
