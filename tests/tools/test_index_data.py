"""tools/index_data.py: makes an index that a run then opens, adds to it, and says what it found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rdtf_ds.data.clips.clip import ClipError
from rdtf_ds.data.indexing import examining
from rdtf_ds.data.synthetic import write_stickers
from rdtf_ds.experiment import load_experiment
from rdtf_ds.training.data_assembly import make_index
from tests.small_models import load_tool

Command = Callable[..., int]
BEARABLE = ("--set", "rdtf.data.max_bad_fraction=0.5")


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Six stickers, a copy of one under its caption, and three files that are no clips."""
    folder = tmp_path / "clips"
    write_stickers(folder, 6, 0, 32, suffixes=(".gif", ".webp"))
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    shutil.copy(folder / rows[0]["file_name"], folder / ("copy_of_" + rows[0]["file_name"]))
    rows.append({"file_name": "copy_of_" + rows[0]["file_name"], "text": rows[0]["text"]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("x.gif", "y.gif"):
        (folder / name).write_bytes(b"")
    (folder / "z.gif").write_bytes(b"not a picture")
    return folder


@pytest.fixture(scope="module")
def command(project_root: Path) -> Command:
    return load_tool(project_root, "index_data").main


def test_an_index_is_made_and_the_run_examines_nothing(command, clips, tmp_path, project_root, capsys, monkeypatch):
    config = str(project_root / "ds_configs" / "tiny_cpu.json")
    words = [str(clips), "--out", str(tmp_path / "index"), "--deepspeed_config", config, *BEARABLE]
    assert command(words) == 0
    told = capsys.readouterr().out
    assert "10 clips in" in told and "6 to train on" in told and "3 broken" in told
    assert "  2 broken: empty file: x.gif, y.gif\n  1 broken: not a GIF" in told
    assert "1 duplicate, 0 held out" in told and "10 files examined, " in told and " a second; " in told
    assert f"Train with it: --data_dir {clips} --set rdtf.data.index_dir={tmp_path / 'index'}" in told
    monkeypatch.setattr(examining, "DecoderPool", None)  # who examines now fails
    assert command(words) == 0
    assert "0 files examined; all others were known; " in capsys.readouterr().out
    experiment = load_experiment(config, [f"rdtf.data.index_dir={tmp_path / 'index'}"], data_dir=clips)
    index = make_index(experiment.rdtf, tmp_path / "run", torch.device("cpu"))
    assert len(index.trainable) == 6 and index.folder == tmp_path / "index" and not (tmp_path / "run").exists()


def test_what_is_new_is_added(command, clips, tmp_path, capsys):
    words = [str(clips), "--out", str(tmp_path / "index"), "--json", *BEARABLE]
    assert command(words) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["counts"]["files"] == first["examined"] == 10 and first["per_second"] > 0 < first["seconds"]
    assert [(reason["clips"], reason["first"]) for reason in first["broken"]] == [(2, ["x.gif", "y.gif"]), (1, ["z.gif"])]
    (clips / "new.gif").write_bytes(next(clips.glob("0*.gif")).read_bytes())
    assert command(words) == 0
    second = json.loads(capsys.readouterr().out)
    assert second["examined"] == 1 and second["counts"]["files"] == 11 and second["fingerprint"] != first["fingerprint"]


def test_keys_of_the_run_are_taken(command, clips, tmp_path, capsys):
    words = [str(clips), "--out", str(tmp_path / "index"), "--json", *BEARABLE, "--set", "rdtf.data.drop_duplicates=false"]
    assert command([*words, "--set", "rdtf.data.validation_fraction=0.5"]) == 0
    counts = json.loads(capsys.readouterr().out)["counts"]
    assert counts["trainable"] + counts["held_out"] == 7 and counts["duplicates"] == 0 and 0 < counts["held_out"] < 7
    assert command([*words, "--set", "rdtf.data.validation_fraction=0.5", "--set", "rdtf.data.group_pattern=^(.)"]) == 2
    assert "nothing to train on" in (told := capsys.readouterr().err) and "7 held out" in told, "groups 0 and c are both held out"
    assert command([*words, "--set", "rdtf.data.max_frames=16"]) == 0
    assert json.loads(capsys.readouterr().out)["examined"] == 10
    assert command([*words, "--set", "rdtf.data.max_frame=2"]) == 2
    assert "max_frames" in capsys.readouterr().err


def test_clips_that_failed_for_the_machines_sake_are_tried_again_when_asked_for(command, clips, tmp_path, capsys, monkeypatch):
    class Tired(examining.DecoderPool):
        def examine(self, place, *more, **options):
            if place.path.name.startswith("copy"):
                raise ClipError(place, "took too long", transient=True)
            return super().examine(place, *more, **options)

    words = [str(clips), "--out", str(tmp_path / "index"), *BEARABLE]
    with monkeypatch.context() as patch:
        patch.setattr(examining, "DecoderPool", Tired)
        assert command(words) == 0
    assert "1 broken: took too long: copy_of_" in capsys.readouterr().out
    assert command(words) == 0
    assert "1 broken: took too long" in capsys.readouterr().out
    assert command([*words, "--retry"]) == 0
    told = capsys.readouterr().out
    assert "took too long" not in told and "1 file examined" in told


def test_what_cannot_be_indexed_is_one_paragraph(command, clips, tmp_path, capsys):
    assert command([str(tmp_path / "absent"), "--out", str(tmp_path / "index")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert command([str(clips), "--out", str(clips / "metadata.jsonl" / "index")]) == 2
    assert "cannot be written (Not a directory)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command([str(clips)])


def test_an_interrupted_one_goes_on(command, clips, tmp_path, capsys, monkeypatch):
    class Interrupted(examining.DecoderPool):
        def examine(self, place, *more, **options):
            if place.path.name == "x.gif":
                raise KeyboardInterrupt
            return super().examine(place, *more, **options)

    words = [str(clips), "--out", str(tmp_path / "index"), *BEARABLE]
    with monkeypatch.context() as patch:
        patch.setattr(examining, "DecoderPool", Interrupted)
        assert command(words) == 130
    told = capsys.readouterr()
    assert "the same command goes on" in told.err and told.out == ""
    assert command([*words, "--json"]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["examined"] < 10


def test_more_broken_clips_than_a_run_allows_invite_nobody(command, clips, tmp_path, capsys):
    (clips / "w.gif").write_bytes(b"")
    words = [str(clips), "--out", str(tmp_path / "index"), "--set", "rdtf.data.max_bad_fraction=0.3"]
    assert command(words) == 1
    told = capsys.readouterr()
    assert "Train with it" not in told.out and "4 broken" in told.out
    assert "A run would not start from this index: 4 of 11 data files cannot be decoded" in told.err
    assert "rdtf.data.max_bad_fraction (0.3)" in told.err
    assert command([*words, "--json"]) == 1
    assert "4 of 11 data files" in json.loads(capsys.readouterr().out)["refused"]
    assert command([*words[:-1], "rdtf.data.max_bad_fraction=0.4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["refused"] is None


def test_a_split_that_splits_nothing_is_doubted(command, clips, tmp_path, capsys):
    words = [str(clips), "--out", str(tmp_path / "index"), *BEARABLE, "--set", "rdtf.data.validation_fraction=1e-9"]
    assert command([*words, "--set", "rdtf.data.group_pattern=^no"]) == 0
    told = capsys.readouterr().out
    assert "WARNING: rdtf.data.validation_fraction is 1e-09" in told and "WARNING: rdtf.data.group_pattern is '^no'" in told
    assert command([*words[:-2], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["doubts"] == []
