"""Tars for tests, made by Python's own tarfile or by hand."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

BLOCK = 512
END = bytes(2 * BLOCK)


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, *, format: int = tarfile.PAX_FORMAT, **fields: Any) -> bytes:
    """One member as tarfile writes it, with whatever headers a long or odd name takes."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info.tobuf(format, errors="surrogateescape") + data + bytes(-len(data) % BLOCK)


def raw(name: bytes, data: bytes = b"", **fields: bytes) -> bytes:
    """One member with a header made by hand: fields are placed as they are, then the checksum is set."""
    places = {"size": (124, 12), "kind": (156, 1), "magic": (257, 8), "prefix": (345, 155), "mtime": (136, 12), "extended": (482, 1)}
    header = bytearray(BLOCK)
    header[: len(name)] = name
    fields = {"size": b"%011o\0" % len(data), "kind": b"0", "magic": b"ustar\x0000", **fields}
    for key, value in fields.items():
        start, length = places[key]
        assert len(value) <= length
        header[start : start + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data + bytes(-len(data) % BLOCK)


def write(path: Path, *members: bytes, end: bytes = END) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(members) + end)
    return path


def by_tarfile(data: bytes) -> list[tuple[str, int, int, bytes]]:
    """Name, offset, size and bytes of the regular members, as tarfile reads them."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(info.name, info.offset_data, info.size, tar.extractfile(info).read()) for info in tar if info.isreg()]
