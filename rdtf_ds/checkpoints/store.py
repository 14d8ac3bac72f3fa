"""The folder of a run's checkpoints: what is in it, how one more gets in, and which leave.

``checkpoints/step00000040-0007/`` holds the state after 40 attempted steps, the seventh commit of the run. It is written as
``step00000040-0007.partial``, its manifest last, and renamed: a folder without the suffix was once complete. Names are never used twice.
``latest`` names the newest for DeepSpeed's own tools; here the folders themselves are the truth.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rdtf_ds.checkpoints import durable
from rdtf_ds.checkpoints.durable import UNFINISHED
from rdtf_ds.checkpoints.manifest import MANIFEST, CheckpointError, flaw_of, read_manifest, write_manifest

LATEST = "latest"
_TAG = re.compile(r"step(\d{8,})-(\d{4,})")
_LEAST_VERIFIED = 2
_SPARE = 1.02  # of the bytes a checkpoint is expected to take


class Tag(NamedTuple):
    """Name of a checkpoint's folder; sorts by commit."""

    commit: int
    step: int

    @property
    def name(self) -> str:
        """Such as ``step00000040-0007``: attempted steps, commit."""
        return f"step{self.step:08d}-{self.commit:04d}"

    @classmethod
    def of(cls, name: str) -> Tag | None:
        """The tag of a committed folder's name; None for any other name."""
        match = _TAG.fullmatch(name)
        return cls(int(match[2]), int(match[1])) if match else None


class CheckpointStore:
    """One folder of checkpoints. Rank 0 alone changes it.

    Args:
        folder: ``checkpoints`` of a run; made when the first one begins.
        keep: How many of the newest stay.
        keep_every: Checkpoints of steps that are multiples of this stay for good; 0: none does.
        key: Signs manifests; unsigned ones are then refused.
    """

    def __init__(self, folder: Path, keep: int = 3, keep_every: int = 0, key: bytes | None = None) -> None:
        self.folder, self.key = folder, key
        self._keep, self._keep_every = max(keep, _LEAST_VERIFIED), keep_every
        self._verified: set[str] = set()

    def candidates(self) -> list[Path]:
        """Folders that were once committed, newest commit first; whether they still are whole is not looked at."""
        return [self.folder / tag.name for tag in sorted(self._tags(), reverse=True)]

    def manifest(self, path: Path) -> dict[str, Any]:
        """The sealed manifest of one of the candidates.

        Raises:
            CheckpointError: It has none that holds, or that of another folder.
        """
        manifest = read_manifest(path, self.key)
        if manifest.get("tag") != path.name:
            raise CheckpointError(f"its {MANIFEST} is that of {manifest.get('tag')!r}")
        return manifest

    def flaw(self, path: Path) -> str | None:
        """Why a candidate cannot be used, or None; reads all its bytes."""
        try:
            flaw = flaw_of(path, self.manifest(path))
        except CheckpointError as error:
            return str(error)
        if flaw is None:
            self.verified(path)
        return flaw

    def verified(self, path: Path) -> None:
        """Take note that every byte of a checkpoint was found as committed."""
        self._verified.add(path.name)

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint whose every byte is as it was committed, and why newer ones were passed over."""
        reasons: list[str] = []
        for path in self.candidates():
            flaw = self.flaw(path)
            if flaw is None:
                return path, reasons
            reasons.append(f"{path.name}: {flaw}")
        return None, reasons

    def newest_step(self) -> int | None:
        """Attempted steps behind the newest candidate; None without one."""
        return max(self._tags()).step if self._tags() else None

    def begin(self, step: int, expected_bytes: int) -> Path:
        """The new, empty folder of the next checkpoint; what earlier saves left unfinished is removed.

        Raises:
            OSError: The folder cannot be written, or the disk has no room even with all but the last two verified removed.
        """
        durable.make_folders(self.folder.absolute())
        for left in self.folder.glob(f"*{UNFINISHED}"):
            durable.remove_tree(left)
        if self._room() < expected_bytes * _SPARE:
            self._prune(_LEAST_VERIFIED)
        if self._room() < expected_bytes * _SPARE:
            room, needed = self._room() / 1e9, expected_bytes / 1e9
            raise OSError(f"'{self.folder}' has room for {room:.2f} GB, and the checkpoint takes {needed:.2f} GB")
        tag = Tag(1 + max((tag.commit for tag in self._tags()), default=0), step)
        partial = self.folder / (tag.name + UNFINISHED)
        durable.make_folder(partial)
        return partial

    def commit(self, partial: Path, body: Mapping[str, Any]) -> Path:
        """Seal a folder whose files are all written and synced, and give it its name.

        Args:
            body: Of the manifest, with ``files``; ``tag`` is added.
        """
        final = partial.with_name(partial.name.removesuffix(UNFINISHED))
        write_manifest(partial, {"tag": final.name, **body}, self.key)
        durable.sync(partial)
        durable.rename(partial, final)
        self.verified(final)
        return final

    def point_latest(self) -> None:
        """Let ``latest`` name the newest commit."""
        durable.replace_file(self.folder / LATEST, self.candidates()[0].name.encode())

    def abandon(self, partial: Path) -> None:
        """Remove what a failed save wrote, as far as the disk lets."""
        shutil.rmtree(partial, ignore_errors=True)

    def prune(self) -> None:
        """Remove what need not stay: not among the newest ``keep``, not of a step kept for good, not one of the last two verified."""
        self._prune(self._keep)

    def _prune(self, keep: int) -> None:
        kept = 0
        for path in self.candidates():
            if kept >= keep:
                self._remove(path)
            # Two are known to be whole before anything goes; those beyond are counted without reading them again.
            elif path.name in self._verified or kept >= _LEAST_VERIFIED or self.flaw(path) is None:
                kept += 1

    def _remove(self, path: Path) -> None:
        tag = Tag.of(path.name)
        if tag is None or (self._keep_every and tag.step and tag.step % self._keep_every == 0):
            return
        doomed = path.with_name(path.name + UNFINISHED)
        durable.rename(path, doomed)  # half removed, it must not look like a checkpoint
        durable.remove_tree(doomed)

    def stray_latest(self) -> str | None:
        """What is wrong with ``latest``, which DeepSpeed's own tools would follow wherever it leads; None if nothing is."""
        path = self.folder / LATEST
        if not path.is_file():
            return None
        name = path.read_bytes()[:200].decode(errors="replace").strip()
        if Tag.of(name) is None or path.is_symlink():
            return f"'{path}' names {name!r}, which is no checkpoint of this folder; it was not followed"
        return None

    def _room(self) -> int:
        return shutil.disk_usage(self.folder).free

    def _tags(self) -> list[Tag]:
        if not self.folder.is_dir():
            return []
        return [tag for path in self.folder.iterdir() if path.is_dir() and (tag := Tag.of(path.name))]


def find_step_folder(path: str | Path) -> Path:
    """``path`` itself if it is a checkpoint, else the newest complete one of the run folder (or its ``checkpoints``) that it is.

    Raises:
        CheckpointError: Nothing complete there.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"'{path}' is no folder. Give a run folder, or one of the step… folders in its checkpoints.")
    if (path / MANIFEST).is_file():
        return path
    for folder in (path, path / "checkpoints"):
        for candidate in CheckpointStore(folder).candidates():
            if (candidate / MANIFEST).is_file():
                return candidate
    raise CheckpointError(
        f"'{path}' holds no complete checkpoint: neither it nor a step folder in it has a {MANIFEST}, which is written last. "
        "Give a run folder that has saved at least once."
    )
