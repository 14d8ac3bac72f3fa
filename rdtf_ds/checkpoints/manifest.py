"""``MANIFEST.json``: what a committed checkpoint holds, file by file, and the proof that it is still that.

The manifest is written last and carries a digest of itself, so a folder with a sound manifest was once complete, and `flaw_of` tells
whether it still is. With a key (``rdtf.checkpoint.key_file``) it is also signed: a folder that somebody else made is refused.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rdtf_ds.checkpoints.durable import Digest, digest_file, write_file
from rdtf_ds.errors import UserError

MANIFEST = "MANIFEST.json"
FORMAT = 2
_MIN_KEY = 16


class CheckpointError(UserError):
    """A checkpoint that is incomplete, damaged, or not of this package."""


def read_key(path: str | Path) -> bytes:
    """The secret that signs manifests: the bytes of a file, without the white space around them.

    Raises:
        UserError: No such file, or fewer than 16 bytes in it.
    """
    try:
        key = Path(path).read_bytes().strip()
    except OSError as error:
        raise UserError(f"The key file '{path}' (rdtf.checkpoint.key_file) cannot be read: {error.strerror}.") from error
    if len(key) < _MIN_KEY:
        raise UserError(
            f"The key file '{path}' (rdtf.checkpoint.key_file) holds {len(key)} bytes; at least {_MIN_KEY} are needed. Make one with: "
            f"python -c 'import secrets; print(secrets.token_hex(32))' > {path}"
        )
    return key


def write_manifest(folder: Path, body: Mapping[str, Any], key: bytes | None = None) -> Digest:
    """Write the manifest of a folder, sealed; ``body`` is JSON-able and has ``files``."""
    sealed = {"format": FORMAT, **body}
    text = _canonical(sealed)
    sealed["sha256"] = hashlib.sha256(text).hexdigest()
    if key is not None:
        sealed["hmac"] = hmac.new(key, text, hashlib.sha256).hexdigest()
    return write_file(folder / MANIFEST, lambda file: file.write(json.dumps(sealed, indent=1).encode()))


def read_manifest(folder: Path, key: bytes | None = None) -> dict[str, Any]:
    """The manifest of a folder, whose seal holds.

    Raises:
        CheckpointError: None there, not of this format, changed since it was written, not signed with ``key``, or one that names
            files outside its folder.
    """
    if folder.is_symlink() or (folder / MANIFEST).is_symlink():
        raise CheckpointError("it is a symbolic link, which may lead out of the folder of checkpoints")
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"it has no {MANIFEST}, which is written last")
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        found = manifest["format"]
        files = manifest["files"] if found == FORMAT else {}
        sound = all(type(digest["bytes"]) is int and type(digest["sha256"]) is str for digest in files.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"its {MANIFEST} is damaged ({type(error).__name__})") from error
    if found != FORMAT:
        raise CheckpointError(f"its format is {found!r}, this version reads {FORMAT}")
    seal, signature = manifest.pop("sha256", None), manifest.pop("hmac", None)
    text = _canonical(manifest)
    if not sound or seal != hashlib.sha256(text).hexdigest():
        raise CheckpointError(f"its {MANIFEST} was changed or damaged")
    if key is not None and not hmac.compare_digest(str(signature).encode(), hmac.new(key, text, hashlib.sha256).hexdigest().encode()):
        raise CheckpointError(f"its {MANIFEST} is not signed with the key of rdtf.checkpoint.key_file")
    outside = [name for name in files if not _plain(name)]
    if outside:
        raise CheckpointError(f"its {MANIFEST} names {outside[0]!r}, which is no file of its own folder")
    return dict(manifest)


def flaw_of(folder: Path, manifest: Mapping[str, Any], names: Collection[str] | None = None) -> str | None:
    """The first thing that is not as the manifest says, or None.

    A file it does not know of is a flaw too: it might be taken for one it does.

    Args:
        names: Files to check; None: all.
    """
    try:
        unknown = {path.name for path in folder.iterdir() if not path.name.startswith(".")} - manifest["files"].keys() - {MANIFEST}
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    if unknown:
        return f"{min(unknown)} is not in its {MANIFEST}"
    for name, expected in manifest["files"].items():
        if names is not None and name not in names:
            continue
        path = folder / name
        try:
            if path.is_symlink():
                return f"{name} is a symbolic link"
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes of {expected['bytes']}"
            if digest_file(path).sha256 != expected["sha256"]:
                return f"{name} was changed or damaged"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def _plain(name: str) -> bool:
    return bool(name) and name not in (".", "..") and "/" not in name and "\\" not in name and "\0" not in name


def _canonical(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
