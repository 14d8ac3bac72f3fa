"""Clips out of long videos, with PyAV: stretches of frames, examined in one pass and decoded on their own. Runs only in children.

decord would not do: it opens a video by reading all of it, and its seeking is not exact. Here a stretch decodes to the same pixels whether
the frames before it were decoded or not, and a video of any length, also one inside a tar shard, is read where it lies.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from rdtf_ds.data.clips.clip import ClipError, ClipInfo, DecodeLimits, ExaminedClip, Place, VideoLength, Window, check_shape, letterbox
from rdtf_ds.data.clips.frame_features import thumbnail
from rdtf_ds.data.clips.headers import VIDEO_FORMATS, sniff_format
from rdtf_ds.data.clips.places import open_regular, place_size
from rdtf_ds.data.clips.timeline import Timeline, open_container, read_timeline
from rdtf_ds.data.clips.video import chosen, thinned

_CHUNK = 2**20
TOLD_BYTES = 2**20
"""Read of a long video before its listener (`tell_reads_to`) hears of it again."""
_listener: Callable[[int], None] | None = None
_read_bytes = 0  # that it was not told yet
_Colour = tuple[int, int, int]


class LongVideo(io.RawIOBase):
    """A video as a file of its own, wherever it lies: the bytes of a place, and nothing before or after them. A context manager.

    Raises:
        ClipError: on opening, what `places.open_regular` says, or that it is no video.
    """

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place
        self._size, self._at = place_size(place), 0
        self._descriptor = open_regular(place.path)
        format = sniff_format(os.pread(self._descriptor, 16, place.offset))
        if format not in VIDEO_FORMATS:
            self.close()
            raise ClipError(place, f"a {format} cannot be split into clips" if format else "not a WebM or MP4 file")
        self.format = str(format)

    def readable(self) -> bool:
        """True, where ``io.RawIOBase`` says False."""
        return True

    def seekable(self) -> bool:
        """True, where ``io.RawIOBase`` says False: demuxers then look for the index at the end."""
        return True

    def tell(self) -> int:
        """Bytes from the beginning of the video, wherever that lies in the file."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go ``offset`` bytes from the beginning, here or the end of the video, never before its beginning; returns `tell`."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` from here on; returns how many bytes that were, 0 at the end of the video."""
        room = memoryview(buffer)[: max(0, min(len(buffer), self._size - self._at))]
        count = os.preadv(self._descriptor, [room], self.place.offset + self._at) if room else 0
        self._at += count
        _has_read(count)
        return count

    def close(self) -> None:
        """Lets go of the file; a second time does nothing."""
        if not self.closed:
            os.close(self._descriptor)
        super().close()

    def timeline(self) -> Timeline:
        """Remembered for the last few files, as reading it means to read the file from end to end."""
        return _timeline(self.place, self._version())

    def _version(self) -> tuple[int, ...]:
        status = os.fstat(self._descriptor)
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

    def content(self) -> str:
        """SHA-256 of the video, remembered as well."""
        return _content(self.place, self._version())

    def read_content(self) -> str:
        """The same, computed now."""
        digest = hashlib.sha256()
        for start in range(0, self._size, _CHUNK):
            chunk = os.pread(self._descriptor, min(_CHUNK, self._size - start), self.place.offset + start)
            digest.update(chunk)
            _has_read(len(chunk))
        return digest.hexdigest()

    def pictures(self, timeline: Timeline, first: int) -> Iterator[tuple[int, Image.Image]]:
        """(number, RGB picture) of every frame from number ``first`` on.

        Decoding begins at the last key before it; should the demuxer, which finds keys by when they are stored, be too late, at the start.
        """
        key = int(np.searchsorted(timeline.keys, timeline.ticks[first], side="right")) - 1
        if key > 0:
            pictures = self._decode(timeline, int(timeline.keys[key]))
            start = next(pictures, None)
            if start is not None and start[0] <= first:
                yield from ((number, picture) for number, picture in itertools.chain([start], pictures) if number >= first)
                return
        yield from ((number, picture) for number, picture in self._decode(timeline, None) if number >= first)

    def _decode(self, timeline: Timeline, tick: int | None) -> Iterator[tuple[int, Image.Image]]:
        self.seek(0)
        with open_container(self, self.format) as container:  # type: ignore[arg-type]
            stream = container.streams.video[0]
            if tick is not None:
                container.seek(tick, stream=stream)
            for frame in container.decode(stream):
                number = int(np.searchsorted(timeline.ticks, frame.pts)) if frame.pts is not None else len(timeline)
                if number < len(timeline) and timeline.ticks[number] == frame.pts:
                    yield number, _upright(frame)


def tell_reads_to(listener: Callable[[int], None]) -> None:
    """From now on call ``listener`` with the bytes that were read since it was called last, from within whatever reads a long video.

    Reading all of one may take any time: who goes on is told from who hangs by this alone.
    """
    global _listener, _read_bytes
    _listener, _read_bytes = listener, 0


def _has_read(count: int) -> None:
    global _read_bytes
    _read_bytes += count
    if _listener is not None and _read_bytes >= TOLD_BYTES:
        told, _read_bytes = _read_bytes, 0
        _listener(told)


@lru_cache(maxsize=8)
def _timeline(place: Place, version: tuple[int, ...]) -> Timeline:
    with LongVideo(place) as video:
        return read_timeline(video, video.format, place)  # type: ignore[arg-type]


@lru_cache(maxsize=8)
def _content(place: Place, version: tuple[int, ...]) -> str:
    with LongVideo(place) as video:
        return video.read_content()


def window_content(content: str, window: Window) -> str:
    """SHA-256 that stands for a stretch of the video whose bytes have the SHA-256 ``content``; both in hex."""
    return hashlib.sha256(f"{content} {window.first} {window.count}".encode()).hexdigest()


def _upright(frame: Any) -> Image.Image:
    picture = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90 % 4)
    return Image.fromarray(np.ascontiguousarray(picture))


def measure(place: Place) -> VideoLength:
    """How many frames a video has, and for how long they are shown; nothing is decoded. Raises :class:`ClipError`."""
    with LongVideo(place) as video:
        timeline = video.timeline()
    return VideoLength(len(timeline), timeline.seconds)


def examine_windows(
    place: Place, limits: DecodeLimits, background: _Colour, seconds: float, most: int, describe_size: int | None = None
) -> Iterator[ExaminedClip]:
    """Decode a video once, from end to end, and yield what is known of each stretch of ``seconds``, as soon as it is.

    ``limits.max_bytes`` does not apply, and the others do to each stretch. ``content`` tells stretches of one video apart.

    Raises:
        ClipError: a stretch beyond a limit, a frame that does not decode, more than ``most`` stretches.
        Exception: whatever FFmpeg says of a broken video.
    """
    with LongVideo(place) as video:
        timeline = video.timeline()
        windows = [Window(*span) for span in timeline.windows(seconds)]
        if len(windows) > most:
            what = f"{len(windows)} clips of rdtf.data.video_clip_s ({seconds:g} s)"
            raise ClipError(place, f"would be split into {what}, and {most} are the most")
        for window in windows:
            check_shape(place, timeline.width, timeline.height, window.count, limits)
        content = video.content()
        pictures = video.pictures(timeline, 0)
        for window in windows:
            yield _examine(place, pictures, window, timeline, content, limits, background, describe_size, video.format)


def _examine(
    place: Place, pictures: Iterator[tuple[int, Image.Image]], window: Window, timeline: Timeline, content: str,
    limits: DecodeLimits, background: _Colour, describe_size: int | None, format: str,
) -> ExaminedClip:  # fmt: skip
    wanted = {window.first + number for number in thinned(window.count, limits)}
    thumbnails, squares, size = [], [], (0, 0)
    for number, picture in _whole(place, pictures, window, timeline):
        size = picture.size
        if number in wanted:
            thumbnails.append(thumbnail(picture))
            if describe_size is not None:
                squares.append(letterbox(picture, describe_size, background))
    info = ClipInfo(format, window.count, *size, False, timeline.durations_ms(window.first, window.count))
    return ExaminedClip(window_content(content, window), info, np.stack(thumbnails), window, np.stack(squares) if squares else None)


def decode_window(
    place: Place, window: Window, size: int, background: _Colour, limits: DecodeLimits,
    frames: Sequence[int] | None = None, content: str | None = None,
) -> np.ndarray:  # fmt: skip
    """uint8 (n, size, size, 3) of the thinned frames of a stretch, or of those at positions ``frames``: those of `examine_windows`.

    Args:
        content: The stretch's `window_content` as it should be; None: any.
    Raises:
        ClipError: beyond a limit, the video does not have these frames, or is not the one that ``content`` speaks of.
        Exception: whatever FFmpeg says of a broken video.
    """
    with LongVideo(place) as video:
        if content not in (None, window_content(video.content(), window)):
            raise ClipError(place, "has changed since it was indexed")
        timeline = video.timeline()
        if window.first + window.count > len(timeline):
            needed = window.first + window.count
            raise ClipError(place, f"has {len(timeline)} frames, and {needed} are needed: it has changed since it was indexed")
        check_shape(place, timeline.width, timeline.height, window.count, limits)
        numbers = chosen([window.first + number for number in thinned(window.count, limits)], frames, place)
        wanted, until = set(numbers), Window(window.first, max(numbers) - window.first + 1)
        squares = {
            number: letterbox(picture, size, background)
            for number, picture in _whole(place, video.pictures(timeline, window.first), until, timeline)
            if number in wanted
        }
    return np.stack([squares[number] for number in numbers])


def _whole(
    place: Place, pictures: Iterator[tuple[int, Image.Image]], window: Window, timeline: Timeline
) -> Iterator[tuple[int, Image.Image]]:
    """The frames of a stretch, none missing and all of one size."""
    size = None
    for expected in range(window.first, window.first + window.count):
        number, picture = next(pictures, (None, None))
        if number != expected or picture is None:
            at = float((timeline.ticks[expected] - timeline.ticks[0]) * timeline.tick)
            raise ClipError(place, f"frame {expected} of {len(timeline)}, at {at:.2f} s, does not decode")
        if picture.size != (size := size or picture.size):
            raise ClipError(place, f"frame {expected} has another size than those before it: {picture.size}, not {size}")
        yield expected, picture
