"""tools/cache_dataset.py: makes a cache, goes on with one, says what it did and why it does not."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rdtf_ds.data import cache_header
from rdtf_ds.data.clips.clip import ClipError
from rdtf_ds.data.feature_cache import FeatureCache
from rdtf_ds.data.synthetic import write_stickers
from rdtf_ds.training import cache_making
from tests.small_models import load_tool

Command = Callable[..., int]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_stickers(folder, 6, 0, 32)
    return folder


@pytest.fixture
def arguments(project_root: Path, tmp_path: Path, clips: Path) -> list[str]:
    config = project_root / "ds_configs" / "tiny_cpu.json"
    return ["--deepspeed_config", str(config), "--data_dir", str(clips), "--out", str(tmp_path / "cache")]


@pytest.fixture(scope="module")
def command(project_root: Path) -> Command:
    return load_tool(project_root, "cache_dataset").main


def contents(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((cache / "clips").rglob("*")) if path.is_file()}


def test_a_cache_is_made_gone_on_with_and_mended(command, arguments, tmp_path, capsys):
    assert command(arguments) == 0
    told = capsys.readouterr()
    assert "6 clips made, 0 there before, 0 not decodable" in told.out and "clips: " in told.err
    assert f"--set rdtf.memory.encoders=cached --set rdtf.memory.cache_dir={tmp_path / 'cache'}" in told.out
    made = contents(tmp_path / "cache")
    assert len(made) == 6 and FeatureCache(tmp_path / "cache").header.variants == 8
    victim = next((tmp_path / "cache").rglob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:100])
    assert command(arguments) == 0
    assert "1 clip made, 5 there before, 0 not decodable" in capsys.readouterr().out
    assert contents(tmp_path / "cache") == made, "what is made again is the same, bit by bit"


def test_an_interrupted_one_goes_on(command, arguments, tmp_path, monkeypatch, capsys):
    write, left = FeatureCache.write, iter(range(2))

    def interrupted(self, key, features):
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(self, key, features)

    monkeypatch.setattr(FeatureCache, "write", interrupted)
    assert command(arguments) == 130
    assert "the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(FeatureCache, "write", write)
    assert command(arguments) == 0
    assert "4 clips made, 2 there before" in capsys.readouterr().out


def test_other_keys_and_other_variants_are_refused(command, arguments, tmp_path, capsys):
    assert command([*arguments, "--variants", "3"]) == 0
    assert FeatureCache(tmp_path / "cache").header.variants == 3
    assert command(arguments) == 2
    assert "--variants is 8, but" in capsys.readouterr().err
    assert command([*arguments, "--variants", "3", "--set", "rdtf.data.image_size=64"]) == 2
    assert "rdtf.data.image_size is 64 here, but the cache was made with 32" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command([*arguments, "--variants", "0"])


def test_the_keys_of_a_cached_run_are_taken_as_they_are(command, arguments, capsys):
    assert command([*arguments, "--set", "rdtf.memory.encoders=cached"]) == 0
    assert "6 clips made" in capsys.readouterr().out


def test_clips_that_break_are_listed(command, arguments, clips, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "clips"
    write_stickers(folder, 4, 1, 32)
    (folder / "broken.gif").write_bytes(b"GIF89a")
    assert command([*arguments, "--data_dir", str(folder)]) == 0
    told = capsys.readouterr().out
    assert "4 clips made" in told and "1 broken" in told


def test_a_folder_that_cannot_be_made_is_one_line(command, arguments, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert command([*arguments, "--out", str(tmp_path / "file" / "cache")]) == 2
    assert "cannot be written (Not a directory)" in capsys.readouterr().err
    assert command([*arguments, "--set", "rdtf.data.image_sise=64"]) == 2
    assert "image_size" in capsys.readouterr().err


def test_a_disk_that_is_full_or_knows_no_locks_is_one_line(command, arguments, tmp_path, capsys, monkeypatch):
    def no_locks(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", no_locks)
        assert command(arguments) == 2
    assert f"'{tmp_path / 'cache'}' cannot be locked (No locks available). Give --out" in capsys.readouterr().err

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_header, "write_atomically", full)
    assert command(arguments) == 2
    assert "cache.json' cannot be written (No space left on device). Free some space" in capsys.readouterr().err


def test_who_waits_for_another_process_is_told(command, arguments, tmp_path, capsys, monkeypatch):
    asked = []

    def taken(file, how):
        asked.append(how)
        if how & fcntl.LOCK_NB:
            raise BlockingIOError

    monkeypatch.setattr(fcntl, "flock", taken)
    with pytest.raises(SystemExit), monkeypatch.context() as patch:
        patch.setattr(FeatureCache, "create", lambda *_: sys.exit("it has the lock"))
        command(arguments)
    assert asked == [fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_EX]
    assert f"Another process looks through the clips for '{tmp_path / 'cache'}': waiting" in capsys.readouterr().err


def test_a_gpu_without_room_is_one_line_and_the_same_command_goes_on(command, arguments, tmp_path, capsys, monkeypatch):
    make, left = cache_making.FeatureMaker.__call__, iter(range(2))

    def crowded(self, frames, caption):
        if next(left, None) is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(self, frames, caption)

    monkeypatch.setattr(cache_making.FeatureMaker, "__call__", crowded)
    assert command(arguments) == 2
    assert f"What is in '{tmp_path / 'cache'}' is whole, the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(cache_making.FeatureMaker, "__call__", make)
    assert command(arguments) == 0
    assert "4 clips made, 2 there before" in capsys.readouterr().out


def test_stickers_made_on_the_spot_are_those_of_the_run(command, arguments, project_root, tmp_path, capsys):
    synthetic = [*arguments[:2], *arguments[4:], "--set", "rdtf.data.synthetic_clips=4", "--seed", "3"]
    assert command(synthetic) == 0 and "4 clips made" in capsys.readouterr().out
    write_stickers(tmp_path / "run" / "stickers", 4, 3, 32)
    assert command([*synthetic, "--data_dir", str(tmp_path / "run" / "stickers")]) == 0
    assert "0 clips made, 4 there before" in capsys.readouterr().out


@pytest.mark.timeout(600)
def test_two_at_once_share_the_work(project_root, arguments, tmp_path):
    words = [sys.executable, str(project_root / "tools" / "cache_dataset.py"), *arguments]
    started = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ) for _ in range(2)]
    answers = [process.communicate(timeout=500) for process in started]
    assert [process.returncode for process in started] == [0, 0], answers
    cache = FeatureCache(tmp_path / "cache")
    names = [path.stem for path in (tmp_path / "cache" / "clips").rglob("*.safetensors")]
    assert len(names) == 6 and all(cache.flaw(name) is None for name in names)
    assert not [path for path in (tmp_path / "cache").rglob("*.tmp")]


def test_each_process_goes_its_own_way(monkeypatch, command, arguments, tmp_path):
    """Two of the same number too, in two containers."""
    orders, write = [], FeatureCache.write

    def noted(self, key, features):
        orders[-1].append(key)
        write(self, key, features)

    monkeypatch.setattr(FeatureCache, "write", noted)
    monkeypatch.setattr(cache_making.os, "getpid", lambda: 1)
    for number in (1, 2):
        monkeypatch.setattr(cache_making.os, "urandom", lambda size, number=number: bytes([number] * size))
        orders.append([])
        assert command([*arguments, "--out", str(tmp_path / str(number))]) == 0
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]


def test_more_broken_clips_than_a_run_allows_invite_nobody(command, arguments, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "clips"
    write_stickers(folder, 4, 1, 32)
    (folder / "broken.gif").write_bytes(b"GIF89a")
    words = [*arguments, "--data_dir", str(folder), "--set", "rdtf.data.max_bad_fraction=0.3"]
    decode, first = command.__globals__["decode_clip"], min(path.name for path in folder.iterdir())

    def cut_since(place, *more, **options):
        if place.path.name == first:
            raise ClipError(place, "cut since")
        return decode(place, *more, **options)

    monkeypatch.setitem(command.__globals__, "decode_clip", cut_since)
    assert command([*words[:-1], "rdtf.data.max_bad_fraction=0.4"]) == 0 and "Train from it" in capsys.readouterr().out
    assert command(words) == 1
    told = capsys.readouterr()
    assert "Train from it" not in told.out and "2 of 5 data files cannot be decoded" in told.err


def test_a_split_that_splits_nothing_is_doubted(command, arguments, capsys):
    assert command([*arguments, "--set", "rdtf.data.validation_fraction=1e-9"]) == 0
    assert "WARNING: rdtf.data.validation_fraction is 1e-09" in capsys.readouterr().err
