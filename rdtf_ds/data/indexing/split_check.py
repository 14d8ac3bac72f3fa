"""What a split into training and validation looks like that nobody can have meant."""

from __future__ import annotations

import re

from rdtf_ds.data.indexing.index import ClipIndex


def split_doubts(index: ClipIndex) -> list[str]:
    """Warnings for people, most often none: a share to hold out that holds out nothing, a pattern for groups that finds none.

    Paths are read up to the first that the pattern matches, so all of them only where it matches none.
    """
    doubts = []
    fraction, pattern = index.settings.validation_fraction, index.settings.group_pattern
    if fraction > 0 and not index.counts()["held_out"]:
        doubts.append(
            f"rdtf.data.validation_fraction is {fraction:g}, but no clip of '{index.root}' is held out: too few groups for that share. "
            "Validation has no clip then that training does not see. Raise it, or make groups smaller, by rdtf.data.group_pattern or by "
            "the group column of the data."
        )
    if pattern is not None and not any(map(re.compile(pattern).search, index.file_paths())):
        doubts.append(
            f"rdtf.data.group_pattern is '{pattern}', which matches no path in '{index.root}', so it groups nothing. It is searched in "
            f"paths such as '{next(index.file_paths())}'."
        )
    return doubts
