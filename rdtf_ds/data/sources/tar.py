"""Walks the headers of a tar: what its members are called and where their bytes lie. Nothing is extracted, no data is read.

Understands what tars in use are made of: POSIX ustar, pax records, GNU's long names, base-256 numbers and sparse headers. Python's
`tarfile` reads the same, but keeps every member, ends in silence at a damaged header as if the tar did, believes any length a header
states for a name, and asks the disk once for every header; a set of stickers has millions of members.

Source of the layout: POSIX.1-2017, pax, "ustar Interchange Format"; the GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rdtf_ds.data.clips.places import read_at

BLOCK = 512
_FILE, _FOLDER, _UNSIZED = b"07\0", b"5", b"123456"  # members of the last have no data, whatever their size says
PACKED_SUFFIXES = {".tar.gz": "gunzip", ".tgz": "gunzip", ".tar.bz2": "bunzip2", ".tar.xz": "unxz", ".tar.zst": "unzstd"}
"""Of compressed tars, and what makes plain ones of them."""
_PACKED_STARTS = {b"\x1f\x8b": ".tar.gz", b"BZh": ".tar.bz2", b"\xfd7zXZ\0": ".tar.xz", b"\x28\xb5\x2f\xfd": ".tar.zst"}
_KINDS = {b"1": "link", b"2": "symbolic link", b"3": "device", b"4": "device", b"6": "FIFO", b"S": "sparse file"}
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL = b"L", b"K", b"x", b"g"
_MOST_NAME_BYTES = 1 << 20
_AHEAD = 4096  # a clip, its caption and the next header are mostly found by one read
_TAIL = 1 << 16


class TarError(Exception):
    """The tar cannot be followed further; ``str()`` says where and why, for people."""


class PackedTarError(TarError):
    """It is compressed as a whole."""


@dataclass(frozen=True, slots=True)
class TarMember:
    """One member.

    Attributes:
        name: as written; bytes that are not UTF-8 are surrogates, as in names of files.
        offset: of its data in the tar, in bytes; ``size``: of the data.
        kind: "file", "folder", or what else it is: "link", "symbolic link", "device", "FIFO", "sparse file", "member of unknown type".
    """

    name: str
    offset: int
    size: int
    kind: str


class TarWalk:
    """The members of an open tar, in order, and short pieces of its data.

    Args:
        descriptor: of a file open for reading; the caller closes it.
        size: of the file, in bytes.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor, self._size = descriptor, size
        self._ahead, self._ahead_at = b"", 0

    def members(self) -> Iterator[TarMember]:
        """Members whose data is all there, up to the end mark.

        Raises:
            PackedTarError: It is compressed.
            TarError: The tar is cut short, a header is damaged, or there are bytes behind the end; what came before is good.
        """
        self._demand_plain()
        at = 0
        defaults: dict[str, str] = {}
        said: dict[str, str] = {}  # of the next member, by the members before it
        while True:
            header = self._header(at)
            if header is None:
                return
            kind, size = header[156:157], _number(header[124:136], at)
            at += BLOCK
            if kind in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL):
                data = self._name_data(at, size)
                if kind == _LONG_NAME:
                    said["path"] = _text(data.rstrip(b"\0"))
                elif kind == _PAX_GLOBAL:
                    defaults |= _pax_records(data, at)
                elif kind == _PAX:
                    said |= _pax_records(data, at)
                at += _padded(size)
                continue
            said = defaults | said
            if kind == b"S":
                at = self._skip_sparse_map(header, at)
            size = 0 if kind in _UNSIZED else _pax_size(said, size, at)
            name = said.get("path") or _ustar_name(header)
            if at + size > self._size:
                raise TarError(f"is cut short inside of '{_shown(name)}'")
            yield TarMember(name, at, size, _kind(kind, name, said))
            at += _padded(size)
            said = {}

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the tar, best of the member walked last."""
        start = offset - self._ahead_at
        if start < 0 or start + size > len(self._ahead):
            self._ahead, self._ahead_at, start = read_at(self._descriptor, offset, max(size, _AHEAD)), offset, 0
        return self._ahead[start : start + size]

    def _demand_plain(self) -> None:
        for start, suffix in _PACKED_STARTS.items():
            if self.read(0, len(start)) == start:
                raise PackedTarError(f"is a {suffix} by its first bytes. Name it so and unpack it: {PACKED_SUFFIXES[suffix]} FILE")

    def _header(self, at: int) -> bytes | None:
        """The header block at ``at``; None for the end mark, behind which there must be nothing."""
        header = self.read(at, BLOCK)
        if len(header) < BLOCK:
            what = "ends without the empty blocks that close a tar" if at == self._size else "is cut short inside of a header"
            raise TarError(f"{what}, at byte {at}")
        if not header.strip(b"\0"):
            if read_at(self._descriptor, at, _TAIL).strip(b"\0"):
                raise TarError(f"goes on behind its end mark at byte {at}, as tars do that were joined by cat: make one of its members")
            return None
        if not _sums_up(header, _number(header[148:156], at)):
            raise TarError(f"has a damaged header at byte {at}")
        return header

    def _name_data(self, at: int, size: int) -> bytes:
        if size > _MOST_NAME_BYTES:
            raise TarError(f"has a name of {size} bytes at byte {at}")
        data = self.read(at, size)
        if len(data) < size:
            raise TarError(f"is cut short inside of a name, at byte {at}")
        return data

    def _skip_sparse_map(self, header: bytes, at: int) -> int:
        goes_on = header[482]
        while goes_on:
            block = self.read(at, BLOCK)
            if len(block) < BLOCK:
                raise TarError(f"is cut short inside of a header, at byte {at}")
            goes_on, at = block[504], at + BLOCK
        return at


def _sums_up(header: bytes, stated: int) -> bool:
    """Whether the checksum fits: the sum of the header's bytes, its own taken as spaces. Some old writers summed signed bytes."""
    rest = header[:148] + b" " * 8 + header[156:]
    return stated == sum(rest) or stated == sum(rest) - 256 * sum(byte > 127 for byte in rest)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _kind(kind: bytes, name: str, said: dict[str, str]) -> str:
    if any(key.startswith("GNU.sparse.") for key in said):
        return "sparse file"
    if kind in _FILE:
        return "folder" if kind == b"\0" and name.endswith("/") else "file"  # before POSIX, the slash was all that told
    return "folder" if kind == _FOLDER else _KINDS.get(kind, "member of unknown type")


def _ustar_name(header: bytes) -> str:
    name, prefix = header[:100].split(b"\0", 1)[0], header[345:500].split(b"\0", 1)[0]
    return _text(prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name)  # GNU's magic has a space: other fields there


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _shown(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _number(field: bytes, at: int) -> int:
    """Octal digits, or from the top bit on a base-256 number."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if digits.strip(b"01234567"):
        raise TarError(f"has a damaged header at byte {at}")
    return int(digits or b"0", 8)


def _pax_size(said: dict[str, str], size: int, at: int) -> int:
    stated = said.get("size")
    if stated is None:
        return size
    if not stated.isascii() or not stated.isdigit() or len(stated) > 20:
        raise TarError(f"has a damaged pax record before byte {at}")
    return int(stated)


def _pax_records(data: bytes, at: int) -> dict[str, str]:
    """Records of the form "LENGTH KEY=VALUE\\n"; LENGTH counts itself."""
    records, start, stop = {}, 0, len(data.rstrip(b"\0"))
    while start < stop:
        length, _, _ = data[start : start + 20].partition(b" ")
        end = start + (int(length) if length.isdigit() else 0)
        key, equals, value = data[start + len(length) + 1 : end].partition(b"=")
        if not start + len(length) < end <= stop or not equals or value[-1:] != b"\n":
            raise TarError(f"has a damaged pax record at byte {at}")
        records[_text(key)] = _text(value[:-1])
        start = end
    return records
