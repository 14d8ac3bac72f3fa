"""Tells a clip's format by its first bytes; a file's name says nothing."""

from __future__ import annotations

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
SNIFFED_BYTES = 12
VIDEO_FORMATS = ("webm", "mp4")  # decoded by decord; the others by Pillow
DEMUXERS = {"webm": "matroska", "mp4": "mp4"}
"""What FFmpeg is told to read them with: it may not guess, since other demuxers open other files."""


def sniff_format(start: bytes) -> str | None:
    """The format of a file from its first 12 bytes or more: gif, webp, png, webm, mp4, or None."""
    if start[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    if start[:8] == PNG_SIGNATURE:
        return "png"
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "webp"
    if start[:4] == b"\x1a\x45\xdf\xa3":
        return "webm"
    if start[4:8] == b"ftyp":
        return "mp4"
    return None
