"""What is listed of a manifest, and that it cannot leave its folder."""

from __future__ import annotations

import os

import pytest

from rdtf_ds.data.clips.places import read_place
from rdtf_ds.data.sources.sources import list_clips
from rdtf_ds.errors import UserError
from tests.data.sources.listings import faults, lines, listed, put, touch


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
