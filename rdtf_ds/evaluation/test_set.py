"""The real clips that a model is held against: which, how many, and their frames.

Clips are taken in an order that the seed draws, so a smaller number is the beginning of a larger one.

Legend: F frames, S side in pixels.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rdtf_ds.data.clips.clip import ClipError
from rdtf_ds.data.clips.decoding import decode_clip
from rdtf_ds.data.indexing.index import ClipIndex
from rdtf_ds.diffusion.masks import evenly_spaced
from rdtf_ds.errors import UserError
from rdtf_ds.seeding import derive_seed, numpy_generator

Split = Literal["auto", "held_out", "all"]
SPLITS: tuple[Split, ...] = ("auto", "held_out", "all")


@dataclass(frozen=True)
class RealClip:
    """One clip of the test set.

    Attributes:
        name: Of its files: its place in the set.
        clip_id: In the index.
        path: In the data folder.
        caption: Empty where no clip of the set has one.
        content: SHA-256 of the clip.
        shown: Which of its thinned frames are its F frames.
        seed: That the model's clips for it are drawn with; it hangs on the clip and not on its neighbours.
    """

    name: str
    clip_id: int
    path: str
    caption: str
    content: str
    shown: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class RealClips:
    """A test set.

    Attributes:
        clips: In the order drawn.
        held_out: Whether they were held out; False: they may have been trained on.
        of: Clips of the split that could have been drawn.
        too_short, without_caption: Clips of the split that could not, with fewer than F frames, and without a caption.
        fingerprint: 16 hex digits over paths, contents, captions and frames.
    """

    clips: tuple[RealClip, ...]
    held_out: bool
    of: int
    too_short: int
    without_caption: int
    fingerprint: str

    @property
    def captioned(self) -> bool:
        """Whether they have captions: all or none."""
        return bool(self.clips[0].caption)


def choose_clips(index: ClipIndex, split: Split, frames: int, most: int, seed: int) -> RealClips:
    """Draw the test set.

    Clips without a caption are left out, unless no clip has one.

    Args:
        split: ``held_out``, ``all`` (of those training may use, and held out), or ``auto``: held out where any is.
        frames: F; shorter clips are left out.
        most: Clips to take; all where there are fewer.

    Raises:
        UserError: Nothing is held out, or nothing is left.
    """
    held_out = split == "held_out" or (split == "auto" and len(index.held_out) > 0)
    if held_out and not len(index.held_out):
        raise UserError(
            f"--split held_out: no clip of '{index.source}' is held out. Name the run's settings by --config RUN/config.json, where "
            "rdtf.data.validation_fraction is above 0, or take --split all."
        )
    ids = index.held_out if held_out else np.union1d(index.trainable, index.held_out)
    columns = index.columns("path", "caption", "content", "kept")
    long_enough = ids[columns.column("kept").to_numpy()[ids] >= frames]
    said = pc.not_equal(pc.utf8_trim_whitespace(columns.column("caption").take(long_enough)), "")
    captioned = long_enough[said.to_numpy(zero_copy_only=False)]
    usable = captioned if len(captioned) else long_enough
    if not len(usable):
        side = "held out in" if held_out else "in"
        raise UserError(f"none of the {len(ids)} clips {side} '{index.source}' has {frames} frames. Ask for fewer: --frames.")
    drawn = numpy_generator(seed, "test set").permutation(usable)[:most]
    width = len(str(len(drawn) - 1))
    rows = columns.take(pa.array(drawn)).to_pylist()
    clips = tuple(
        RealClip(
            name=f"{place:0{width}d}",
            clip_id=clip_id,
            path=row["path"],
            caption=row["caption"].strip(),
            content=row["content"],
            shown=tuple(evenly_spaced(row["kept"], frames).tolist()),
            seed=derive_seed(seed, "evaluated clip", row["path"]),
        )
        for place, (clip_id, row) in enumerate(zip(drawn.tolist(), rows, strict=True))
    )
    counts = {"too_short": len(ids) - len(long_enough), "without_caption": len(long_enough) - len(usable)}
    return RealClips(clips, held_out, len(usable), **counts, fingerprint=_fingerprint(clips))


def _fingerprint(clips: tuple[RealClip, ...]) -> str:
    told = "\n".join(repr((clip.path, clip.content, clip.caption, clip.shown)) for clip in clips)
    return hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def real_frames(index: ClipIndex, clip: RealClip, side: int, background: tuple[int, int, int]) -> np.ndarray:
    """The F frames of a clip as the model would have seen them: uint8 (F, S, S, 3).

    Raises:
        UserError: The file is not what was indexed any more.
    """
    where, limits, window = index.place(clip.clip_id), index.settings.limits, index.window(clip.clip_id)
    try:
        return decode_clip(where, side, background, limits, frames=clip.shown, content=clip.content, window=window)
    except ClipError as error:
        raise UserError(f"the clip '{clip.path}' was fine when it was indexed and cannot be read now: {error.reason}.") from error
