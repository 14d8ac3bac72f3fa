"""The one family of errors a user can cause and mend."""

from __future__ import annotations

from typing import TypeVar

from rdtf_ds.exit_codes import USER_ERROR

E = TypeVar("E", bound="UserError")


class UserError(Exception):
    """Bad input: the message names the value, the key or file, and the remedy. Commands print it as one paragraph and end.

    Attributes:
        everywhere: All ranks raise this same error together, so rank 0 speaks for them. Any other is told by each rank that meets it.
        exit_code: What the command exits with.
    """

    everywhere: bool = False
    exit_code: int = USER_ERROR


def on_every_rank(error: E) -> E:
    """``error``, marked as raised by all ranks alike: what they agreed on, or what each computes from the same values."""
    error.everywhere = True
    return error
