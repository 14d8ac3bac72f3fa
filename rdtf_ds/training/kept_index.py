"""A run's own index: what it began with, kept in the run folder, and opened by a restart in the place of a new one.

Clips that are deleted, cut, replaced or added while a run stands still would make another index, and so another order of all samples.
``RUN/kept_index/<fingerprint>/`` holds the file of the index, a hard link that outlives its replacement, or a copy on another disk, and a
link to the folder of its features. Every checkpoint says in its manifest which one it was trained on; what none says goes in time. Rank 0
alone calls all this.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rdtf_ds.checkpoints.manifest import CheckpointError
from rdtf_ds.checkpoints.store import CheckpointStore
from rdtf_ds.config import RDTFSection
from rdtf_ds.data.indexing.index import ClipIndex, open_index
from rdtf_ds.data.indexing.index_segments import features_path, rows_folder
from rdtf_ds.data.indexing.index_table import FAULTY, index_path
from rdtf_ds.errors import UserError

FOLDER = "kept_index"
_NAME = 16  # digits of the fingerprint that name a folder
_LAST_KEPT = 2
_KEYS = {
    "background", "max_pixels", "max_frames", "max_source_frames", "max_total_pixels", "max_bytes", "video_clip_s", "frame_features",
    "validation_fraction", "group_pattern", "drop_duplicates",
}  # fmt: skip
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Named:
    """The index that a checkpoint was trained on.

    Attributes:
        fingerprint: of all its clips, before a cache leaves any out; empty if the checkpoint does not say.
        identity: in the name of its file.
        ids: hash of which rows are trained on, as plans name clips by their row.
        keys: what it was made of: the resolved source, and the keys of `rdtf.data`.
    """

    fingerprint: str
    identity: str
    ids: str
    keys: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint's manifest has under ``index``."""
        return asdict(self)


def name_of(index: ClipIndex, keys: dict[str, Any]) -> Named:
    """What a checkpoint says of an index."""
    whole = open_index(index.folder, index.identity)  # whatever a cache lacks
    ids = hashlib.sha256(whole.trainable.astype("<i8").tobytes()).hexdigest()
    return Named(whole.fingerprint, whole.identity, ids, keys)


def index_keys(rdtf: RDTFSection, root: str) -> dict[str, Any]:
    """All that an index hangs on but the clips themselves, JSON-able."""
    return {**rdtf.data.model_dump(mode="json", include=_KEYS), "data_dir": str(Path(root).resolve())}


def named_by(store: CheckpointStore) -> Named | None:
    """The index of the newest checkpoint that can be read; None without one."""
    for path in store.candidates():
        try:
            told = store.manifest(path).get("index")
        except (CheckpointError, OSError):
            continue  # a resume passes over it, too, and says so
        return Named(**told) if told else Named("", "", "", {})
    return None


def reopen_or_build(folder: Path, named: Named | None, keys: dict[str, Any], reindex: bool, build: Callable[[], ClipIndex]) -> ClipIndex:
    """The index of a run: the one its checkpoint names, or a new one; in both cases the run's own.

    A new one is built for a run without a checkpoint, with ``reindex``, and if the keys or the source have changed.

    Raises:
        UserError: What ``build`` says; or the named index is gone, and the clips now make another one.
    """
    if named is None or reindex or named.keys != keys or not Path(keys["data_dir"]).exists():
        return _keep(build(), folder)
    try:
        return _reopen(folder, named)
    except UserError as error:
        lost = str(error)
    index = build()
    if (now := name_of(index, keys)) != named:
        changed = "the clips have changed since" if now.fingerprint != named.fingerprint else "its rows are numbered otherwise"
        raise UserError(
            f"the index this run was trained on cannot be opened ({lost}), and {changed}: going on would change the order of all "
            f"samples. Bring it back, or start with --reindex to go on with the clips as they are now."
        )
    _log.warning("the index of this run was made anew, with the same clips: %s", lost)
    return _keep(index, folder)


def prune(folder: Path, store: CheckpointStore, current: ClipIndex) -> None:
    """Remove the indexes of a run that no checkpoint names, but for the current one and the two that came last.

    Where a checkpoint cannot be read, what it names is not known, and all stay.
    """
    needed = {current.folder.name}
    for path in store.candidates():
        try:
            told = store.manifest(path).get("index")
        except (CheckpointError, OSError):
            return
        needed |= {told["fingerprint"][:_NAME]} if told else set()
    try:
        kept = [path for path in (folder / FOLDER).iterdir() if path.is_dir() and not path.is_symlink()]
        for path in sorted(kept, key=lambda path: path.stat().st_mtime_ns)[:-_LAST_KEPT]:
            if path.name not in needed:
                shutil.rmtree(path)  # links in it are removed, not followed
    except OSError as error:
        _log.warning("an index that no checkpoint needs could not be removed from '%s': %s", folder / FOLDER, error)


def _kept_folder(folder: Path, fingerprint: str) -> Path:
    return folder / FOLDER / fingerprint[:_NAME]


def _reopen(folder: Path, named: Named) -> ClipIndex:
    """UserError: it, or the features of its clips, are not there any more."""
    index = open_index(_kept_folder(folder, named.fingerprint), named.identity)
    if index.fingerprint != named.fingerprint:
        raise UserError(f"'{index_path(index.folder, index.identity)}' is another index than the checkpoint's")
    columns = index.columns("segment", "use")
    use, segments = (columns.column(name).to_numpy() for name in ("use", "segment"))
    for segment in np.unique(segments[use != FAULTY]).tolist():
        path = features_path(index.folder, index.settings, segment)
        for part in (path, path.with_suffix(".arrow")):  # whoever removes the latter wants its clips examined anew
            if not part.is_file():
                raise UserError(f"'{part.parent.resolve() / part.name}' is gone")
    return index


def _keep(index: ClipIndex, folder: Path) -> ClipIndex:
    """Make an index the run's own.

    Raises:
        UserError: the run folder cannot be written, or another run replaced the index meanwhile.
    """
    kept = _kept_folder(folder, index.fingerprint)
    source, target = index_path(index.folder, index.identity), index_path(kept, index.identity)
    rows, link = rows_folder(index.folder, index.settings), rows_folder(kept, index.settings)
    try:
        kept.mkdir(parents=True, exist_ok=True)
        _in_place(link, lambda new: new.symlink_to(_way(rows, kept)))
        _in_place(target, lambda new: _link_or_copy(source, new))
    except OSError as error:
        raise UserError(f"the run's own index '{kept}' cannot be written ({error.strerror or error}). Free some space.") from error
    own = open_index(kept, index.identity)
    if own.fingerprint != index.fingerprint:
        target.unlink()
        raise UserError(
            f"index '{source}' was made anew by another run, of other clips, while this one was starting. Start again, or give each run "
            f"an index of its own (rdtf.data.index_dir)."
        )
    return own


def _way(rows: Path, kept: Path) -> str:
    """Within the run folder a relative way, so that it may be moved."""
    run, rows = kept.parents[1].resolve(), rows.resolve()
    return os.path.relpath(rows, kept.resolve()) if rows.is_relative_to(run) else str(rows)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without hard links
        shutil.copyfile(source, target)
        with open(target, "rb") as file:
            os.fsync(file.fileno())


def _in_place(path: Path, make: Callable[[Path], object]) -> None:
    """Put what ``make`` makes in the place of whatever has this name."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    make(new)
    os.replace(new, path)
    new.unlink(missing_ok=True)  # renaming one name of a file to another of its names leaves both
