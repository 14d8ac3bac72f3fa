"""How numbers are written for people."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """``1 clip``, ``2 clips``, ``0 clips``; of nouns that take an s."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
