"""Shards: what is listed of them, what is refused, and the writer, read back by Python's tarfile."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdtf_ds.data.clips.clip import ClipError, Place
from rdtf_ds.data.clips.places import read_place
from rdtf_ds.data.sources.listing import LISTING
from rdtf_ds.data.sources.shards import ShardWriter, list_shard
from rdtf_ds.errors import UserError
from tests.data.tars import END, by_tarfile, member, raw, write

PARTS = st.text(st.characters(exclude_characters="\0/", exclude_categories=("Cs",)), min_size=1, max_size=12)
PATHS = st.builds(
    lambda parts, suffix: "/".join(parts) + suffix,
    st.lists(PARTS.filter(lambda part: part not in (".", "..")), min_size=1, max_size=3),
    st.sampled_from([".gif", ".webp", ".WEBP", ".mp4"]),
)
TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=30).map(str.strip)


def listed(path: Path, name: str = "s.tar") -> list[dict[str, Any]]:
    table = list_shard(path, name)
    assert table.schema == LISTING
    return table.to_pylist()


def faults(path: Path) -> dict[str, str | None]:
    return {row["path"]: row["fault"] for row in listed(path)}


def doc(**row: Any) -> bytes:
    return json.dumps(row).encode()


def test_captions_groups_and_names_beside_a_clip(tmp_path):
    shard = write(
        tmp_path / "s.tar",
        member("0.json", doc(file_name="./x/a.gif", text=" a cat ", group="cats")),
        member("0.gif", b"zero"),
        member("1.webp", b"one"),  # before its json, as tars of sorted names have it
        member("1.json", doc(caption="others' key", group=7)),
        member("2.GIF", b"two"),
        member("2.txt", b"\xef\xbb\xbf from a txt \n"),
        member("3.png", b"three"),
        member("3.cls", b"5"),
        member("3.json", doc(text=None, other=[1])),
        member("sub/4.a.mp4", b""),
        member("sub/4.json", doc(text="WebDataset's key")),
        member("sub/4.a.txt", b"ignored: the json goes first"),
        member("5.v1.gif", b"five"),
        member("5.v1.json", doc(text="its own")),
        member("5.json", doc(text="not this")),
        member("6.gif", b"six"),
        member("6.json", doc(text="the json", caption="not this")),
        member("6.txt", b"nor this"),
    )
    rows = listed(shard, "sub/s.tar")
    assert [(row["path"], row["caption"], row["group"]) for row in rows] == [
        ("x/a.gif", "a cat", "cats"),
        ("sub/s.tar/1.webp", "others' key", "7"),
        ("sub/s.tar/2.GIF", "from a txt", None),
        ("sub/s.tar/3.png", "", None),
        ("sub/s.tar/sub/4.a.mp4", "WebDataset's key", None),
        ("sub/s.tar/5.v1.gif", "its own", None),
        ("sub/s.tar/6.gif", "the json", None),
    ]
    status = shard.stat()
    clips = [found for found in by_tarfile(shard.read_bytes()) if found[0][-3:] in ("gif", "GIF", "ebp", "png", "mp4")]
    for row, (_, offset, size, data) in zip(rows, clips, strict=True):
        assert (row["file"], row["offset"], row["length"], row["size"], row["fault"]) == ("sub/s.tar", offset, size, size, None)
        assert row["mtime_ns"] == status.st_mtime_ns
        assert read_place(Place(shard, row["offset"], row["length"]), 99) == data


def test_hidden_members_folders_and_other_files_are_left_out(tmp_path):
    shard = write(
        tmp_path / "s.tar",
        member("./", kind=tarfile.DIRTYPE),
        member("a.gif/", kind=tarfile.DIRTYPE),
        member("._0.gif", b"a Mac's"),
        member(".cache/1.gif", b"x"),
        member("a/.b/2.gif", b"x"),
        member("readme.md", b"x"),
        member("0.npy", b"x"),
        member("./a/b.gif", b"x"),
    )
    assert faults(shard) == {"s.tar/a/b.gif": None}


def test_nothing_that_could_do_harm_is_read(tmp_path):
    link = {"linkname": "/etc/passwd"}
    shard = write(
        tmp_path / "s.tar",
        member("0.gif", kind=tarfile.SYMTYPE, **link),
        member("1.gif", kind=tarfile.LNKTYPE, **link),
        member("2.gif", kind=tarfile.CHRTYPE, devmajor=1, devminor=5),
        member("3.gif", kind=tarfile.FIFOTYPE),
        member("notes", kind=tarfile.SYMTYPE, **link),
        raw(b"/etc/4.gif", b"x"),
        raw(b"../../5.gif", b"x"),
        raw(b"a/../6.json", b"{}"),
        raw(b"\xff7.gif", b"x"),
        member("8.gif", b"x", pax_headers={"path": "8\0.gif"}),
        member("inner.tar", END),
        member("9.tar.gz", b"x"),
        member("10.TGZ", b"x"),
        member("inner.json", doc(file_name="good.gif")),
        member("good.gif", b"x"),
    )
    outside = "its name leaves the tar: it is absolute, empty or has '..' in it"
    nested = "a tar inside of a tar is not opened"
    assert faults(shard) == {
        "s.tar/0.gif": "is a symbolic link in a tar, which is not followed. Pack files themselves",
        "s.tar/1.gif": "is a link in a tar, which is not followed. Pack files themselves",
        "s.tar/2.gif": "is a device in a tar, which is not followed. Pack files themselves",
        "s.tar/3.gif": "is a FIFO in a tar, which is not followed. Pack files themselves",
        "s.tar/notes": "is a symbolic link in a tar, which is not followed. Pack files themselves",
        "s.tar//etc/4.gif": outside,
        "s.tar/../../5.gif": outside,
        "s.tar/a/../6.json": outside,
        "s.tar/\\xff7.gif": "its name is not UTF-8",
        "s.tar/8\\0.gif": outside,
        "s.tar/inner.tar": nested,
        "s.tar/9.tar.gz": nested,
        "s.tar/10.TGZ": nested,
        "s.tar/good.gif": None,
    }


@pytest.mark.parametrize(
    ("beside", "fault"),
    [
        (("0.json", b"{"), "its json is not JSON"),
        (("0.json", b"[" * 100_000), "its json is not JSON"),
        (("0.json", b"\xff{}"), "its json is not JSON"),
        (("0.json", b"[1]"), "its json is not a JSON object"),
        (("0.json", doc(text=["a"])), 'its json does not fit: text is ["a"], not a string'),
        (("0.json", doc(caption=1)), "its json does not fit: caption is 1, not a string"),
        (("0.json", doc(group=1.5)), "its json does not fit: group is 1.5, not a string"),
        (("0.json", doc(group=True)), "its json does not fit: group is true, not a string"),
        (("0.json", rb'{"text": "\ud800"}'), "its json does not fit: text holds half of a surrogate pair, which no UTF-8 text can"),
        (("0.json", doc(file_name="../a.gif")), "its json has a file_name that leaves the folder: it is absolute, empty or has '..' in it"),
        (("0.json", doc(file_name=3)), "its json has a file_name that leaves the folder: it is absolute, empty or has '..' in it"),
        (("0.json", b" " * 2**20 + b"{}"), "its json is longer than 1048576 bytes"),
        (("0.txt", b"\xff"), "its txt is not UTF-8 text"),
        (("0.txt", b" " * (2**20 + 1)), "its txt is longer than 1048576 bytes"),
        (("0.txt", b" " * 2**20), None),
        (("0.json", doc(file_name=None)), None),
    ],
)
def test_a_bad_caption_costs_its_clip_alone(tmp_path, beside, fault):
    shard = write(tmp_path / "s.tar", member("0.gif", b"x"), member(*beside), member("1.gif", b"x"), member("1.txt", b"fine"))
    assert faults(shard) == {"s.tar/0.gif": fault, "s.tar/1.gif": None}
    assert listed(shard)[1]["caption"] == "fine"


def test_of_a_tar_that_is_cut_short_the_members_before_are_listed(tmp_path):
    whole = member("0.gif", b"x" * 900) + member("0.txt", b"zero") + member("1.gif", b"y" * 900) + END
    cuts = ((len(whole) - 1024, 2, "ends without the empty"), (3900, 1, "is cut short inside of '1.gif'"), (700, 0, "inside of '0.gif'"))
    for length, kept, reason in cuts:
        shard = write(tmp_path / "s.tar", whole[:length], end=b"")
        *clips, rest = listed(shard)
        assert [row["path"] for row in clips] == [f"s.tar/{number}.gif" for number in range(kept)]
        assert all(row["fault"] is None for row in clips) and (not clips or clips[0]["caption"] == "zero")
        assert rest["path"] == "s.tar" and rest["file"] is None and rest["size"] == length
        assert reason in rest["fault"] and rest["fault"].endswith("; nothing is read from there on")


def test_a_tar_of_nothing_and_no_tar_at_all(tmp_path):
    assert listed(write(tmp_path / "s.tar")) == []
    (tmp_path / "s.tar").write_bytes(b"")
    assert "ends without" in listed(tmp_path / "s.tar")[0]["fault"]
    (tmp_path / "s.tar").write_bytes(b"GIF89a" * 1000)
    assert "damaged header at byte 0" in listed(tmp_path / "s.tar")[0]["fault"]
    os.mkfifo(tmp_path / "fifo.tar")
    with pytest.raises(ClipError, match="FIFO"):
        list_shard(tmp_path / "fifo.tar", "fifo.tar")


def test_a_disk_that_fails_is_the_machines_fault(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    shard = write(tmp_path / "s.tar", member("0.gif", b"x"))
    before = set(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(ClipError, match="cannot be read: Input/output error") as caught:
        list_shard(shard, "s.tar")
    assert caught.value.transient and set(os.listdir("/proc/self/fd")) == before


@given(st.dictionaries(PATHS, st.tuples(st.binary(max_size=1500), TEXTS, st.none() | TEXTS.filter(bool)), max_size=5))
def test_what_is_written_is_read_back(tmp_path_factory, clips):
    out = tmp_path_factory.mktemp("shards") / "out"
    with ShardWriter(out, 6000) as writer:
        for path, (data, caption, group) in clips.items():
            writer.add(path, data, caption, group)
    rows = [(shard, row) for shard in writer.close() for row in listed(shard, shard.name)]
    assert all(row["fault"] is None for _, row in rows)
    data = [read_place(Place(shard, row["offset"], row["length"]), 2000) for shard, row in rows]
    read = [(row["path"], (piece, row["caption"], row["group"])) for piece, (_, row) in zip(data, rows, strict=True)]
    assert read == list(clips.items())


def test_the_layout_as_tarfile_sees_it(tmp_path):
    with ShardWriter(tmp_path / "out", 4096) as writer:
        writer.add("b/é.WEBP", b"w" * 600, "ein Bär", "bears")
        writer.add("a.gif", b"g", "")
        writer.add("c.mp4", b"m" * 9000, "", "")
    assert writer.close() == [tmp_path / "out" / f"00000{number}.tar" for number in range(3)]
    assert not [name for name in os.listdir(tmp_path) if name != "out"]
    first, second, third = ([(name, data) for name, _, _, data in by_tarfile(shard.read_bytes())] for shard in writer.close())
    assert first == [
        ("000000000.json", '{"file_name": "b/é.WEBP", "text": "ein Bär", "group": "bears"}'.encode()),
        ("000000000.webp", b"w" * 600),
    ]
    assert second == [("000000001.json", b'{"file_name": "a.gif"}'), ("000000001.gif", b"g")]
    assert third[1] == ("000000002.mp4", b"m" * 9000)  # larger than a shard may be: it has its own
    with tarfile.open(writer.close()[0]) as tar:
        assert {(info.mtime, info.uid, info.gid, info.mode, info.uname, info.gname) for info in tar} == {(0, 0, 0, 0o644, "", "")}


def test_a_shard_is_filled_to_the_byte(tmp_path):
    clip = 512 + 512 + 512 + 1024  # its json and itself, with a header each
    for max_bytes, shards in ((2 * clip + 1024, 2), (2 * clip + 1023, 4)):
        with ShardWriter(tmp_path / str(max_bytes), max_bytes) as writer:
            for number in range(4):
                writer.add(f"{number}.gif", b"x" * 1000, "")
        assert len(writer.close()) == shards
        assert all(shard.stat().st_size <= max_bytes for shard in writer.close())


def test_the_same_bytes_every_time(tmp_path, monkeypatch):
    def written(out: Path) -> dict[str, bytes]:
        with ShardWriter(out, 3000) as writer:
            for number in range(5):
                writer.add(f"{number}.gif", bytes([number]) * 700, f"caption {number}")
        return {shard.name: shard.read_bytes() for shard in writer.close()}

    first = written(tmp_path / "a")
    monkeypatch.setattr("time.time", lambda: 0.0)
    os.umask(os.umask(0o077))
    assert written(tmp_path / "b") == first and len(first) == 5


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "new" / "out"
    with pytest.raises(KeyboardInterrupt), ShardWriter(out, 3000) as writer:
        for number in range(5):
            writer.add(f"{number}.gif", b"x" * 700, "")
        assert not out.exists()
        raise KeyboardInterrupt
    assert os.listdir(tmp_path / "new") == []
    with ShardWriter(out, 3000) as writer:
        writer.add("0.gif", b"x", "")
        left = tmp_path / "new" / ".out.partial"
        assert left.is_dir()
    assert os.listdir(tmp_path / "new") == ["out"] and os.listdir(out) == ["000000.tar"]


def test_what_a_killed_writer_left_is_cleared_away(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "000007.tar").write_bytes(b"half")
    with ShardWriter(tmp_path / "out", 3000) as writer:
        writer.add("0.gif", b"x", "")
    assert os.listdir(tmp_path / "out") == ["000000.tar"]


def test_a_place_that_is_taken(tmp_path):
    (tmp_path / "empty").mkdir()
    ShardWriter(tmp_path / "empty", 3000).close()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_bytes(b"x")
    (tmp_path / "file").write_bytes(b"x")
    for name in ("full", "file"):
        with pytest.raises(UserError, match=f"{name}' is there already. Name a new folder"):
            ShardWriter(tmp_path / name, 3000)
    assert (tmp_path / "full" / "mine").read_bytes() == b"x"
    with ShardWriter(tmp_path / "out", 3000), pytest.raises(UserError, match="is being written by another process"):
        ShardWriter(tmp_path / "out", 3000)


def test_a_link_to_an_empty_folder_stays_and_leads_to_the_shards(tmp_path):
    (tmp_path / "large_disk").mkdir()
    (tmp_path / "empty").symlink_to("large_disk")
    (tmp_path / "dangling").symlink_to("large_disk/new")
    for name, target in (("empty", "large_disk"), ("dangling", "large_disk/new")):
        with ShardWriter(tmp_path / name, 3000) as writer:
            writer.add("0.gif", b"x", "")
            assert (tmp_path / target).with_name(f".{Path(target).name}.partial").is_dir(), "not on the link's own disk"
        assert (tmp_path / name).is_symlink() and os.listdir(tmp_path / target) == ["000000.tar"]
        (tmp_path / target / "000000.tar").unlink()


def test_a_folder_that_cannot_be_replaced_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    (tmp_path / "volume").mkdir()
    monkeypatch.chdir(tmp_path / "volume")
    with pytest.raises(UserError, match=r"'.' cannot be replaced .* Name a new folder, say 'shards'"):
        ShardWriter(".", 3000)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "volume")
    with pytest.raises(UserError, match=r"volume' cannot be replaced .* Name a new folder, say '.*volume/shards'"):
        ShardWriter(tmp_path / "volume", 3000)
    assert os.listdir(tmp_path) == ["volume"]
    ShardWriter(tmp_path / "volume" / "shards", 3000).close()


@pytest.mark.parametrize("path", ["../a.gif", "/a.gif", "a//b.gif", "./a.gif", "a.tar", "a", ".gif", "\ud800.gif"])
def test_names_that_could_not_be_read_back_are_not_written(tmp_path, path):
    with ShardWriter(tmp_path / "out", 3000) as writer, pytest.raises(ValueError, match="cannot name a clip"):
        writer.add(path, b"x", "")
