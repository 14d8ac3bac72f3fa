"""What is listed of a folder of loose clips, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rdtf_ds.data.clips.clip import Place
from rdtf_ds.data.sources.sources import list_clips
from rdtf_ds.errors import UserError
from tests.data.sources.listings import faults, lines, listed, put, touch
from tests.data.tars import END

# Files.


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


def test_a_folder_of_nothing_but_links_says_so(tmp_path):
    touch(tmp_path / "elsewhere", "a.gif")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "set").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="has no clips.*'set' is a symbolic link, which is not followed: put the folder itself"):
        list_clips(tmp_path / "data")


def test_links_in_a_circle_are_passed_over(tmp_path):
    touch(tmp_path, "a.gif")
    (tmp_path / "round").symlink_to("round")
    (tmp_path / "there").symlink_to("back")
    (tmp_path / "back").symlink_to("there")
    assert [row["path"] for row in listed(tmp_path)] == ["a.gif"]


# Captions and groups.


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
