"""The folder appears whole or not at all: disks that are full, exports that were killed, names that are taken."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
from transformers import CLIPTokenizer

from rdtf_ds.errors import UserError
from rdtf_ds.export import weight_files
from rdtf_ds.export.exporting import export


def test_a_disk_that_is_full_when_the_weights_come_leaves_nothing(run, tmp_path, monkeypatch):
    def write_some(path, fill):
        path.write_bytes(b"begun")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(weight_files, "write_file", write_some)
    with pytest.raises(UserError, match="cannot write .*No space left on device.*make room"):
        export(run, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_tokenizer_that_cannot_be_written_is_named(run, tmp_path, monkeypatch):
    def refuse(self, folder, **named):
        raise Exception("No space left on device (os error 28)")  # as the tokenizers library says it

    monkeypatch.setattr(CLIPTokenizer, "save_pretrained", refuse)
    with pytest.raises(UserError, match=r"cannot write .*tokenizer': No space left.*make room"):
        export(run, tmp_path / "out")
    assert not any(tmp_path.iterdir())


FULL = """
import resource, sys
from rdtf_ds.export.exporting import export
from rdtf_ds.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
try:
    export(sys.argv[1], sys.argv[2])
except UserError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.parametrize("limit", [500, 100_000])
def test_a_disk_that_fills_up_leaves_nothing_half_written(run, tmp_path, limit):
    """No file may grow beyond so many bytes: the first config, or the text encoder's weights, written by libraries in their own way."""
    command = [sys.executable, "-c", FULL, str(run), str(tmp_path / "out"), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "cannot write" in done.stdout and "make room" in done.stdout
    assert not any(tmp_path.iterdir())


def test_what_killed_exports_left_is_removed(run, tmp_path, capsys):
    """Of this folder's exports, and only of those that have ended."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    alive = os.getppid()
    names = [f".out.{number}.partial" for number in (ended.pid, os.getpid(), alive, 1)] + [
        ".out.x.partial",
        ".other.999.partial",
        ".out.-1.partial",
    ]
    for name in names:
        (tmp_path / name / "unet").mkdir(parents=True)
    export(run, tmp_path / "out", "master")
    assert {path.name for path in tmp_path.iterdir()} == {"out", *names[2:]}
    said = capsys.readouterr().err
    assert said.count("Removed ") == 2 and f"Removed '{tmp_path / names[0]}', which an export that was killed had left." in said


def test_the_folder_one_is_in_is_no_name(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="'.' is no name of a folder to be made; name one, such as 'model'"):
        export(run, ".")
    assert not any(tmp_path.iterdir())


def test_out_must_be_free(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        export(run, tmp_path / "file")
    with pytest.raises(UserError, match="not empty"):
        export(run, tmp_path)
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    export(run, tmp_path / "empty")
    assert (tmp_path / "empty" / "model_index.json").is_file()
