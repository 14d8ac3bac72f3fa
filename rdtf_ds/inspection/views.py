"""What training makes of a clip: its frames, their clusters, and the k frames that samples take of it.

Legend: F frames of a clip (thinned, as training sees them), k frames of a sample.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO

import numpy as np
from PIL import Image

from rdtf_ds.data.clips.clip import ClipError, DecodeLimits
from rdtf_ds.data.clips.decoder_process import DecoderUnavailable
from rdtf_ds.data.clips.decoding import decode_clip
from rdtf_ds.data.clustering import cluster_frames
from rdtf_ds.data.indexing.index import ClipIndex
from rdtf_ds.data.step_plan import draw_key
from rdtf_ds.diffusion.masks import evenly_spaced
from rdtf_ds.inspection.variety import ALL_K, frames_drawn
from rdtf_ds.seeding import numpy_generator

DRAWS = 3
"""Samples of each clip and k that are shown."""
BYTES_OF_CLIP = 270_000
"""Of its pictures in the page; what would be larger is made smaller and coarser."""
_COLUMNS = 16
_FRAMES_OF_BUCKETS = np.array([8, 16, 32, 64])
_LADDER = ((128, 96, 75), (128, 72, 60), (96, 64, 45), (64, 48, 30), (48, 32, 10), (32, 16, 1))
"""Side of the animation, side of a frame in the sheet, quality: the first that is small enough."""
_LONGEST_MS = 60_000  # of a frame in the page: an APNG's may be shown for 18 hours, and a WebP cannot say so
_SHOWN_AS_MS = 100  # what browsers make of a frame that says it is shown for 0 to 10 ms


@dataclass(frozen=True, slots=True)
class Draw:
    """The frames one sample takes, rising, and the cluster of every frame, numbered in the order of their first frames."""

    clusters: tuple[int, ...]
    frames: tuple[int, ...]


@dataclass
class ClipView:
    """One clip of the report.

    Attributes:
        facts: One line: format, frames, size, time.
        draws: By k, of which no more than F.
        animation, sheet: ``data:`` addresses of WebP pictures: the clip playing, and all its frames in ``rows`` rows of ``columns``.
        problem: Why it cannot be shown, else empty.
    """

    path: str
    caption: str
    facts: str
    frames: int = 0
    draws: dict[int, list[Draw]] = field(default_factory=dict)
    animation: str = ""
    sheet: str = ""
    columns: int = 1
    rows: int = 1
    problem: str = ""


def pick_clips(ids: np.ndarray, formats: np.ndarray, frame_counts: np.ndarray, count: int, seed: int) -> list[int]:
    """Some clips of every format and every range of frame counts there are, in turn, drawn by the seed.

    Args:
        ids, formats, frame_counts: Of the clips to pick from, aligned; a format is any number of its own.
    Returns:
        Ids, rising; all where there are no more than ``count``.
    """
    order = numpy_generator(seed, "inspected clips").permutation(len(ids))
    stratum = np.searchsorted(_FRAMES_OF_BUCKETS, frame_counts) * (int(formats.max(initial=0)) + 1) + formats
    names = np.unique(stratum).tolist()
    stratum = stratum[order]
    strata = {name: ids[order[np.flatnonzero(stratum == name)[:count]]].tolist() for name in names}
    numpy_generator(seed, "inspected strata").shuffle(names)  # where there are more strata than clips to pick
    picked: list[int] = []
    turn = 0
    while len(picked) < min(count, len(ids)):
        picked += [strata[name][turn] for name in names if turn < len(strata[name])][: count - len(picked)]
        turn += 1
    return sorted(picked)


def view_clip(index: ClipIndex, clip_id: int, seed: int, limits: DecodeLimits, background: tuple[int, int, int]) -> ClipView:
    """Decode a clip and draw samples of it, numbered from its id on in steps of the number of clips, as epochs would.

    A clip that cannot be decoded (any more, or by this machine) is shown as such.
    """
    row = index.rows[clip_id]
    seconds = sum(row.durations_ms) / 1000
    facts = f"{row.format}, {row.num_frames}\u00a0frames, {row.width}×{row.height}" + (f", {seconds:.3g}\u00a0s" if seconds else "")
    view = ClipView(row.path, row.caption, facts)
    try:
        frames = decode_clip(
            index.place(clip_id), _LADDER[0][0], background, limits, content=index.content(clip_id), window=index.window(clip_id)
        )
        features = index.frame_features(clip_id)
    except (ClipError, DecoderUnavailable) as error:
        view.problem = error.reason if isinstance(error, ClipError) else str(error)
        return view
    view.frames = len(frames)
    numbers = [clip_id + epoch * len(index.rows) for epoch in range(DRAWS)]
    view.draws = {k: [draw(features, k, seed, number) for number in numbers] for k in ALL_K if k <= len(frames)}
    view.columns = min(_COLUMNS, len(frames))
    view.rows = -(-len(frames) // view.columns)
    view.animation, view.sheet = _pictures(frames, shown_for(row.durations_ms, len(frames)), view.columns)
    return view


def draw(features: np.ndarray, k: int, seed: int, sample_number: int) -> Draw:
    """The frames that a sample of a run with this seed takes of a clip, and the clusters it takes them of: features (F, D), F ≥ k."""
    labels = cluster_frames(features, k, numpy_generator(seed, *draw_key(sample_number, "frames", 0))).tolist()
    order = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    frames = frames_drawn(features, k, seed, sample_number)
    return Draw(tuple(order[label] for label in labels), tuple(frames.tolist()))


def shown_for(durations_ms: Sequence[int], kept: int) -> list[int]:
    """Milliseconds for each kept frame: its own and those of the frames after it that thinning left out; a minute at most."""
    if not durations_ms or sum(durations_ms) == 0:
        return [_SHOWN_AS_MS] * kept
    starts = evenly_spaced(len(durations_ms), kept)
    return [min(_LONGEST_MS, max(1, int(total))) for total in np.add.reduceat(np.array(durations_ms, np.int64), starts)]


def _pictures(frames: np.ndarray, durations_ms: Sequence[int], columns: int) -> tuple[str, str]:
    """The clip playing and the sheet of its frames: uint8 (F, s, s, 3) -> two ``data:`` addresses, small enough together."""
    for side, cell, quality in _LADDER:
        playing, *rest = _resized(frames, side)
        options = {"save_all": True, "append_images": rest, "duration": list(durations_ms), "loop": 0} if rest else {}
        animation = _webp(playing, quality, options)
        sheet = _webp(_sheet(_resized(frames, cell), columns), quality, {})
        if len(animation) + len(sheet) <= BYTES_OF_CLIP:
            break
    return animation, sheet


def _resized(frames: np.ndarray, side: int) -> list[Image.Image]:
    pictures = [Image.fromarray(frame) for frame in frames]
    return [picture.resize((side, side), Image.Resampling.BICUBIC) if picture.width != side else picture for picture in pictures]


def _sheet(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    side = pictures[0].width
    sheet = Image.new("RGB", (columns * side, -(-len(pictures) // columns) * side), "white")
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (number % columns * side, number // columns * side))
    return sheet


def _webp(picture: Image.Image, quality: int, options: dict[str, object]) -> str:
    buffer = BytesIO()
    picture.save(buffer, "WEBP", quality=quality, method=3, **options)
    return "data:image/webp;base64," + b64encode(buffer.getvalue()).decode("ascii")
