"""Many clips on one picture, to be compared at a glance: every frame side by side as PNG, and all of them playing as WebP."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rdtf_ds.data.clips.clip import ClipError, DecodeLimits
from rdtf_ds.data.clips.containers import join_webp
from rdtf_ds.data.clips.decoding import decode_clip, probe_clip
from rdtf_ds.data.clips.writing import PAPER, contact_sheet, wrap, write_atomically
from rdtf_ds.errors import UserError
from rdtf_ds.generation.grids import AXES, told
from rdtf_ds.generation.jobs import Job

MOST_CLIPS = 64
"""On a sheet; more cannot be taken in by eye."""
_SMALL, _LARGE = 96, 256  # pixels of a clip's side on a sheet
_WIDEST = 1600  # pixels of the playing sheet, where its clips need not be smaller than _SMALL for it
_LONGEST_SIDE = 16383  # pixels; WebP has no larger pictures
_CAPTION_LINES, _LINE, _MARGIN = 3, 15, 6
_VARIED = ("seed", "text_scale", "image_scale", "steps", "sampler", "eta", "frames")
_QUALITY = 90
_WHITE = (255, 255, 255)


class Shown(NamedTuple):
    """A clip on a sheet: ``frames`` uint8 (F, S, S, 3), ``durations_ms`` F of them, and what stands beside it."""

    frames: np.ndarray
    durations_ms: Sequence[int]
    label: str


def write_sheets(jobs: Sequence[Job], files: Sequence[Path], stem: Path, columns: int | None = None) -> list[Path]:
    """Write STEM.png, a row of frames for each clip, and STEM.webp, where all clips play; of the first `MOST_CLIPS`.

    Args:
        files: the jobs' clips.
        columns: of the playing sheet; None: about as many as rows.

    Raises:
        UserError: a clip cannot be read again, or a sheet cannot be written.
    """
    jobs, files = jobs[:MOST_CLIPS], files[:MOST_CLIPS]
    stills, playing = stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.webp")
    try:
        shown = [_read(file, label) for file, label in zip(files, labels(jobs), strict=True)]
        contact_sheet([clip.frames for clip in shown], [clip.label for clip in shown], stills)
        write_atomically(playing, playing_sheet(shown, columns or math.ceil(math.sqrt(len(shown)))))
    except (OSError, ClipError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"the sheets '{stills}' and '{playing}' cannot be written: {reason}. The clips that were made stay.") from error
    return [stills, playing]


def labels(jobs: Sequence[Job]) -> list[str]:
    """What tells each job from the others: the settings that not all agree in, then the caption."""
    varied = [name for name in _VARIED if len({getattr(job, name) for job in jobs}) > 1]
    return ["; ".join([*(_told(job, name) for name in varied), job.prompt or "no caption"]) for job in jobs]


def _told(job: Job, name: str) -> str:
    value = getattr(job, name)
    word = AXES[name][0] if name in AXES else name
    return f"{word} {f'default {name}' if value is None and not word else 'default' if value is None else told(value)}".strip()


def _read(file: Path, label: str) -> Shown:
    limits = DecodeLimits()
    info = probe_clip(file, limits)
    side = max(info.width, info.height)
    frames = decode_clip(file, side if side < _LARGE else _LARGE, _WHITE, limits)
    enlarge = max(1, -(-_SMALL // side))
    return Shown(frames.repeat(enlarge, axis=1).repeat(enlarge, axis=2), info.durations_ms, label)


def playing_sheet(clips: Sequence[Shown], columns: int) -> bytes:
    """A WebP on which all clips play from their starts; a shorter one waits on its last frame until the longest has ended.

    Clips become smaller, and columns fewer, where the sheet would be larger than WebP can be.
    """
    room, below = _LONGEST_SIDE - _MARGIN, _CAPTION_LINES * _LINE + _MARGIN
    columns = min(columns, len(clips), room // (_SMALL + _MARGIN))
    rows = math.ceil(len(clips) / columns)
    side = min(max(clip.frames.shape[1] for clip in clips), max(_SMALL, _WIDEST // columns - _MARGIN), room // rows - below)
    height = side + below
    size = (columns * (side + _MARGIN) + _MARGIN, rows * height + _MARGIN)
    page = _captions(clips, columns, side, height, size)
    starts = [np.cumsum([0, *clip.durations_ms]) for clip in clips]
    moments = np.unique(np.concatenate([clip_starts[:-1] for clip_starts in starts]))
    end = max(int(clip_starts[-1]) for clip_starts in starts)
    stills = []
    for moment in moments:
        picture = page.copy()
        for number, (clip, clip_starts) in enumerate(zip(clips, starts, strict=True)):
            frame = min(int(np.searchsorted(clip_starts, moment, side="right")) - 1, len(clip.frames) - 1)
            picture.paste(_fit(clip.frames[frame], side), _corner(number, columns, side, height))
        buffer = BytesIO()
        picture.save(buffer, "WEBP", quality=_QUALITY)
        stills.append(buffer.getvalue())
    return join_webp(stills, np.diff([*moments, end]).tolist(), size, alpha=False)


def _captions(clips: Sequence[Shown], columns: int, side: int, height: int, size: tuple[int, int]) -> Image.Image:
    page = Image.new("RGB", size, PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=12)
    length: Callable[[str], float] = lambda line: draw.textlength(line, font=font)  # noqa: E731
    for number, clip in enumerate(clips):
        left, top = _corner(number, columns, side, height)
        text = wrap(clip.label, side, _CAPTION_LINES, length)
        draw.multiline_text((left, top + side + 1), text, fill="black", font=font, spacing=1)
    return page


def _corner(number: int, columns: int, side: int, height: int) -> tuple[int, int]:
    return _MARGIN + number % columns * (side + _MARGIN), _MARGIN + number // columns * height


def _fit(frame: np.ndarray, side: int) -> Image.Image:
    picture = Image.fromarray(frame)
    return picture if picture.width == side else picture.resize((side, side), Image.Resampling.LANCZOS)
