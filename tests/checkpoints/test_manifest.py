from __future__ import annotations

import json

import pytest

from rdtf_ds.checkpoints.durable import write_file
from rdtf_ds.checkpoints.manifest import FORMAT, MANIFEST, CheckpointError, flaw_of, read_key, read_manifest, write_manifest
from rdtf_ds.errors import UserError

KEY = b"sixteen bytes at least"


@pytest.fixture
def folder(tmp_path):
    files = {name: write_file(tmp_path / name, lambda file, name=name: file.write(name.encode())).to_json() for name in ("a", "b")}
    write_manifest(tmp_path, {"step": 3, "files": files}, KEY)
    return tmp_path


def test_what_was_written_is_read(folder):
    manifest = read_manifest(folder, KEY)
    assert manifest["step"] == 3 and manifest["format"] == FORMAT and not {"sha256", "hmac"} & manifest.keys()
    assert flaw_of(folder, manifest) is None


def test_names_limit_what_is_looked_at(folder):
    (folder / "b").write_text("x")
    manifest = read_manifest(folder)
    assert flaw_of(folder, manifest, {"a"}) is None
    assert flaw_of(folder, manifest, {"b"}) == "b was changed or damaged"


def test_every_flipped_bit_of_a_manifest_is_noticed(folder):
    whole = (folder / MANIFEST).read_bytes()
    original = read_manifest(folder)
    for position in range(len(whole)):
        for bit in (1, 16):
            changed = bytearray(whole)
            changed[position] ^= bit
            (folder / MANIFEST).write_bytes(changed)
            try:
                assert read_manifest(folder) == original, "a change of nothing but white space or the signature"
            except CheckpointError:
                continue


def test_a_key_refuses_what_it_did_not_sign(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    with pytest.raises(CheckpointError, match="not signed"):
        read_manifest(folder, b"another key of enough bytes")
    del manifest["hmac"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert read_manifest(folder)["step"] == 3
    with pytest.raises(CheckpointError, match="not signed"):
        read_manifest(folder, KEY)


def test_another_format_is_named(tmp_path):
    (tmp_path / MANIFEST).write_text(json.dumps({"format": 1, "files": {}}))
    with pytest.raises(CheckpointError, match=f"format is 1, this version reads {FORMAT}"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '{"format": 2}', '{"format": 2, "files": 3}', "[" * 100_000])
def test_what_is_no_manifest_is_refused(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match="damaged"):
        read_manifest(tmp_path)


def test_keys_are_long_and_trimmed(tmp_path):
    (tmp_path / "key").write_bytes(KEY + b"\n")
    assert read_key(tmp_path / "key") == KEY
    (tmp_path / "key").write_bytes(b"short")
    with pytest.raises(UserError, match="holds 5 bytes; at least 16.*token_hex"):
        read_key(tmp_path / "key")
    with pytest.raises(UserError, match="cannot be read"):
        read_key(tmp_path / "absent")
