"""When each frame of a video is shown, read from its packets alone: nothing is decoded.

decord counts packets and takes that for frames, fills up with repetitions of the last one where packets show nothing (what an edit list
cuts away, VP8's hidden references), and takes how long a frame is encoded to last for how long it is seen. PyAV's FFmpeg knows better.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, BinaryIO

import av
import numpy as np

from rdtf_ds.data.clips.clip import ClipError, Place
from rdtf_ds.data.clips.headers import DEMUXERS

_LONGEST_MS = 2**31 - 1  # what an int32 holds: 25 days


@dataclass(frozen=True, slots=True)
class Timeline:
    """The frames of a video in the order in which they are shown.

    Attributes:
        codec: FFmpeg's name of it.
        width: of the pictures as they are stored, in pixels.
        height: likewise.
        ticks: int64 (F,), when each is shown, rising, in units of ``tick`` seconds.
        keys: int64, ticks of frames that decoding can begin at: from there on pictures come out as they do from the start; rising.
        last: ticks that the last frame is shown for.
    """

    codec: str
    width: int
    height: int
    ticks: np.ndarray
    keys: np.ndarray
    tick: Fraction
    last: int

    def __len__(self) -> int:
        return len(self.ticks)

    @property
    def seconds(self) -> float:
        """From the first frame to the end of the last."""
        return float((int(self.ticks[-1] - self.ticks[0]) + self.last) * self.tick)

    def durations_ms(self, first: int = 0, count: int | None = None) -> tuple[int, ...]:
        """For how long each frame is shown: until the next one comes, at least 1 ms and at most `_LONGEST_MS`."""
        ends = np.append(self.ticks[1:], self.ticks[-1] + self.last)
        spans = (ends - self.ticks)[first : None if count is None else first + count]
        return tuple(min(_LONGEST_MS, max(1, round(1000 * float(int(span) * self.tick)))) for span in spans)

    def windows(self, seconds: float) -> list[tuple[int, int]]:
        """(first frame, frames) of each stretch of that many seconds, counted from the first frame; empty ones are none."""
        numbers = np.floor((self.ticks - self.ticks[0]) * float(self.tick) / seconds + 1e-9).astype(np.int64)
        starts = np.flatnonzero(np.diff(numbers, prepend=-1))
        return list(zip(starts.tolist(), np.diff(starts, append=len(self)).tolist(), strict=True))


def open_container(file: BinaryIO, format: str) -> Any:
    """A WebM or MP4 for PyAV, decoding on one thread. Raises what FFmpeg finds."""
    container: Any = av.open(file, format=DEMUXERS[format], metadata_errors="ignore")
    if not container.streams.video or container.streams.video[0].codec_context is None:
        raise ValueError("it has no video stream that can be decoded")
    container.streams.video[0].codec_context.thread_count = 1
    return container


def read_timeline(file: BinaryIO, format: str, place: Place) -> Timeline:
    """The timeline of a WebM or MP4.

    Raises:
        ClipError: It has no frames, or their times make no order.
        Exception: whatever FFmpeg says of a broken file.
    """
    with open_container(file, format) as container:
        stream = container.streams.video[0]
        codec = stream.codec_context.codec.canonical_name  # not the name of whichever decoder of it FFmpeg took
        ticks: list[int] = []
        keys: list[int] = []
        durations: list[int] = []
        for packet in container.demux(stream):
            if packet.size == 0 or packet.is_discard or (codec == "vp8" and not _shown(packet)):
                continue
            if packet.pts is None:
                raise ClipError(place, f"frame {len(ticks)} has no time")
            ticks.append(packet.pts)
            durations.append(packet.duration or 0)
            if packet.is_keyframe and (codec != "h264" or _refreshes(packet, stream.codec_context.extradata)):
                keys.append(packet.pts)
        width, height, tick = stream.codec_context.width, stream.codec_context.height, stream.time_base
    if not ticks or tick is None:
        raise ClipError(place, "it has no frames")
    order = np.argsort(ticks, kind="stable")
    times = np.asarray(ticks, np.int64)[order]
    if (np.diff(times) <= 0).any():
        number = int(np.flatnonzero(np.diff(times) <= 0)[0])
        raise ClipError(place, f"frames {number} and {number + 1} are shown at the same time")
    last = durations[order[-1]] or (int(times[-1] - times[-2]) if len(times) > 1 else 0)
    return Timeline(codec, width, height, times, np.unique(np.asarray(keys, np.int64)), tick, last)


def _shown(packet: Any) -> bool:
    """Of VP8: some packets are pictures that others refer to and nobody sees (RFC 6386, 9.1)."""
    return bool(memoryview(packet)[0] >> 4 & 1)


def _refreshes(packet: Any, extradata: bytes | None) -> bool:
    """Of H.264 as MP4 has it: whether a picture has an IDR slice, so that none after it refers to one before (ISO/IEC 14496-10, 7.4.1.2.4).

    Others that a file calls keys may begin a gradual refresh, and pictures are not what they should be for some time.
    """
    data = bytes(packet)
    prefix = (extradata[4] & 3) + 1 if extradata and len(extradata) > 4 else 4  # bytes of a NAL unit's length
    at = 0
    while at + prefix < len(data):
        if data[at + prefix] & 31 == 5:
            return True
        at += prefix + int.from_bytes(data[at : at + prefix])
    return False
