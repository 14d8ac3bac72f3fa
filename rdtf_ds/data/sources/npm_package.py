"""Packages of npm as archives: fetched by the ``npm`` command, held against a known checksum, read without extracting anything."""

from __future__ import annotations

import base64
import gzip
import hashlib
import os
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rdtf_ds.data.clips.clip import ClipError
from rdtf_ds.data.clips.places import open_regular
from rdtf_ds.errors import UserError

_PATIENCE_S = 1800
_OFFLINE = ("ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ECONNRESET", "ETIMEDOUT", "ENETUNREACH", "EHOSTUNREACH", "ENOTCACHED", "FetchError")
_WITHOUT_NPM = "On Debian: apt-get install npm. Or put archives fetched elsewhere into a folder and name it with --keep_packages."


@dataclass(frozen=True, slots=True)
class Package:
    """One version of a package; ``sha512`` of its archive as npm writes it, in base64."""

    name: str
    version: str
    sha512: str

    @property
    def archive(self) -> str:
        """The file name that ``npm pack`` gives the archive."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


def fetch(package: Package, folder: Path) -> Path:
    """The archive of a package in ``folder``, from there if it is there already, else through ``npm pack``.

    Raises:
        UserError: no ``npm``, no network, no such package, no space, or an archive that is not the one expected.
    """
    archive = folder / package.archive
    if not archive.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".npm-", dir=folder) as staging:
            _pack(package, Path(staging))
            packed = Path(staging) / package.archive
            if not packed.is_file():
                raise UserError(f"'npm pack {package.name}@{package.version}' ended well but left no {package.archive}. Is 'npm' npm?")
            _require(package, packed, "Try again; if it stays so, npm is set up with a registry of other contents.")
            os.replace(packed, archive)
    _require(package, archive, "Delete it, and it is fetched again.")
    return archive


def _pack(package: Package, folder: Path) -> None:
    """Run npm in a folder of its own, so that no project's settings and no lock file are in its way."""
    wanted = f"{package.name}@{package.version}"
    command = ["npm", "pack", "--ignore-scripts", "--loglevel", "error", "--pack-destination", str(folder), wanted]
    said = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    try:
        done = subprocess.run(command, cwd=folder, timeout=_PATIENCE_S, **said)  # type: ignore[call-overload]
    except FileNotFoundError:
        raise UserError(f"The packages are fetched by the command 'npm', which is not on PATH. {_WITHOUT_NPM}") from None
    except OSError as error:
        raise UserError(f"'npm' cannot be started ({error.strerror}). {_WITHOUT_NPM}") from error
    except subprocess.TimeoutExpired:
        raise UserError(f"'npm pack {wanted}' took more than {_PATIENCE_S} s. Is the network slow? The same command tries again.") from None
    if done.returncode:
        raise UserError(f"npm could not fetch {wanted}. {_remedy(done.stderr.decode(errors='replace'))}")


def _remedy(said: str) -> str:
    """npm's complaint, shortened, and what to do about it."""
    lines = [line.partition("error ")[2].strip() for line in said.splitlines() if "error " in line]
    told = "; ".join(line for line in lines if line and not line.startswith(("A complete log", "at ")))[:300] or said.strip()[-300:]
    if "EINTEGRITY" in said:
        advice = "What arrived is not what npm's registry promised: 'npm cache clean --force' and try again."
    elif "ENOSPC" in said:
        advice = "The disk is full: free some space, or name a folder on another disk with --keep_packages."
    elif any(word in said for word in _OFFLINE):
        advice = f"Is there a network, and does 'npm ping' answer? {_WITHOUT_NPM}"
    else:
        advice = "Does 'npm ping' answer?"
    return f"It said: {told}. {advice}"


def _require(package: Package, archive: Path, advice: str) -> None:
    try:
        with open(open_regular(archive), "rb") as file:
            found = base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()
    except ClipError as error:
        raise UserError(f"{error}. {advice}") from error
    if found != package.sha512:
        raise UserError(f"'{archive}' is not {package.name}@{package.version}: its SHA-512 is {found}, not {package.sha512}. {advice}")


def files(archive: Path, max_file: int, max_total: int) -> Iterator[tuple[str, bytes]]:
    """The files of an archive, in its order: name, without the folder ``package/`` that npm puts all into, and bytes.

    Raises:
        UserError: the archive is damaged, or holds what no archive made by npm does: anything but files and folders, a name that leads out
            of ``package/``, a file of more than ``max_file`` bytes; or more than ``max_total`` bytes unpacked.
    """
    try:
        with (
            open(open_regular(archive), "rb") as packed,
            gzip.GzipFile(fileobj=packed) as unpacked,
            # As a stream: going back in gzip would unpack from the start again.
            tarfile.open(fileobj=_Bounded(archive, unpacked, max_total), mode="r|") as members,  # type: ignore[call-overload]
        ):
            for member in members:
                if not member.isdir():
                    yield _name(archive, member, max_file), _content(members, member)
    except (ClipError, OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise UserError(f"'{archive}' cannot be read ({error}). Delete it, and it is fetched again.") from error


def _name(archive: Path, member: tarfile.TarInfo, max_file: int) -> str:
    top, *parts = member.name.split("/")
    if not member.isreg():
        raise UserError(f"'{archive}' holds '{member.name}', which is neither a file nor a folder: not an archive made by npm.")
    if top != "package" or not parts or not all(parts) or {".", ".."} & set(parts):
        raise UserError(f"'{archive}' holds '{member.name}', which leads out of 'package/': not an archive made by npm.")
    if member.size > max_file:
        raise UserError(f"'{archive}' holds '{member.name}' of {member.size:,} bytes; at most {max_file:,} are expected of a file.")
    return "/".join(parts)


def _content(members: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    opened = members.extractfile(member)
    data = opened.read() if opened is not None else b""
    if len(data) != member.size:
        raise EOFError(f"'{member.name}' ends after {len(data)} of {member.size} bytes")
    return data


class _Bounded:
    """A stream that gives so many bytes and then complains: a few kilobytes of gzip can hold gigabytes."""

    def __init__(self, archive: Path, stream: IO[bytes], most: int) -> None:
        self._archive, self._stream, self._left = archive, stream, most

    def read(self, count: int = -1) -> bytes:
        """At most ``count`` bytes (-1: all there are), none at the end.

        Raises:
            UserError: The stream has given more than it may.
        """
        data = self._stream.read(min(count, self._left + 1) if count >= 0 else self._left + 1)
        self._left -= len(data)
        if self._left < 0:
            raise UserError(f"'{self._archive}' unpacks to more than is expected of it: not the archive it should be.")
        return data
