from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from rdtf_ds.checkpoints import durable
from rdtf_ds.checkpoints.durable import UNFINISHED, Digest, digest_file, remove_tree, replace_file, write_file


def test_the_digest_is_that_of_the_bytes_handed_over(tmp_path):
    pieces = [b"abc", bytearray(b"def"), np.arange(3, dtype=np.float16), memoryview(b""), np.zeros((0,), np.float32), np.arange(4)]
    whole = b"".join(bytes(memoryview(piece).cast("B")) for piece in pieces)
    digest = write_file(tmp_path / "x", lambda file: [file.write(piece) for piece in pieces])
    assert (tmp_path / "x").read_bytes() == whole
    assert digest == digest_file(tmp_path / "x") == Digest(len(whole), hashlib.sha256(whole).hexdigest())


def test_torch_files_are_hashed_as_they_are_written(tmp_path):
    digest = write_file(tmp_path / "x", lambda file: torch.save({"a": torch.arange(2_000_000)}, file))
    assert digest == digest_file(tmp_path / "x") and torch.equal(torch.load(tmp_path / "x")["a"], torch.arange(2_000_000))


def test_a_file_is_never_written_over(tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "x", lambda file: file.write(b"new"))
    assert (tmp_path / "x").read_text() == "old"


def test_replacing_leaves_the_old_file_until_the_new_one_is_whole(tmp_path, monkeypatch):
    replace_file(tmp_path / "x", b"old")
    (tmp_path / f"x{UNFINISHED}").write_text("of a kill")
    monkeypatch.setattr(durable.os, "fsync", lambda descriptor: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        replace_file(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"old"
    monkeypatch.undo()
    replace_file(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 1


def test_links_are_removed_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("x")
    tree = tmp_path / "tree"
    (tree / "inner").mkdir(parents=True)
    (tree / "inner" / "file").write_text("y")
    (tree / "link").symlink_to(outside)
    remove_tree(tree)
    assert not tree.exists() and (outside / "file").read_text() == "x"
