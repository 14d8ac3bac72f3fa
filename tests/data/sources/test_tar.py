"""The walk over a tar's headers, against Python's tarfile and against tars made by hand to do harm."""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdtf_ds.data.sources.tar import TarError, TarMember, TarWalk
from tests.data.tars import BLOCK, END, by_tarfile, member, raw

LETTERS = st.characters(exclude_characters="\0", exclude_categories=("Cs",))
NAMES = st.text(LETTERS, min_size=1, max_size=40).map(lambda name: name.strip("/"))
LONG = st.builds(lambda part, times: "/".join([part] * times), st.text("ab é猫.", min_size=1, max_size=30), st.integers(1, 20))


def walk(data: bytes) -> tuple[list[TarMember], str | None]:
    """The members, and the error that ended the walk."""
    seen: list[TarMember] = []
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        try:
            for found in TarWalk(file.fileno(), len(data)).members():
                seen.append(found)
        except TarError as error:
            return seen, str(error)
    return seen, None


@given(
    st.lists(st.tuples(st.one_of(NAMES, LONG).filter(bool), st.binary(max_size=1200)), max_size=6),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_the_same_as_tarfile(files, format):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format, encoding="utf-8") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    written = buffer.getvalue()
    members, error = walk(written)
    assert error is None
    assert [(found.name, found.offset, found.size) for found in members if found.kind == "file"] == [
        (name, offset, size) for name, offset, size, _ in by_tarfile(written)
    ]
    assert [written[found.offset :][: found.size] for found in members] == [data for _, data in files]


def test_reads_beside_the_walk():
    data = member("a.json", b"{}") + member("a.gif", b"x" * 9000) + member("b.json", b"[1]" * 3000) + END
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        tar = TarWalk(file.fileno(), len(data))
        read = {found.name: tar.read(found.offset, found.size) for found in tar.members()}
        assert read == {"a.json": b"{}", "a.gif": b"x" * 9000, "b.json": b"[1]" * 3000}
        assert tar.read(0, 6) == b"a.json"  # backwards


def test_one_read_a_clip(monkeypatch):
    reads = []
    whole = os.pread
    monkeypatch.setattr(os, "pread", lambda *place: reads.append(place) or whole(*place))
    members, _ = walk((member("a.json", b"{}") + member("a.gif", b"x" * 100_000)) * 10 + END)
    assert len(members) == 20 and len(reads) <= 15


@pytest.mark.parametrize(
    ("kind", "name", "word"),
    [
        (tarfile.LNKTYPE, "a", "link"),
        (tarfile.SYMTYPE, "a", "symbolic link"),
        (tarfile.CHRTYPE, "a", "device"),
        (tarfile.BLKTYPE, "a", "device"),
        (tarfile.FIFOTYPE, "a", "FIFO"),
        (tarfile.DIRTYPE, "a", "folder"),
        (tarfile.AREGTYPE, "a/", "folder"),
        (tarfile.AREGTYPE, "a", "file"),
        (tarfile.CONTTYPE, "a", "file"),
        (b"Z", "a", "member of unknown type"),
    ],
)
def test_kinds_and_what_comes_behind(kind, name, word):
    """A link states the size of what it links to, and yet has no data; what comes behind it is found."""
    size = b"%011o\0" % 1000 if word in ("link", "symbolic link", "device", "FIFO") else b"%011o\0" % 0
    members, error = walk(raw(name.encode(), kind=kind, size=size) + member("next", b"12") + END)
    assert error is None and [(found.name, found.kind) for found in members] == [(name, word), ("next", "file")]
    assert members[1].offset == 2 * BLOCK and members[1].size == 2


def test_sparse_files_are_stepped_over():
    old = raw(b"old", kind=b"S", magic=b"ustar  \0", extended=b"\1", size=b"%011o\0" % 700)
    more, last = bytes(504) + b"\1" + bytes(7), bytes(BLOCK)
    new = member("new", b"1" * 600, pax_headers={"GNU.sparse.major": "1", "GNU.sparse.name": "x"})
    members, error = walk(old + more + last + b"d" * 1024 + new + member("next", b"12") + END)
    assert error is None
    assert [(found.name, found.size, found.kind) for found in members] == [
        ("old", 700, "sparse file"),
        ("new", 600, "sparse file"),
        ("next", 2, "file"),
    ]
    assert walk(old + more)[1] == "is cut short inside of a header, at byte 1024"


def test_names_of_every_make():
    global_pax = raw(b"g", b"19 comment=nothing\n", kind=b"g")
    data = global_pax + raw(b"b.gif", prefix=b"a") + raw(b"c.gif", prefix=b"1234567", magic=b"ustar  \0")
    data += raw(b"\xff.gif") + raw(b"n" * 100)
    members, error = walk(data + raw(b"p", b"18 path=pax/d.gif\n", kind=b"x") + raw(b"cut", b"1") + raw(b"after") + END)
    assert error is None
    names = [found.name for found in members]
    assert names == ["a/b.gif", "c.gif", "\udcff.gif", "n" * 100, "pax/d.gif", "after"]


def test_a_global_record_holds_until_the_end_and_an_own_one_goes_before():
    data = raw(b"g", b"10 path=g\n", kind=b"g") + raw(b"1") + raw(b"x", b"10 path=x\n", kind=b"x") + raw(b"2") + raw(b"3") + END
    assert [found.name for found in walk(data)[0]] == ["g", "x", "g"]


def test_large_numbers_and_sizes_by_pax():
    base_256 = raw(b"a", b"x" * 700, size=b"\x80" + (700).to_bytes(11, "big"))
    by_pax = raw(b"p", b"12 size=600\n", kind=b"x") + raw(b"b", size=b"%011o\0" % 0) + b"y" * 600 + bytes(424)
    members, error = walk(base_256 + by_pax + raw(b"c", b"z" * 512) + END)
    assert error is None and [(found.name, found.size) for found in members] == [("a", 700), ("b", 600), ("c", 512)]


def test_signed_checksums_of_old_writers():
    header = bytearray(raw(b"\xff\xfe"))
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % (sum(header) - 512)
    assert [found.name for found in walk(bytes(header) + END)[0]] == ["\udcff\udcfe"]
    header[153] ^= 1
    assert walk(bytes(header) + END) == ([], "has a damaged header at byte 0")


GOOD = raw(b"good", b"1" * 600)


@pytest.mark.parametrize(
    ("rest", "error"),
    [
        (b"", "ends without the empty blocks that close a tar, at byte 1536"),
        (raw(b"cut", b"12" * 400)[:700], "is cut short inside of 'cut'"),
        (raw(b"cut")[:200], "is cut short inside of a header, at byte 1536"),
        (raw(b"n\xff", size=b"\x80" + b"\xff" * 11), "is cut short inside of 'n\\xff'"),
        (raw(b"x", size=b"\xff" * 12), "has a damaged header at byte 1536"),  # a negative size
        (raw(b"x", size=b"-1"), "has a damaged header at byte 1536"),
        (raw(b"x", size=b"0x10"), "has a damaged header at byte 1536"),
        (raw(b"x", size=b"1_0"), "has a damaged header at byte 1536"),
        (b"P" * 512, "has a damaged header at byte 1536"),
        (b"\0" * 100 + b"P" + bytes(411), "has a damaged header at byte 1536"),
        (raw(b"long", kind=b"L", size=b"%011o\0" % 2**30), "has a name of 1073741824 bytes at byte 2048"),
        (raw(b"long", b"abc", kind=b"L")[:-510], "is cut short inside of a name, at byte 2048"),
        (raw(b"p", b"99 path=x\n", kind=b"x"), "has a damaged pax record at byte 2048"),
        (raw(b"p", b"0 path=x\n", kind=b"x"), "has a damaged pax record at byte 2048"),
        (raw(b"p", b"-9 path=x\n", kind=b"x"), "has a damaged pax record at byte 2048"),
        (raw(b"p", b"9 path:x\n", kind=b"x"), "has a damaged pax record at byte 2048"),
        (raw(b"p", b"10 path=xy", kind=b"x"), "has a damaged pax record at byte 2048"),
        (raw(b"p", b"10 size=-\n", kind=b"x") + raw(b"x"), "has a damaged pax record before byte 3072"),
        (END + GOOD + END, "goes on behind its end mark at byte 1536, as tars do that were joined by cat: make one of its members"),
    ],
)
def test_what_cannot_be_followed_is_said_and_what_came_before_is_kept(rest, error):
    members, said = walk(GOOD + rest)
    assert said == error and [(found.name, found.offset, found.size) for found in members] == [("good", 512, 600)]


def test_any_amount_of_padding_ends_a_tar():
    for end in (bytes(BLOCK), END, bytes(10_240), bytes(1_000_000)):
        assert walk(GOOD + end)[1] is None


def test_a_million_pax_records_take_no_minutes():
    start = time.perf_counter()
    members, error = walk(raw(b"p", b"6 a=b\n" * 174_000, kind=b"x") + GOOD + END)
    assert error is None and len(members) == 1
    assert time.perf_counter() - start < 5


@given(st.binary(max_size=2048), st.integers(0, 5000), st.integers(1, 255))
def test_noise_ends_in_an_error_and_in_nothing_else(noise, at, flip):
    walk(noise)
    data = bytearray(GOOD + member("é" * 200, b"12", format=tarfile.GNU_FORMAT) + member("é" * 200, b"12") + END)
    data[at % len(data)] ^= flip
    members, _ = walk(bytes(data))
    assert all(0 <= found.offset <= found.offset + found.size <= len(data) for found in members)
