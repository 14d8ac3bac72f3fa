"""What is listed of a folder, of a manifest and of shards, and what is refused."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdtf_ds.data.clips.clip import Place
from rdtf_ds.data.clips.places import read_place
from rdtf_ds.data.sources import sources
from rdtf_ds.data.sources.listing import LISTING
from rdtf_ds.data.sources.shards import ShardWriter
from rdtf_ds.data.sources.sources import list_clips
from rdtf_ds.errors import UserError
from tests.data.tars import END, member, write

PARTS = st.text(st.characters(exclude_characters="\0/", exclude_categories=("Cs",)), min_size=1, max_size=10)
PATHS = st.builds(
    lambda parts, suffix: "/".join(parts) + suffix,
    st.lists(PARTS.filter(lambda part: not part.startswith(".")), min_size=1, max_size=3),
    st.sampled_from([".gif", ".WebP", ".mp4"]),
)


def put(root: Path, **files: str | bytes) -> Path:
    """Files by name; ``__`` stands for a slash and ``_DOT_`` for a dot."""
    for key, content in files.items():
        path = root / key.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def listed(root: Path, cache: Path | None = None) -> list[dict[str, Any]]:
    listing = list_clips(root, cache)
    assert listing.table.schema == LISTING
    listing.table.validate(full=True)
    paths = listing.table["path"].to_pylist()
    assert paths == sorted(set(paths), key=str.encode)
    return listing.table.to_pylist()


def captions(root: Path) -> dict[str, str]:
    return {row["path"]: row["caption"] for row in listed(root)}


def faults(root: Path) -> dict[str, str | None]:
    return {row["path"]: row["fault"] for row in listed(root)}


def lines(*rows: dict[str, Any]) -> str:
    return "\n".join(json.dumps(row) for row in rows)


# Folders.


def test_a_row_says_where_a_file_lies_and_how_it_looks_from_outside(tmp_path):
    touch(tmp_path, "sub/é.GIF")
    os.utime(tmp_path / "sub" / "é.GIF", ns=(3, 12_345))
    (row,) = listed(tmp_path)
    assert row == {
        "path": "sub/é.GIF",
        "file": None,
        "offset": 0,
        "length": -1,
        "size": 10,
        "mtime_ns": 12_345,
        "caption": "",
        "group": None,
        "fault": None,
    }
    listing = list_clips(str(tmp_path))
    assert listing.place(0) == Place(tmp_path / "sub" / "é.GIF") and listing.root == tmp_path


def test_clips_of_all_suffixes_in_order_and_nothing_hidden(tmp_path):
    touch(tmp_path, "b.gif", "a/z.webp", "a.b.png", "a-b.apng", "Z.WEBM", "é.mp4", "猫.gif", "a b .gif", "x.jpg", "gif")
    touch(tmp_path, ".hidden/x.gif", ".x.gif", "a/._z.webp", ".s.tar", "..a/x.gif")
    assert list(faults(tmp_path)) == ["Z.WEBM", "a b .gif", "a-b.apng", "a.b.png", "a/z.webp", "b.gif", "é.mp4", "猫.gif"]


def test_what_is_no_file_is_a_fault_and_never_opened(tmp_path, monkeypatch):
    root = touch(tmp_path / "data", "a.gif", "sub/b.gif")
    outside = touch(tmp_path / "outside", "c.gif", "s.tar")
    os.mkfifo(root / "fifo.gif")
    os.mkfifo(root / "fifo.tar")
    (root / "link.gif").symlink_to("a.gif")
    (root / "link.tar").symlink_to(outside / "s.tar")
    (root / "out.webp").symlink_to(outside / "c.gif")
    (root / "sub" / "loop").symlink_to(root)  # a linked folder is not entered
    (root / "there").symlink_to(outside)
    (root / "folder.gif").mkdir()  # a folder like any other
    touch(root, "folder.gif/d.gif")
    opened = []
    whole = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest, **more: opened.append(str(path)) or whole(path, *rest, **more))
    link, fifo = "is a symbolic link, which is not followed. Put the file itself in its place", "is a FIFO, not a file. Take it away"
    assert faults(root) == {
        "a.gif": None,
        "fifo.gif": fifo,
        "fifo.tar": fifo,
        "folder.gif/d.gif": None,
        "link.gif": link,
        "link.tar": link,
        "out.webp": link,
        "sub/b.gif": None,
    }
    assert opened == []


def test_names_that_are_not_utf8(tmp_path):
    for name in (b"\xff.gif", b"d\xfe/a.gif", b"\xff.tar", b"fine.gif", b"d\xfe/metadata.csv"):
        path = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name)))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"file_name,text\na.gif,x")
    fault = "its name is not UTF-8. Rename it"
    assert faults(tmp_path) == {"\\xff.gif": fault, "\\xff.tar": fault, "d\\xfe/a.gif": fault, "fine.gif": None}


def test_a_folder_and_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    touch(tmp_path, "a.gif", "closed/b.gif", "c.gif")
    scan = os.scandir

    def refuse(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert faults(tmp_path) == {"a.gif": None, "c.gif": None, "closed": "cannot be read: Permission denied"}
    with pytest.raises(UserError, match=r"closed' cannot be read \(Permission denied\)"):
        list_clips(tmp_path / "closed")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("absent", "absent' does not exist.*a folder of clips, one of .tar shards, or a manifest.*--data_dir"),
        ("clip.gif", "clip.gif' is a file, and no manifest.*--data_dir"),
        ("s.tar", "s.tar' is a file, and no manifest"),
        ("empty", "empty' has no clips: none of its files ends in .gif, .webp"),
        ("only.csv", "only.csv' names no clips. Each row needs a file_name"),
    ],
)
def test_a_root_that_cannot_be_used(tmp_path, name, words):
    put(tmp_path, clip_DOT_gif="x", s_DOT_tar=END, empty__readme_DOT_md="x", only_DOT_csv="file_name,text\n")
    with pytest.raises(UserError, match=words):
        list_clips(tmp_path / name)


# Captions and groups of loose clips.


def test_metadata_and_sidecars_in_folders(tmp_path):
    touch(tmp_path, "a.gif", "b.webp", "sub/c.png", "sub/d.mp4", "sub/e.gif", "sub/f.gif", "g.h.gif")
    put(
        tmp_path,
        metadata_DOT_jsonl=lines({"file_name": "a.gif", "text": "a cat"}, {"file_name": "sub/c.png", "text": "see", "group": "s"}),
        sub__metadata_DOT_csv='file_name,text,group\r\nd.mp4,"two, words",9\r\ne.gif,,9\r\n',
        a_DOT_txt="not this one",
        sub__e_DOT_txt="metadata has an empty text",
        sub__f_DOT_txt=" side\n",
        g_DOT_h_DOT_txt="two dots",
        readme_DOT_txt="no clip of mine",
    )
    assert [(row["path"], row["caption"], row["group"]) for row in listed(tmp_path)] == [
        ("a.gif", "a cat", None),
        ("b.webp", "", None),
        ("g.h.gif", "two dots", None),
        ("sub/c.png", "see", "s"),
        ("sub/d.mp4", "two, words", "9"),
        ("sub/e.gif", "", "9"),
        ("sub/f.gif", "side", None),
    ]


def test_a_group_alone_leaves_the_caption_to_the_sidecar(tmp_path):
    touch(tmp_path, "a.gif")
    put(tmp_path, metadata_DOT_jsonl=lines({"file_name": "a.gif", "group": "g"}), a_DOT_txt="side")
    (row,) = listed(tmp_path)
    assert (row["caption"], row["group"]) == ("side", "g")


def test_absent_files_are_counted_and_the_first_named(tmp_path):
    touch(tmp_path, "a.gif", ".hidden/h.gif", "notes.md")
    (tmp_path / "linked").symlink_to(".hidden")
    names = [f"{name}.gif" for name in "abcd"] + [".hidden/h.gif", "linked/h.gif", "notes.md", "e.gif", "f.gif"]
    put(tmp_path, metadata_DOT_jsonl=lines(*({"file_name": name, "text": "x"} for name in names)))
    with pytest.raises(UserError) as caught:
        list_clips(tmp_path)
    message = str(caught.value)
    assert message.startswith("7 files are named by metadata and absent from") and "'a.gif'" not in message and "notes.md" not in message
    assert f"'b.gif' ({tmp_path / 'metadata.jsonl'}:2)" in message and "and 2 more" in message and "'e.gif'" not in message
    assert "'.hidden/h.gif' lies in a hidden or linked folder" in message and "'linked/h.gif' lies in a hidden" in message


@pytest.mark.parametrize(("key", "kind"), [("text", "captions"), ("group", "groups")])
def test_metadata_that_disagrees(tmp_path, key, kind):
    touch(tmp_path, "sub/a.gif")
    same = {"file_name": "a.gif", "text": "x", "group": "g"}
    other = {**same, "file_name": "sub/a.gif"}
    put(tmp_path, metadata_DOT_jsonl=lines(other, other), sub__metadata_DOT_jsonl=lines(same))
    assert listed(tmp_path)[0]["caption"] == "x"
    put(tmp_path, sub__metadata_DOT_jsonl=lines({**same, key: "y"}))
    with pytest.raises(UserError, match=rf"sub/metadata.jsonl:1 and .*/metadata.jsonl:1 give 'sub/a.gif' different {kind}. Keep one"):
        list_clips(tmp_path)


def test_a_bad_sidecar_costs_its_clip_and_bad_metadata_ends_it_all(tmp_path):
    touch(tmp_path, "a.gif", "b.gif", "c.gif", "d.gif", "e.gif")
    put(tmp_path, a_DOT_txt=b"\xff", d_DOT_txt="fine", e_DOT_txt=b"\xff", metadata_DOT_csv="file_name,text\ne.gif,from metadata\n")
    (tmp_path / "b.txt").symlink_to("d.txt")
    os.mkfifo(tmp_path / "c.txt")
    assert faults(tmp_path) == {
        "a.gif": "its caption a.txt is not UTF-8 text",
        "b.gif": "its caption b.txt is a symbolic link, which is not followed. Put the file itself in its place",
        "c.gif": "its caption c.txt is a FIFO, not a file. Take it away",
        "d.gif": None,
        "e.gif": None,
    }
    (tmp_path / "metadata.csv").unlink()
    os.mkfifo(tmp_path / "metadata.csv")
    with pytest.raises(UserError, match="metadata.csv' is a FIFO"):
        list_clips(tmp_path)


# Manifests.


def test_a_manifest_names_all_there_is(tmp_path):
    touch(tmp_path, "a.gif", "sub/b.webp", ".hidden/c.mp4", "unnamed.gif", "sub/b.txt")
    put(tmp_path, metadata_DOT_jsonl="not looked at", s_DOT_tar="nor this")
    put(tmp_path, m_DOT_csv="file_name,text,group\n./sub/b.webp,see,g\n.hidden/c.mp4,,\na.gif,x\n./a.gif,x\n")
    expected = [(".hidden/c.mp4", "", None), ("a.gif", "x", None), ("sub/b.webp", "see", "g")]
    assert [(row["path"], row["caption"], row["group"]) for row in listed(tmp_path / "m.csv")] == expected
    rows = [{"file_name": path, "text": text or None, "group": group} for path, text, group in expected]
    put(tmp_path, m_DOT_JSONL=lines(*rows))
    assert [(row["path"], row["caption"], row["group"]) for row in listed(tmp_path / "m.JSONL")] == expected
    listing = list_clips(tmp_path / "m.csv")
    assert listing.root == tmp_path and read_place(listing.place(2), 99) == b"sub/b.webp"
    assert listed(tmp_path / "m.csv")[1]["mtime_ns"] == (tmp_path / "a.gif").stat().st_mtime_ns


def test_a_clip_of_a_manifest_without_a_text_takes_its_txt(tmp_path):
    touch(tmp_path, "a.gif", "b.gif", "c.gif", "d.gif", "sub/e.gif")
    put(tmp_path, a_DOT_txt="beside a", b_DOT_txt="beside b", d_DOT_txt=b"\xff")
    (tmp_path / "sub" / "e.txt").symlink_to("../a.txt")
    rows = [{"file_name": "a.gif"}, {"file_name": "b.gif", "text": "said of b"}, {"file_name": "c.gif"}, {"file_name": "d.gif"}]
    put(tmp_path, m_DOT_jsonl=lines(*rows, {"file_name": "sub/e.gif", "text": None}))
    captions = [row["caption"] for row in listed(tmp_path / "m.jsonl")]
    assert captions == ["beside a", "said of b", "", "", ""]
    assert faults(tmp_path / "m.jsonl") == {
        **dict.fromkeys(("a.gif", "b.gif", "c.gif")),
        "d.gif": "its caption d.txt is not UTF-8 text",
        "sub/e.gif": "its caption e.txt is a symbolic link, which is not followed. Put the file itself in its place",
    }


@pytest.mark.parametrize("name", ["../out/c.gif", "sub/../../out/c.gif", "there/c.gif", "sub/deep/c.gif"])
def test_a_manifest_cannot_leave_its_folder(tmp_path, name):
    root = touch(tmp_path / "data", "a.gif", "sub/b.gif")
    outside = touch(tmp_path / "data2", "c.gif")
    (root / "there").symlink_to(outside)
    (root / "sub" / "deep").symlink_to("../../data2")
    put(root, m_DOT_csv=f"file_name\na.gif\n{name}\n")
    with pytest.raises(UserError, match=rf"m.csv:3: file_name '{name}' leaves its folder"):
        list_clips(root / "m.csv")
    put(root, m_DOT_csv=f"file_name\n{outside}/c.gif\n")
    with pytest.raises(UserError, match=r"m.csv:2: file_name '/.*c.gif' leaves its folder"):
        list_clips(root / "m.csv")


def test_a_manifest_may_go_by_a_link_that_stays_inside_even_if_its_own_folder_is_one(tmp_path):
    root = touch(tmp_path / "data", "sub/b.gif")
    (root / "again").symlink_to("sub")
    (tmp_path / "link").symlink_to("data")
    put(root, m_DOT_csv="file_name\nagain/b.gif\n")
    assert faults(tmp_path / "link" / "m.csv") == {"again/b.gif": None}


def test_what_a_manifest_names_amiss(tmp_path):
    touch(tmp_path, "a.gif", "b.jpg", "s.tar")
    (tmp_path / "c.gif").symlink_to("a.gif")
    os.mkfifo(tmp_path / "d.gif")
    (tmp_path / "e.gif").mkdir()
    put(tmp_path, m_DOT_csv="file_name,text\na.gif,x\nb.jpg,x\nc.gif,x\nd.gif,x\ne.gif,x\ns.tar,x\n")
    no_clip = "is no clip by its name: it ends in none of .gif, .webp, .png, .apng, .webm, .mp4"
    assert faults(tmp_path / "m.csv") == {
        "a.gif": None,
        "b.jpg": no_clip,
        "c.gif": "is a symbolic link, which is not followed. Put the file itself in its place",
        "d.gif": "is a FIFO, not a file. Take it away",
        "e.gif": "is a folder, not a file. Rename it, or take it away",
        "s.tar": no_clip,
    }
    put(tmp_path, m_DOT_csv="file_name,text\na.gif,x\n" + "".join(f"{number}.gif,x\n" for number in range(7)))
    with pytest.raises(UserError, match=r"7 files .*absent.*'0.gif' \(.*m.csv:3\).*'4.gif' \(.*m.csv:7\) and 2 more. Add the files"):
        list_clips(tmp_path / "m.csv")
    put(tmp_path, m_DOT_csv="file_name,text\na.gif,x\na.gif,y\n")
    with pytest.raises(UserError, match="m.csv:3 and .*m.csv:2 give 'a.gif' different captions"):
        list_clips(tmp_path / "m.csv")


# Shards.


def test_a_folder_of_loose_clips_and_shards(tmp_path):
    touch(tmp_path, "b.gif", "sub/x.gif")
    document = b'{"file_name": "a.gif", "text": "in a shard"}'
    write(tmp_path / "sub" / "s.tar", member("0.json", document), member("0.gif", b"AAA"), member("1.gif", b"B"))
    put(tmp_path, metadata_DOT_csv="file_name,text\nb.gif,loose\n")
    listing = list_clips(tmp_path)
    assert captions(tmp_path) == {"a.gif": "in a shard", "b.gif": "loose", "sub/s.tar/1.gif": "", "sub/x.gif": ""}
    assert [read_place(listing.place(row), 99) for row in range(4)] == [b"AAA", b"b.gif", b"B", b"sub/x.gif"]
    assert listing.place(0) == Place(tmp_path / "sub" / "s.tar", 1536, 3)
    put(tmp_path, metadata_DOT_csv="file_name,text\na.gif,metadata is of loose clips alone\n")
    with pytest.raises(UserError, match="'a.gif'"):
        list_clips(tmp_path)


def test_two_clips_of_one_name(tmp_path):
    touch(tmp_path, "a.gif", "z.gif")
    claim = member("0.json", b'{"file_name": "a.gif"}') + member("0.gif", b"x")
    write(tmp_path / "1.tar", claim, member("7.gif", b"y"), member("7.gif", b"yy"))
    write(tmp_path / "2.tar", claim, member("1.json", b'{"file_name": "1.tar/7.gif"}'), member("1.gif", b"x"))
    same = "has the same name as another clip: "
    assert faults(tmp_path) == {
        "1.tar/7.gif": None,
        "1.tar/7.gif@1.tar@3584": same + "1.tar/7.gif",
        "1.tar/7.gif@2.tar@3584": same + "1.tar/7.gif",
        "a.gif": None,
        "a.gif@1.tar@1536": same + "a.gif",
        "a.gif@2.tar@1536": same + "a.gif",
        "z.gif": None,
    }
    rows = {row["path"]: row for row in listed(tmp_path)}
    assert rows["a.gif"]["file"] is None and rows["1.tar/7.gif"]["size"] == 1


def test_names_that_are_made_to_collide_again(tmp_path):
    touch(tmp_path, "a.gif")
    doc = b'{"file_name": "%s"}'
    first, second = doc % b"a.gif", doc % b"a.gif@1.tar@1536"
    write(tmp_path / "1.tar", member("0.json", first), member("0.gif"), member("1.json", second), member("1.gif"))
    same = "has the same name as another clip: "
    assert faults(tmp_path) == {
        "a.gif": None,
        "a.gif@1.tar@1536": same + "a.gif",
        "a.gif@1.tar@1536@1.tar@3072": same + "a.gif@1.tar@1536",
    }


def test_a_cut_shard_beside_whole_ones_and_a_link_to_one(tmp_path):
    write(tmp_path / "1.tar", member("0.gif", b"x"), member("1.gif", b"y" * 600)[:700], end=b"")
    write(tmp_path / "2.tar", member("0.gif", b"x"))
    assert faults(tmp_path) == {
        "1.tar": "is cut short inside of '1.gif'; nothing is read from there on",
        "1.tar/0.gif": None,
        "2.tar/0.gif": None,
    }
    assert sources.list_clips(tmp_path, tmp_path / ".cache").table.equals(list_clips(tmp_path, tmp_path / ".cache").table)
    assert len(list((tmp_path / ".cache").iterdir())) == 2


CLIPS = st.tuples(st.binary(max_size=20), st.sampled_from(["", "猫 é"]), st.sampled_from([None, "g"]))


@given(st.dictionaries(PATHS, CLIPS, min_size=1, max_size=5))
def test_a_folder_its_manifest_and_its_shards_are_the_same(tmp_path_factory, clips):
    root = tmp_path_factory.mktemp("any")
    kept = {}
    for path, (data, caption, group) in clips.items():
        try:
            (root / "data" / path).parent.mkdir(parents=True, exist_ok=True)
            with open(root / "data" / path, "xb") as file:
                file.write(data)
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            continue  # one name is a folder of another
        kept[path] = (caption, group, data)
    rows = [{"file_name": path, "text": caption, "group": group} for path, (caption, group, _) in kept.items()]
    put(root / "data", metadata_DOT_jsonl=lines(*rows))
    put(root / "data", m_DOT_jsonl=lines(*rows))
    folder, manifest = list_clips(root / "data"), list_clips(root / "data" / "m.jsonl")
    with ShardWriter(root / "out", 3000) as writer:
        for number, row in enumerate(folder.table.to_pylist()):
            writer.add(row["path"], read_place(folder.place(number), 99), row["caption"], row["group"])
    shards = list_clips(root / "out")
    assert manifest.table.equals(folder.table)
    for listing in (folder, shards):
        found = listing.table.to_pylist()
        assert all(row["fault"] is None and row["size"] == len(kept[row["path"]][2]) for row in found)
        read = {row["path"]: (row["caption"], row["group"], read_place(listing.place(n), 99)) for n, row in enumerate(found)}
        assert read == kept and list(read) == sorted(kept, key=str.encode)
    shutil.rmtree(root)


def test_many_rows_pass_through_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("rdtf_ds.data.sources.listing._PIECE", 7)
    names = [f"{number:03d}.gif" for number in range(100)]
    touch(tmp_path / "d", *names)
    rows = [{"file_name": name, "text": f"t{name}"} for name in names[::2]]
    put(tmp_path / "d", **{"metadata_DOT_jsonl": lines(*rows), "001_DOT_txt": "side"})
    write(tmp_path / "d" / "s.tar", *(member(f"{number}.gif", b"x") + member(f"{number}.txt", b"%d" % number) for number in range(30)))
    found = captions(tmp_path / "d")
    assert found == {
        **{name: f"t{name}" if number % 2 == 0 else "side" * (number == 1) for number, name in enumerate(names)},
        **{f"s.tar/{number}.gif": str(number) for number in range(30)},
    }
    assert isinstance(list_clips(tmp_path / "d").table["file"].type, pa.DictionaryType)


@pytest.mark.parametrize(
    ("suffix", "pack", "tool"),
    [(".tar.gz", gzip.compress, "gunzip"), (".TGZ", gzip.compress, "gunzip"), (".tar.xz", lzma.compress, "unxz"),
     (".tar.bz2", bz2.compress, "bunzip2"), (".tar.zst", lambda data: b"\x28\xb5\x2f\xfd" + data, "unzstd")],
)  # fmt: skip
def test_a_compressed_shard_says_how_to_unpack_it(tmp_path, suffix, pack, tool):
    write(tmp_path / "1.tar", member("0.gif", b"x"))
    packed = pack((tmp_path / "1.tar").read_bytes())
    (tmp_path / f"2{suffix}").write_bytes(packed)
    (tmp_path / "3.tar").write_bytes(packed)
    found = faults(tmp_path)
    assert found.pop("1.tar/0.gif") is None and set(found) == {f"2{suffix}", "3.tar"}
    assert found[f"2{suffix}"] == f"is compressed, and shards are read where they lie. Unpack it: {tool} FILE"
    assert found["3.tar"].startswith("is a .tar.") and found["3.tar"].endswith(f"Name it so and unpack it: {tool} FILE")


def test_a_folder_of_nothing_but_links_says_so(tmp_path):
    touch(tmp_path / "elsewhere", "a.gif")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "set").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="has no clips.*'set' is a symbolic link, which is not followed: put the folder itself"):
        list_clips(tmp_path / "data")
