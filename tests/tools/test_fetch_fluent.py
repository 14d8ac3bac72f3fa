"""Fetching the Fluent emoji: a small ``npm`` on PATH leaves small archives; what is in them is read, captioned, grouped and written."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from rdtf_ds.data.clips.writing import write_clip
from rdtf_ds.data.sources import npm_package
from rdtf_ds.data.sources.fluent import EmojiNames, base_of, plain
from rdtf_ds.data.sources.npm_package import Package, fetch, files
from rdtf_ds.data.sources.sources import list_clips
from rdtf_ds.errors import UserError
from tests.small_models import load_tool

ROOT = Path(__file__).resolve().parents[2]
WAVES = {"1f44b": 10, "1f44b-1f3fd": 60, "1f44b-1f3ff": 120}
JSON = json.dumps({"name": "@lobehub/fluent-emoji-anim-1", "license": "MIT"}).encode()


def webp(tmp_path: Path, frames: int, shade: int) -> bytes:
    path = tmp_path / "made.webp"
    write_clip(np.full((frames, 16, 16, 4), shade, np.uint8) + np.arange(frames, dtype=np.uint8)[:, None, None, None], path, 40)
    return path.read_bytes()


def archive(members: Mapping[str, bytes | tarfile.TarInfo]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name) if isinstance(content, bytes) else content
            if isinstance(content, bytes):
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content) if isinstance(content, bytes) else None)
    return packed.getvalue()


def sha512(data: bytes) -> str:
    return base64.b64encode(hashlib.sha512(data).digest()).decode()


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Archives that a fake ``npm pack`` hands out, from this folder; how it was called is in ``calls``."""
    folder, programs = tmp_path / "registry", tmp_path / "bin"
    folder.mkdir()
    programs.mkdir()
    npm = programs / "npm"
    npm.write_text(
        f"""#!{sys.executable}
import pathlib, shutil, sys
folder, words = pathlib.Path({str(folder)!r}), sys.argv[1:]
with (folder / "calls").open("a") as calls:
    print(*words, file=calls)
if (folder / "complaint").exists():
    sys.exit((folder / "complaint").read_text())
name = words[-1].replace("@lobehub/", "lobehub-").replace("@", "-") + ".tgz"
shutil.copy(folder / name, words[words.index("--pack-destination") + 1])
"""
    )
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return folder


def publish(registry: Path, number: int, data: bytes) -> Package:
    package = Package(f"@lobehub/fluent-emoji-anim-{number}", "1.0.0", sha512(data))
    (registry / package.archive).write_bytes(data)
    return package


def ready(monkeypatch: pytest.MonkeyPatch, packages: tuple[Package, ...], *arguments: str):
    tool = load_tool(ROOT, "fetch_fluent")
    monkeypatch.setattr(tool, "PACKAGES", packages)
    monkeypatch.setattr(sys, "argv", ["fetch_fluent.py", *arguments])
    return tool


@pytest.fixture
def two_packages(registry: Path, tmp_path: Path) -> tuple[Package, Package]:
    waves = {f"package/assets/{stem}.webp": webp(tmp_path, 4, shade) for stem, shade in WAVES.items()}
    still = {"package/assets/00a9-fe0f.webp": webp(tmp_path, 1, 5), "package/assets/1f400.webp": b"RIFF....WEBPVP8X"}
    odd = {f"package/assets/{stem}.webp": webp(tmp_path, 3, shade) for stem, shade in (("hello_there", 90), ("e000", 150))}
    first = publish(registry, 1, archive({"package/package.json": JSON, "package/README.md": b"x", **waves, **still}))
    return first, publish(registry, 2, archive({"package/package.json": JSON, **odd}))


def test_clips_become_shards_with_captions_and_groups(two_packages, registry, monkeypatch, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert ready(monkeypatch, two_packages, str(out)).main() == 0
    rows = {row["path"]: row for row in list_clips(out).table.to_pylist()}
    assert {path: (row["caption"], row["group"]) for path, row in rows.items()} == {
        "1f44b.webp": ("waving hand", "1f44b"),
        "1f44b-1f3fd.webp": ("waving hand, medium skin tone", "1f44b"),
        "1f44b-1f3ff.webp": ("waving hand, dark skin tone", "1f44b"),
        "hello_there.webp": ("hello there", "hello_there"),
        "e000.webp": ("emoji", "e000"),
    }
    assert all(row["fault"] is None for row in rows.values())
    with (out / "000000.tar").open("rb") as shard:
        row = rows["1f44b-1f3fd.webp"]
        shard.seek(row["offset"])
        assert shard.read(row["length"]) == webp(tmp_path, 4, WAVES["1f44b-1f3fd"])
    said = capsys.readouterr().out
    assert said.startswith("5 clips (0 MB) in 1 shards") and "1 still pictures, 1 unreadable files" in said
    assert "3 groups: 3 clips are variants of 1 emoji" in said and "captions: 3 by the emoji's English name, 2 by" in said
    assert "package.json: MIT." in said and f"--data_dir {out}" in said and "MIT" in (out / "SOURCE.md").read_text()
    calls = (registry / "calls").read_text().splitlines()
    assert [call.split()[-1] for call in calls] == ["@lobehub/fluent-emoji-anim-1@1.0.0", "@lobehub/fluent-emoji-anim-2@1.0.0"]
    assert all("--ignore-scripts" in call for call in calls)


def test_a_limit_fetches_no_more_than_it_needs(two_packages, registry, monkeypatch, tmp_path) -> None:
    assert ready(monkeypatch, two_packages, str(tmp_path / "out"), "--limit", "2").main() == 0
    assert list_clips(tmp_path / "out").table.num_rows == 2
    assert len((registry / "calls").read_text().splitlines()) == 1


def test_kept_packages_are_not_fetched_again(two_packages, registry, monkeypatch, tmp_path) -> None:
    kept = tmp_path / "kept"
    for out in ("one", "two"):
        assert ready(monkeypatch, two_packages, str(tmp_path / out), "--keep_packages", str(kept)).main() == 0
    assert len((registry / "calls").read_text().splitlines()) == 2
    assert sorted(path.name for path in kept.iterdir()) == [package.archive for package in two_packages]
    assert (tmp_path / "one" / "000000.tar").read_bytes() == (tmp_path / "two" / "000000.tar").read_bytes()


def told(tool, capsys) -> str:
    assert tool.main() == 2
    said = capsys.readouterr()
    assert said.out == "" and "Traceback" not in said.err
    return said.err.strip().splitlines()[-1]


def test_interrupted_it_leaves_nothing(two_packages, registry, monkeypatch, tmp_path, capsys) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    tool = ready(monkeypatch, two_packages, str(tmp_path / "out"))
    monkeypatch.setattr(tool, "_frames", interrupted)
    before = set(tmp_path.iterdir())
    assert tool.main() == 130
    assert capsys.readouterr().err.splitlines()[-1] == f"Interrupted; nothing of '{tmp_path / 'out'}' was kept."
    assert set(tmp_path.iterdir()) == before


def test_another_archive_than_expected_is_refused(two_packages, monkeypatch, tmp_path, capsys) -> None:
    wrong = Package(two_packages[0].name, "1.0.0", two_packages[1].sha512)
    message = told(ready(monkeypatch, (wrong,), str(tmp_path / "out"), "--keep_packages", str(tmp_path / "kept")), capsys)
    assert two_packages[0].sha512 in message and two_packages[1].sha512 in message and "Try again" in message
    assert not (tmp_path / "out").exists() and list((tmp_path / "kept").iterdir()) == []


def test_the_pinned_checksums_refuse_a_small_archive(two_packages, tmp_path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "fetch_fluent.py"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "its SHA-512 is" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("complaint", "remedy"),
    [
        ("npm error code ENOTFOUND\nnpm error network request failed", "npm ping"),
        ("npm error code EINTEGRITY\nnpm error sha512 differs", "npm cache clean --force"),
        ("npm error code ENOSPC\nnpm error nospc no space left", "--keep_packages"),
    ],
)
def test_what_npm_complains_of_is_told_with_a_remedy(two_packages, registry, monkeypatch, tmp_path, capsys, complaint, remedy) -> None:
    (registry / "complaint").write_text(complaint)
    message = told(ready(monkeypatch, two_packages, str(tmp_path / "out")), capsys)
    assert complaint.split()[3] in message and remedy in message and not (tmp_path / "out").exists()


def test_without_npm_or_emoji_it_says_what_to_install(two_packages, monkeypatch, tmp_path, capsys) -> None:
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "emoji", None)
        assert "pip install 'emoji>=2.16,<3'" in told(ready(patched, two_packages, str(tmp_path / "out")), capsys)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "apt-get install npm" in told(ready(monkeypatch, two_packages, str(tmp_path / "out")), capsys)


def link(kind: bytes, target: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo("package/assets/1f44b.webp")
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("package/../../escape.webp", b"x", "leads out"),
        ("/elsewhere/escape.webp", b"x", "leads out"),
        ("other/assets/1f44b.webp", b"x", "leads out"),
        ("package/assets/1f44b.webp", link(tarfile.SYMTYPE, "/etc/passwd"), "neither a file nor a folder"),
        ("package/assets/1f44b.webp", link(tarfile.LNKTYPE, "package/package.json"), "neither a file nor a folder"),
        ("package/assets/1f44b.webp", link(tarfile.FIFOTYPE, ""), "neither a file nor a folder"),
        ("package/assets/1f44b.webp", bytes(5000), "at most 4,096"),
    ],
)
def test_archives_that_npm_would_not_make_are_refused(tmp_path, name, content, word) -> None:
    path = tmp_path / "bad.tgz"
    path.write_bytes(archive({"package/package.json": JSON, name: content}))
    with pytest.raises(UserError, match=word):
        list(files(path, 4096, 10**6))
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.tgz"], "nothing is ever extracted"


def test_archives_that_unpack_to_too_much_or_end_too_soon_are_refused(tmp_path) -> None:
    path = tmp_path / "bad.tgz"
    whole = archive({f"package/{number}": bytes(4000) for number in range(50)})
    path.write_bytes(whole)
    assert len(list(files(path, 4096, 10**6))) == 50
    with pytest.raises(UserError, match="unpacks to more"):
        list(files(path, 4096, 10**5))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        list(files(path, 4096, 10**6))
    path.unlink()
    path.symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="symbolic link"):
        list(files(path, 4096, 10**6))


def test_an_npm_that_leaves_nothing_is_told(registry, monkeypatch, tmp_path) -> None:
    (tmp_path / "bin" / "npm").write_text("#!/bin/sh\nexit 0\n")
    with pytest.raises(UserError, match="left no a-b-1.0.tgz"):
        fetch(Package("@a/b", "1.0", ""), tmp_path / "kept")
    (tmp_path / "bin" / "npm").write_text("#!/bin/sh\nsleep 20\n")
    monkeypatch.setattr(npm_package, "_PATIENCE_S", 0.1)
    with pytest.raises(UserError, match="took more than"):
        fetch(Package("@a/b", "1.0", ""), tmp_path / "kept")


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        (":waving_hand_medium-light_skin_tone:", "waving hand, medium-light skin tone"),
        (":woman_dark_skin_tone_red_hair:", "woman, dark skin tone, red hair"),
        (":kiss_woman_man_light_skin_tone_dark_skin_tone:", "kiss, woman, man, light skin tone, dark skin tone"),
        (":couple_with_heart:", "couple with heart"),
        (":woman’s_hat:", "woman's hat"),
    ],
)
def test_names_are_written_as_people_write(name: str, caption: str) -> None:
    assert plain(name) == caption


@pytest.mark.parametrize(
    ("variant", "base"),
    [
        ("1f9d1-1f3fe-200d-1f373", "1f9d1-200d-1f373"),
        ("1f469-1f3fb-200d-1f373", "1f9d1-200d-1f373"),
        ("1f3c3-1f3fd-200d-2642-fe0f-200d-27a1-fe0f", "1f3c3"),
        ("1f471-1f3fc-200d-2640-fe0f", "1f471"),
        ("1f468-1f3ff-200d-1f9b2", "1f9d1"),
        ("1f46d-1f3fb", "1f9d1-200d-1f91d-200d-1f9d1"),
        ("1f469-1f3fb-200d-1f91d-200d-1f469-1f3ff", "1f9d1-200d-1f91d-200d-1f9d1"),
        ("1faf1-1f3fb-200d-1faf2-1f3ff", "1faf1-200d-1faf2"),
        ("1f91d", "1faf1-200d-1faf2"),
        ("2764-fe0f", "2764"),
    ],
)
def test_variants_share_a_group(variant: str, base: str) -> None:
    assert base_of("".join(chr(int(part, 16)) for part in variant.split("-"))) == base
    assert EmojiNames().read(variant).group == base


def test_names_that_emoji_does_not_know() -> None:
    names = EmojiNames()
    flag = names.read("1f3f4-e0067_e0062_e0065_e006e_e0067")
    assert flag.known and flag.caption == "England"
    spelled = names.read("1f44b-1f980")
    assert not spelled.known and spelled.caption == "waving hand sign, crab"
    assert names.read("0023-fe0f-20e3").caption == "keycap #"
    beyond = names.read("ffffffffff")
    assert not beyond.known and beyond.group == "ffffffffff"
