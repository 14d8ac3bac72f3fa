"""tools/write_shards.py as people type it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from contextlib import nullcontext

import pytest

from rdtf_ds.data.clips.places import read_place
from rdtf_ds.data.sources.shards import MAX_CLIP_BYTES
from rdtf_ds.data.sources.sources import list_clips
from tests.data.tars import member, write
from tests.small_models import load_tool


@pytest.fixture
def write_shards(project_root, capsys):
    """Calls the tool; returns exit code, standard output, standard error."""
    tool = load_tool(project_root, "write_shards")

    def call(*arguments):
        capsys.readouterr()
        code = tool.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    call.tool = tool
    return call


@pytest.fixture
def folder(tmp_path):
    """Three clips of a good half MB each, with captions and a group, and two that may not be opened."""
    root = tmp_path / "data"
    (root / "sub").mkdir(parents=True)
    for number, name in enumerate(("b.gif", "a.webp", "sub/c.mp4")):
        (root / name).write_bytes(bytes([number]) * 600_000)
    (root / "metadata.csv").write_text("file_name,text,group\na.webp,an a,first\nb.gif,a b,\n")
    (root / "sub" / "c.txt").write_text("a c")
    (root / "link.gif").symlink_to("b.gif")
    os.mkfifo(root / "fifo.gif")
    return root


def content(data) -> dict[str, tuple[str, str | None, bytes]]:
    """Caption, group and bytes by path, of what may be opened."""
    listing = list_clips(data)
    good = [(number, row) for number, row in enumerate(listing.table.to_pylist()) if row["fault"] is None]
    return {row["path"]: (row["caption"], row["group"], read_place(listing.place(number), 2**24)) for number, row in good}


def test_a_folder_becomes_shards_that_are_the_same_to_training(write_shards, folder, tmp_path):
    out = tmp_path / "out"
    code, told, err = write_shards(folder, out, "--shard_mb", 1)
    assert code == 0, err
    size = sum(shard.stat().st_size for shard in out.iterdir()) / 2**20
    assert f"{out}: 3 clips in 3 shards, {size:.1f} MB; 2 left out" in told
    link = "is a symbolic link, which is not followed. Put the file itself in its place"
    assert f"  fifo.gif: is a FIFO, not a file. Take it away\n  link.gif: {link}\n" in told
    assert told.endswith(f"Train from them with --data_dir {out}\n")
    assert content(out) == content(folder) and len(content(out)) == 3
    with tarfile.open(out / "000001.tar") as tar:
        assert tar.getnames() == ["000000001.json", "000000001.gif"]


def test_the_same_bytes_from_the_folder_a_manifest_and_shards(write_shards, folder, tmp_path):
    (folder / "m.csv").write_text("file_name,text,group\nsub/c.mp4,a c,\nb.gif,a b,\na.webp,an a,first\n")
    assert write_shards(folder, tmp_path / "1")[0] == write_shards(folder / "m.csv", tmp_path / "2")[0] == 0
    assert write_shards(tmp_path / "1", tmp_path / "3")[0] == 0
    written = [[(shard.name, shard.read_bytes()) for shard in sorted((tmp_path / name).iterdir())] for name in "123"]
    assert written[0] == written[1] == written[2] and len(written[0]) == 1


def test_bad_input_is_one_paragraph_and_exit_code_2(write_shards, folder, tmp_path):
    (tmp_path / "linked").symlink_to(folder)
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.gif").symlink_to(folder / "b.gif")
    (folder / "big.gif").write_bytes(bytes(2**20 + 1))
    cases = [
        ((tmp_path / "absent", tmp_path / "out"), "absent' does not exist"),
        ((folder, folder / "out"), "lies inside of"),
        ((tmp_path / "linked", folder / "sub" / "out"), "lies inside of"),
        ((folder, folder), "lies inside of"),
        ((folder, tmp_path), "is there already. Name a new folder"),
        ((folder, tmp_path / "circle"), "circle' is there already. Name a new folder"),
        ((tmp_path / "bad", tmp_path / "out"), "has no clip that may be opened; the first: a.gif: is a symbolic link"),
        ((folder, tmp_path / "out", "--shard_mb", 1), "has 1048577 bytes, which is more than --shard_mb 1. Give --shard_mb 2"),
        ((folder, folder / "b.gif" / "out"), "lies inside of"),
        ((tmp_path / "linked", "/dev/null/out"), "cannot be written"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for arguments, words in cases:
        code, told, err = write_shards(*arguments)
        assert (code, told) == (2, "") and words in err and err.count("\n") == 1, (arguments, err)
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(SystemExit):
        write_shards(folder, tmp_path / "out", "--shard_mb", 0)


def test_a_clip_that_no_header_can_tell_of_is_refused_before_it_is_read(write_shards, tmp_path):
    (tmp_path / "data").mkdir()
    with open(tmp_path / "data" / "long.mp4", "wb") as file:
        file.truncate(8 * 2**30)  # of holes alone
    code, told, err = write_shards(tmp_path / "data", tmp_path / "out", "--shard_mb", 10_000)
    assert (code, told) == (2, "") and "has 8589934592 bytes, and a shard holds clips of at most 8589934591" in err
    assert os.listdir(tmp_path) == ["data"]
    for size, fits in ((MAX_CLIP_BYTES, True), (MAX_CLIP_BYTES + 1, False)):
        header = tarfile.TarInfo("a")
        header.size = size
        with nullcontext() if fits else pytest.raises(ValueError, match="overflow"):
            header.tobuf(tarfile.USTAR_FORMAT)


def test_a_manifest_may_have_its_shards_beside_it(write_shards, folder):
    (folder / "m.csv").write_text("file_name\nb.gif\n")
    assert write_shards(folder / "m.csv", folder / "out")[0] == 0
    assert list(content(folder / "out")) == ["b.gif"]


def test_shards_that_call_their_clips_whatever_they_like(write_shards, tmp_path):
    """As others write them: a file_name without the suffix, or with that of what the clip was made from."""
    webp, parts = b"RIFF\0\0\0\0WEBP" + bytes(50), []
    for number, (name, data) in enumerate((("sticker 0", webp), ("sub/1.mov", webp), ("sticker 2", b"nothing known"), ("3.GIF", b"x"))):
        document = json.dumps({"file_name": name, "caption": f"c{number}"}).encode()
        parts += [member(f"{number}.json", document), member(f"{number}.webp", data)]
    (tmp_path / "theirs").mkdir()
    write(tmp_path / "theirs" / "0.tar", *parts)
    code, told, err = write_shards(tmp_path / "theirs", tmp_path / "ours")
    assert code == 0 and "3 clips in 1 shard" in told and "1 left out\n  sticker 2: is no clip, neither by its name (.gif, " in told, err
    theirs = content(tmp_path / "theirs")
    del theirs["sticker 2"]
    assert content(tmp_path / "ours") == theirs
    assert theirs == {"3.GIF": ("c3", None, b"x"), "sticker 0": ("c0", None, webp), "sub/1.mov": ("c1", None, webp)}
    with tarfile.open(tmp_path / "ours" / "000000.tar") as tar:
        assert [name for name in tar.getnames() if not name.endswith("json")] == ["000000000.gif", "000000001.webp", "000000002.webp"]


def test_a_clip_that_goes_away_meanwhile_is_told(write_shards, folder, tmp_path, monkeypatch):
    tool = write_shards.tool
    read = tool.read_place

    def read_and_remove(place, most):
        (folder / "b.gif").unlink(missing_ok=True)
        return read(place, most)

    monkeypatch.setattr(tool, "read_place", read_and_remove)
    code, told, _ = write_shards(folder, tmp_path / "out")
    assert code == 0 and "2 clips in 1 shard" in told and "3 left out" in told and "b.gif: cannot be read: No such file" in told
    assert list(content(tmp_path / "out")) == ["a.webp", "sub/c.mp4"]


def test_many_that_are_left_out_are_counted(write_shards, folder, tmp_path):
    for number in range(12):
        (folder / f"{number:02d}.gif").symlink_to("b.gif")
    _, told, _ = write_shards(folder, tmp_path / "out")
    assert "14 left out" in told and told.count("symbolic link") == 10 and "  and 4 more\n" in told


def test_interrupted_it_leaves_nothing(write_shards, folder, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(write_shards.tool, "read_place", interrupt)
    code, _, err = write_shards(folder, tmp_path / "out")
    assert code == 130 and "nothing of" in err and sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_as_a_command_it_starts_without_torch(project_root, folder, tmp_path):
    command = [sys.executable, project_root / "tools" / "write_shards.py", folder, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"})
    assert done.returncode == 0, done.stderr
    assert "3 clips in 1 shard" in done.stdout
    assert "| pyarrow" in done.stderr and "| torch" not in done.stderr


def test_real_clips_and_a_reader_that_is_not_ours(write_shards, real_data, tmp_path):
    assert write_shards(real_data / "stickers", tmp_path / "out", "--shard_mb", 4)[0] == 0
    clips = {}
    for shard in sorted((tmp_path / "out").iterdir()):
        assert shard.stat().st_size <= 4 * 2**20
        with tarfile.open(shard) as tar:
            clips |= {member.name: tar.extractfile(member).read() for member in tar if not member.name.endswith(".json")}
    files = sorted(path for path in (real_data / "stickers").iterdir() if path.suffix != ".jsonl")
    assert list(clips.values()) == [path.read_bytes() for path in files]
    assert content(tmp_path / "out") == content(real_data / "stickers")
