"""Examines clips for the index: several at once, each in a child process that can be killed, and commits what is found as it comes.

What was committed is never examined again, so a build that is killed loses what was found since the last commit: that of at most
`SEGMENT_CLIPS` files, or of about `SEGMENT_S` seconds.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from rdtf_ds.data.clips.clip import ClipError, ExaminedClip, Place
from rdtf_ds.data.clips.decoder_pool import DecoderPool
from rdtf_ds.data.clips.frame_features import FrameDescriber
from rdtf_ds.data.indexing.index_segments import WHOLE, IndexSettings, found_table, write_segment
from rdtf_ds.data.indexing.index_table import BROKEN, STATIC, TRAINABLE
from rdtf_ds.diffusion.masks import MIN_FRAMES

SEGMENT_CLIPS, SEGMENT_S = 500, 30.0
BAR_AFTER_S = 1.0

File = Mapping[str, Any]
"""Where a clip's bytes lie and what they looked like from outside: file, offset, length, size, mtime_ns."""
Examined = tuple[dict[str, Any], np.ndarray | None]
"""A row as `FOUND` has it, and the features of its frames, if it has any."""
UNKNOWN: dict[str, Any] = {
    "window_first": WHOLE, "window_count": WHOLE, "reason": "", "transient": False, "content": "", "file_content": "",
    "format": "", "num_frames": 0, "width": 0, "height": 0, "has_alpha": False, "durations_ms": [],
}  # fmt: skip
"""The columns of a row of which nothing is known."""


class Examiner:
    """Makes the rows of a file and the features of their frames; used by several threads at once.

    Args:
        root: The files' names are relative to.
        describer: Makes the features, for one clip at a time; None: they are thumbnails.
    """

    def __init__(self, root: Path, settings: IndexSettings, describer: FrameDescriber | None) -> None:
        self.settings = settings
        self._root, self._describer = root, describer
        self._one_model = threading.Lock()

    def rows(self, pool: DecoderPool, file: File, alive: Callable[[], None] = lambda: None) -> list[Examined]:
        """One row, several of a video that is split, or the one of a broken file.

        Args:
            alive: Called after each window: a long video has thousands.
        """
        place = Place(self._root / file["file"], file["offset"], None if file["length"] == WHOLE else file["length"])
        try:
            rows: list[Examined] = []
            for clip in self._clips(pool, place):
                rows.append(self._row(file, clip))
                if clip.window is not None:
                    alive()
            for row, _ in rows:
                row["file_content"] = rows[0][0]["content"]  # it stands for a whole video: no other one begins with the same
            _demand_storable(place, [row for row, _ in rows])
            return rows
        except ClipError as error:
            reason = error.reason.encode("utf-8", "backslashreplace").decode()  # a name in it may be no UTF-8, which Arrow refuses
            return [({**file, **UNKNOWN, "status": BROKEN, "reason": reason, "transient": error.transient}, None)]

    def _clips(self, pool: DecoderPool, place: Place) -> Iterator[ExaminedClip]:
        limits, background, seconds = self.settings.limits, self.settings.background, self.settings.video_clip_s
        size = None if self._describer is None else self._describer.size
        if seconds is None:
            yield pool.examine(place, limits, background, describe_size=size)
        else:
            yield from pool.examine_windows(place, limits, background, seconds, describe_size=size)

    def _row(self, file: File, clip: ExaminedClip) -> Examined:
        info = clip.info
        found = {
            "status": TRAINABLE if info.num_frames >= MIN_FRAMES else STATIC,
            "content": clip.content,
            **{name: getattr(info, name) for name in ("format", "num_frames", "width", "height", "has_alpha", "durations_ms")},
        }
        if clip.window is not None:
            found |= {"window_first": clip.window.first, "window_count": clip.window.count}
        return {**file, **UNKNOWN, **found}, self._features(clip)

    def _features(self, clip: ExaminedClip) -> np.ndarray:
        if self._describer is None:
            return clip.thumbnails
        assert clip.frames is not None, "they were asked for"
        with self._one_model:
            return self._describer(clip.frames)


def _demand_storable(place: Place, rows: list[dict[str, Any]]) -> None:
    """One file must not keep those beside it from being stored. ClipError: the segment would not take its rows."""
    try:
        found_table(rows)
    except ValueError as error:
        raise ClipError(place, str(error)) from error


def examine_files(
    files: Iterable[File],
    total: int,
    examiner: Examiner,
    folder: Path,
    workers: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Examine files and commit their rows to an index folder. What was examined before anything went wrong is committed, too.

    Args:
        files: ``total`` of them, taken as they are needed.
        workers: Children, each with one clip at a time.
        on_progress: Called with the files examined and ``total``, whenever one or a window of one is done, from any thread.
    Raises:
        OSError: A segment cannot be written.
    """
    pending: list[Examined] = []
    done, since, committed = 0, 0, time.monotonic()
    threads, pool = ThreadPoolExecutor(workers, thread_name_prefix="examine"), DecoderPool(workers)

    def tell() -> None:
        """A file, or a window of one, is done; windows are told of by the threads that examine."""
        if on_progress is not None:
            on_progress(done, total)

    bar = tqdm(total=total, desc="examining clips", unit="clip", delay=BAR_AFTER_S, smoothing=0.05, file=sys.stderr)
    try:
        for rows in _as_they_come(threads, lambda file: examiner.rows(pool, file, tell), files, 2 * workers):
            pending += rows
            done += 1
            bar.update()
            tell()
            if done - since >= SEGMENT_CLIPS or time.monotonic() - committed > SEGMENT_S:
                _commit(folder, examiner.settings, pending)
                pending, since, committed = [], done, time.monotonic()
    finally:
        bar.close()
        threads.shutdown(wait=False, cancel_futures=True)  # nobody begins another clip,
        pool.close()  # those at work end,
        threads.shutdown()  # and no thread or child is left when loader workers are forked
        _commit(folder, examiner.settings, pending)


def _as_they_come(
    threads: ThreadPoolExecutor, work: Callable[[File], list[Examined]], files: Iterable[File], most: int
) -> Iterator[list[Examined]]:
    """Results in the order they are ready; at most so many files wait for a worker, or their results for being taken."""
    waiting: set[Future[list[Examined]]] = set()
    for file in files:
        waiting.add(threads.submit(work, file))
        if len(waiting) >= most:
            ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in ready)
    while waiting:
        ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        yield from (future.result() for future in ready)


def _commit(folder: Path, settings: IndexSettings, pending: list[Examined]) -> None:
    if pending:
        pending = sorted(pending, key=lambda examined: tuple(examined[0][name] for name in ("file", "offset", "window_first")))
        write_segment(folder, settings, [row for row, _ in pending], [features for _, features in pending])
