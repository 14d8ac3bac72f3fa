"""What ``train.py`` exits with; `docs/faults.md` says what to do about each."""

from __future__ import annotations

DONE = 0
"""All steps are done, or ``OUT/stop`` asked to stop and a checkpoint was committed."""
BUG = 1
"""An error only a developer can mend. The ``deepspeed`` launcher also ends so after a signal of its own."""
USER_ERROR = 2
"""Input that does not do; nothing was lost."""
DISK = 74
"""The last checkpoint of the run could not be written; the one before it is whole."""
RESTART = 75
"""Run the same command again: stopped by a signal after a commit, or ended by the watchdog."""
DIVERGED = 76
"""Numbers went bad twice from the same checkpoint: running again would do so a third time."""
INTERRUPTED = 130
"""Ctrl-C; nothing was saved since the last checkpoint."""

MEANING = {
    DONE: "done, or stopped as asked",
    BUG: "a bug",
    USER_ERROR: "input that does not do",
    DISK: "a checkpoint could not be written",
    RESTART: "run the same command again",
    DIVERGED: "numbers went bad twice from the same checkpoint",
    INTERRUPTED: "interrupted",
}
"""In few words, for ``OUT/outcome.json``; codes above 128 that are not here are 128 + a signal."""
