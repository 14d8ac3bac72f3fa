"""Decodes WebM and MP4 with decord. Runs only in children that can be killed (`decoder_child`): no training process imports decord.

decord's FFmpeg is of 2018 and its decoding is known to hang for ever. It gives RGB: a WebM's alpha channel is dropped. Frames are
decoded one after the other and never sought, since decord's seeking misses by some frames in HEVC, MPEG-4 and whatever edit lists cut.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from io import BytesIO

import decord
import numpy as np
from PIL import Image

from rdtf_ds.data.clips.clip import ClipError, ClipInfo, DecodeLimits, ExaminedClip, Place, check_shape, letterbox
from rdtf_ds.data.clips.frame_features import thumbnail
from rdtf_ds.data.clips.headers import sniff_format
from rdtf_ds.data.clips.timeline import Timeline, read_timeline
from rdtf_ds.diffusion.masks import evenly_spaced

_NARROWEST = 128  # pixels a row must have for decord to tell its channels right: it errs at 24, 48 and 72
_UNKNOWN = ("av1",)  # younger than decord's FFmpeg
_Colour = tuple[int, int, int]

decord.logging.set_level(decord.logging.QUIET)


def examine(data: bytes, place: Place, limits: DecodeLimits, background: _Colour, describe_size: int | None = None) -> ExaminedClip:
    """Decode every frame once.

    Args:
        data: the whole video.
        describe_size: also keep the thinned frames, letterboxed to this side, as ``frames``.
    Raises:
        ClipError: beyond a limit, or not what it says.
        Exception: whatever decord says of a broken video.
    """
    timeline = _timeline(data, place)
    wanted = set(thinned(len(timeline), limits))
    thumbnails, squares, size = [], [], (0, 0)
    for number, frame in enumerate(_frames(data, place, len(timeline), len(timeline), limits)):
        size = (frame.width, frame.height)
        if number in wanted:
            thumbnails.append(thumbnail(frame))
            if describe_size is not None:
                squares.append(letterbox(frame, describe_size, background))
    info = ClipInfo(str(sniff_format(data)), len(timeline), *size, False, timeline.durations_ms())
    content = hashlib.sha256(data).hexdigest()
    return ExaminedClip(content, info, np.stack(thumbnails), frames=np.stack(squares) if squares else None)


def decode(
    data: bytes, place: Place, size: int, background: _Colour, limits: DecodeLimits, frames: Sequence[int] | None = None
) -> np.ndarray:
    """uint8 (n, size, size, 3): the thinned frames, or those of them at positions ``frames``, letterboxed.

    Raises:
        ClipError: beyond a limit, not what it says, or without one of the ``frames``.
        Exception: whatever decord says of a broken video.
    """
    total = len(_timeline(data, place))
    numbers = chosen(thinned(total, limits), frames, place)
    until = total if frames is None else max(numbers) + 1
    wanted = set(numbers)
    squares = {
        number: letterbox(frame, size, background)
        for number, frame in enumerate(_frames(data, place, total, until, limits))
        if number in wanted
    }
    return np.stack([squares[number] for number in numbers])


def thinned(total: int, limits: DecodeLimits) -> list[int]:
    """Numbers of the frames that are kept of so many."""
    return [int(number) for number in evenly_spaced(total, min(total, limits.max_frames))]


def chosen(kept: list[int], frames: Sequence[int] | None, place: Place) -> list[int]:
    """What stands at positions ``frames`` of ``kept``, in that order; all of it for None. Raises :class:`ClipError`."""
    if frames is None:
        return kept
    for position in frames:
        if not 0 <= position < len(kept):
            raise ClipError(place, f"frame {position} was asked for, and it has {len(kept)}: it has changed since it was indexed")
    return [kept[position] for position in frames]


def _timeline(data: bytes, place: Place) -> Timeline:
    timeline = read_timeline(BytesIO(data), str(sniff_format(data)), place)
    if timeline.codec in _UNKNOWN:
        remedy = "encode it as VP9 or H.264, or split it by rdtf.data.video_clip_s"
        raise ClipError(place, f"decord cannot decode {timeline.codec.upper()}: {remedy}")
    return timeline


def _frames(data: bytes, place: Place, total: int, until: int, limits: DecodeLimits) -> Iterator[Image.Image]:
    """The first ``until`` of ``total`` frames, at their own size."""
    check_shape(place, 1, 1, total, limits)
    reader = _open(data)
    if len(reader) < total:
        raise ClipError(place, f"decord finds {len(reader)} of its {total} frames")
    first = reader.next().asnumpy()
    height, width = first.shape[:2]
    check_shape(place, width, height, total, limits)
    scale = -(-_NARROWEST // width)
    if scale > 1:  # decord rounds rows up to 64 bytes and takes short ones for more channels: it is told to enlarge small pictures
        reader = _open(data, width=width * scale, height=height * scale)
        first = reader.next().asnumpy()
    for number in range(until):
        frame = first if number == 0 else reader.next().asnumpy()
        if frame.shape != (height * scale, width * scale, 3):
            raise ClipError(place, f"frame {number} has shape {frame.shape}, not {(height * scale, width * scale, 3)}")
        picture = Image.fromarray(frame)
        yield picture.resize((width, height), Image.Resampling.BOX) if scale > 1 else picture


def _open(data: bytes, **size: int) -> decord.VideoReader:
    return decord.VideoReader(BytesIO(data), ctx=decord.cpu(0), num_threads=1, **size)
