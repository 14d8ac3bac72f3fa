"""A clip that could not be used: what the index lists, batches carry and the quarantine keeps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """One clip that could not be used.

    Attributes:
        path: relative to the data folder.
        sample_number: of the sample that met it; None if indexing found it.
        content: the clip's hash, as the index has it; empty if it has none.
    """

    path: str
    reason: str
    sample_number: int | None = None
    content: str = ""
