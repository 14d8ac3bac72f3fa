"""The one family of errors a user can cause and mend."""

from __future__ import annotations


class UserError(Exception):
    """Bad input: the message names the value, the key or file, and the remedy. Commands print it as one paragraph and exit 2."""
