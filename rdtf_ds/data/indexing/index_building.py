"""Builds the index of a data folder: lists its clips, examines those that no earlier build has seen, and writes all rows.

What examining finds is committed as it comes, so a build that is killed goes on where it was, and clips that are added later are
added to what is there. Several builders of one folder take turns; the second finds everything done.
"""

from __future__ import annotations

import atexit
import fcntl
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rdtf_ds.data.clips.clip import DecodeLimits
from rdtf_ds.data.clips.frame_features import THUMBNAIL_DIM, THUMBNAIL_IDENTITY, FrameDescriber
from rdtf_ds.data.indexing.examining import Examiner, File, examine_files
from rdtf_ds.data.indexing.index import ClipIndex, open_index
from rdtf_ds.data.indexing.index_rows import keys, lay_over, take_over, to_examine, without_transient
from rdtf_ds.data.indexing.index_segments import IndexSettings, read_segments
from rdtf_ds.data.indexing.index_table import write_index
from rdtf_ds.data.sources.sources import list_clips
from rdtf_ds.diffusion.masks import MIN_FRAMES
from rdtf_ds.errors import UserError

_MOST_WORKERS = 8
_BATCH = 1000
_LOCK = ".index.lock"  # of no other name's: closing a run's own .lock here would drop that
_RETRY_S = 1.0
_log = logging.getLogger(__name__)


def build_index(
    root: str | Path,
    limits: DecodeLimits,
    folder: str | Path | None = None,
    *,
    background: tuple[int, int, int] = (255, 255, 255),
    video_clip_s: float | None = None,
    validation_fraction: float = 0.0,
    group_pattern: str | None = None,
    drop_duplicates: bool = True,
    describer: FrameDescriber | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    workers: int | None = None,
    retry: bool = False,
    require_trainable: bool = True,
) -> ClipIndex:
    """Index a folder of clips or shards, or a manifest. A clip that nothing names gets an empty caption.

    Args:
        limits: Beyond them a clip is broken.
        folder: Where the index is kept and what earlier builds found is taken over; None: a temporary one, gone with this process.
        background: Seen through transparent pixels.
        describer: Makes the features frames are clustered by; None: thumbnails.
        on_progress: Called with the files examined and those there are to examine, whenever one or a window of one is done, from any
            thread; and with two zeros every second that another builder of the folder has to be waited for.
        workers: Clips examined at once; None: `default_workers`.
        retry: Examine again what failed for a reason that may have passed, such as a deadline. Otherwise what was broken once stays so,
            and a run that starts again finds the clips it had.
        require_trainable: Refuse an index without a clip to train on; False is for looking at what is there.
    Raises:
        UserError: Nothing to index, nothing to train on, metadata that cannot be used, or an index folder that cannot be written.
    """
    kept = Path(folder) if folder is not None else _temporary_folder()
    try:
        listing = list_clips(Path(root), cache=kept / "shards")
        features = (THUMBNAIL_IDENTITY, THUMBNAIL_DIM, "uint8") if describer is None else (describer.identity, describer.dim, "float16")
        apart = (validation_fraction, group_pattern, drop_duplicates)
        manifest = "" if Path(root).is_dir() else Path(root).name
        settings = IndexSettings(listing.root.resolve(), limits, background, *features, video_clip_s, *apart, manifest)
        examiner = Examiner(listing.root, settings, describer)
        with _alone(kept, on_progress):
            table = _all_rows(listing.table, examiner, kept, workers or default_workers(), retry, on_progress)
            index = open_index(kept, settings.identity, write_index(kept, settings, table))
    except OSError as error:
        remedy = "Give rdtf.data.index_dir a folder you may write to, with space in it."
        raise UserError(f"the index '{kept}' cannot be written ({error.strerror or error}). {remedy}") from error
    del listing, table
    pa.default_memory_pool().release_unused()  # a million rows took some GB, and a run may follow in this process
    if require_trainable:
        _require_trainable(index)
    return index


def default_workers() -> int:
    """Clips examined at once: one for each CPU this process may use, at most 8, as one reader of the files is enough for them."""
    return min(_MOST_WORKERS, len(os.sched_getaffinity(0)))


def _all_rows(
    listing: pa.Table, examiner: Examiner, folder: Path, workers: int, retry: bool, on_progress: Callable[[int, int], None] | None
) -> pa.Table:
    """Take over what is known, examine the rest."""
    settings = examiner.settings
    known = read_segments(folder, settings)
    if retry:
        known = without_transient(known)
    clips, rows = take_over(listing, known)
    missing = to_examine(listing, clips)
    if len(missing):
        examine_files(_files(listing, missing), len(missing), examiner, folder, min(workers, len(missing)), on_progress)
        known = read_segments(folder, settings)
        clips, rows = take_over(listing, known)
        if lost := len(to_examine(listing, clips)):
            remedy = "Give rdtf.data.index_dir a folder on another disk."
            raise UserError(f"{lost} clips that were just examined cannot be read back from '{folder}'. {remedy}")
    return lay_over(listing, clips, known.take(rows), settings)


def _files(listing: pa.Table, numbers: np.ndarray) -> Iterator[File]:
    """What an examiner needs of some files, made as it is asked for: there may be very many."""
    files = pa.table(keys(listing.take(numbers)))
    for start in range(0, len(numbers), _BATCH):
        yield from files.slice(start, _BATCH).to_pylist()


def _require_trainable(index: ClipIndex) -> None:
    if len(index.trainable):
        return
    first = next((f"; the first broken one: {problem.path}: {problem.reason}" for problem in index.problems), "")
    remedy = f"Training needs clips of at least {MIN_FRAMES} frames."
    if pc.any(index.columns("transient").column("transient")).as_py():
        remedy += " Some may be broken for a reason that has passed: tools/index_data.py --retry examines those anew."
    raise UserError(f"nothing to train on: {index.summary()}{first}. {remedy}")


@contextmanager
def _alone(folder: Path, on_progress: Callable[[int, int], None] | None) -> Iterator[None]:
    """One builder at a time. OSError: the folder cannot be made or written."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _LOCK, "a") as file:  # closing it lets it go, and so does any death
        told = False
        while not _locked(file):
            if not told:
                _log.warning("another process builds the index in '%s': waiting until it is done", folder)
            told = True
            if on_progress is not None:
                on_progress(0, 0)  # a watchdog takes silence for a hang
            time.sleep(_RETRY_S)
        yield


def _locked(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _temporary_folder() -> Path:
    """Removed when this process ends; until then copies of the index may read it, also those of its children."""
    folder, owner = Path(tempfile.mkdtemp(prefix="rdtf-index-")), os.getpid()

    def remove() -> None:
        """Removes the folder when its owner ends; what cannot be removed stays."""
        if os.getpid() == owner:  # a forked child runs this, too
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder
