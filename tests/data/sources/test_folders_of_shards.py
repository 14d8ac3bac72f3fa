"""Shards beside loose clips: names that collide, shards that are cut or compressed, and that either way the same is listed."""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdtf_ds.data.clips.clip import Place
from rdtf_ds.data.clips.places import read_place
from rdtf_ds.data.sources import sources
from rdtf_ds.data.sources.shards import ShardWriter
from rdtf_ds.data.sources.sources import list_clips
from rdtf_ds.errors import UserError
from tests.data.sources.listings import captions, faults, lines, listed, put, touch
from tests.data.tars import member, write


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


PARTS = st.text(st.characters(exclude_characters="\0/", exclude_categories=("Cs",)), min_size=1, max_size=10)
PATHS = st.builds(
    lambda parts, suffix: "/".join(parts) + suffix,
    st.lists(PARTS.filter(lambda part: not part.startswith(".")), min_size=1, max_size=3),
    st.sampled_from([".gif", ".WebP", ".mp4"]),
)
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
