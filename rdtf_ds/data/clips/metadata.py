"""What a clip says of how it was made: a JSON object in the file's own place for comments.

GIF: a comment extension; WebP: an XMP packet; PNG and APNG: an iTXt chunk; MP4 and WebM: the tag ``comment``. The text is ASCII
(what JSON escapes), since a GIF comment is 7-bit and XML refuses some characters, and it is the same in every format. It stands in an
object of one key, so that a comment of somebody else's program is not taken for ours. Sources: GIF89a (W3C), WebP Container
Specification (Google), XMP part 3 (ISO 16684-1), Portable Network Graphics 3rd edition (W3C).
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, unescape

import av

from rdtf_ds.data.clips.containers import end_of_sub_blocks, mp4_end, png_chunk, png_chunks, riff_chunk, riff_chunks, webm_end
from rdtf_ds.data.clips.headers import DEMUXERS, SNIFFED_BYTES, sniff_format
from rdtf_ds.errors import UserError

_KEY = "rdtf_ds"  # the one key of the object in a file
_PNG_KEYWORD = b"Comment"
_XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/">'
    '<dc:description><rdf:Alt><rdf:li xml:lang="x-default">{}</rdf:li></rdf:Alt></dc:description>'
    '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)
_XMP_TEXT = re.compile(r'<rdf:li xml:lang="x-default">([^<]*)</rdf:li>')
_ENDS = {"webm": webm_end, "mp4": mp4_end}
_CUT = "it is cut short, or something follows its end"


def to_comment(metadata: Mapping[str, Any]) -> str:
    """The text that stands in a file, the same for equal metadata: ASCII, keys sorted.

    Raises:
        TypeError, ValueError: a value that JSON has no form for, NaN and infinity among them.
    """
    return json.dumps({_KEY: dict(metadata)}, sort_keys=True, allow_nan=False, separators=(",", ":"))


def gif_block(comment: str) -> bytes:
    """A comment extension: sub-blocks of at most 255 bytes. No text, no block."""
    data = comment.encode("ascii")
    parts = (data[start : start + 255] for start in range(0, len(data), 255))
    return b"\x21\xfe" + b"".join(bytes([len(part)]) + part for part in parts) + b"\x00" if data else b""


def png_block(comment: str) -> bytes:
    """An uncompressed iTXt chunk without language. No text, no chunk."""
    return png_chunk(b"iTXt", _PNG_KEYWORD + b"\x00\x00\x00\x00\x00" + comment.encode("ascii")) if comment else b""


def webp_block(comment: str) -> bytes:
    """An XMP chunk; the text is its ``dc:description``. No text, no chunk."""
    return riff_chunk(b"XMP ", _XMP.format(escape(comment)).encode()) if comment else b""


def read_metadata(path: str | Path) -> dict[str, Any] | None:
    """The metadata that `write_clip` put into a file, or None for a clip without.

    Raises:
        UserError: there is no such file, it is no clip (GIF, WebP, PNG, APNG, MP4, WebM), or it is cut short.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            format = sniff_format(file.read(SNIFFED_BYTES))
        if format is None:
            raise UserError(f"'{path}' is no GIF, WebP, PNG, APNG, MP4 or WebM, so it holds no metadata of a clip.")
        comments = _video_comments(path, format) if format in DEMUXERS else _READERS[format](path.read_bytes())
        return next(filter(None, map(_from_comment, comments)), None)
    except FileNotFoundError as error:
        raise UserError(f"'{path}': there is no such file.") from error
    except (IndexError, struct.error) as error:
        raise UserError(f"'{path}' cannot be read: {_CUT}.") from error
    except (OSError, ValueError, av.FFmpegError) as error:
        raise UserError(f"'{path}' cannot be read: {error}.") from error


def _from_comment(comment: str) -> dict[str, Any] | None:
    """None for what others wrote."""
    try:
        found = json.loads(comment)
    except (ValueError, RecursionError):
        return None
    inner = found.get(_KEY) if isinstance(found, dict) else None
    return inner if isinstance(inner, dict) else None


def _gif_comments(data: bytes) -> list[str]:
    """All of them: only at the end is it known that the file has one."""
    comments, at = [], 13 + _palette_bytes(data[10])
    while data[at] != 0x3B:
        if data[at] == 0x21 and data[at + 1] == 0xFE:
            comments.append(_joined(data, at + 2).decode("latin-1"))
        # An extension is its label and sub-blocks; an image its place, palette, and size of codes before them.
        at = end_of_sub_blocks(data, at + 2 if data[at] == 0x21 else at + 11 + _palette_bytes(data[at + 9]))
    if at != len(data) - 1:
        raise OSError(_CUT)
    return comments


def _palette_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _joined(data: bytes, at: int) -> bytes:
    parts = []
    while data[at]:
        parts.append(data[at + 1 : at + 1 + data[at]])
        at += data[at] + 1
    return b"".join(parts)


def _png_comments(data: bytes) -> Iterator[str]:
    if data[-8:-4] != b"IEND":
        raise OSError(_CUT)
    for kind, body in png_chunks(data):
        keyword, _, rest = body.partition(b"\x00")
        if kind == b"iTXt" and keyword == _PNG_KEYWORD and rest[:1] == b"\x00":  # not compressed
            yield rest[2:].split(b"\x00", 2)[-1].decode("utf-8", "replace")


def _webp_comments(data: bytes) -> Iterator[str]:
    if 8 + struct.unpack_from("<I", data, 4)[0] > len(data):
        raise OSError(_CUT)
    for kind, body in riff_chunks(data):
        if kind == b"XMP ":
            yield from (unescape(text) for text in _XMP_TEXT.findall(body.decode("utf-8", "replace")))


def _video_comments(path: Path, format: str) -> Iterator[str]:
    with path.open("rb") as file:
        if _ENDS[format](file) > path.stat().st_size:
            raise OSError(_CUT)
    with av.open(path, format=DEMUXERS[format], metadata_errors="replace") as container:
        yield from (text for name, text in container.metadata.items() if name.lower() == "comment")


_READERS = {"gif": _gif_comments, "png": _png_comments, "webp": _webp_comments}
