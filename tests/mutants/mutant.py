"""What a wrong is, and how it is put into a file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One wrong.

    Attributes:
        name: what is wrong.
        file: of the code, from the project's folder.
        old: text that stands exactly once in the file.
        new: what takes its place.
        tests: files of tests, at least one of which must fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def applied_to(self, source: str) -> str:
        """The file with the wrong in it.

        Raises:
            ValueError: ``old`` does not stand exactly once in ``source``.
        """
        found = source.count(self.old)
        if found != 1:
            raise ValueError(f"{self.name}: {self.old!r} stands {found} times in {self.file}, it must stand there once")
        return source.replace(self.old, self.new)
