"""Animated pictures as layers: a list of patches that are laid on a canvas one after another, and shown after each.

GIF, APNG and animated WebP are all of this kind. Which patches can still be seen in a frame follows from their rectangles alone,
so a few frames out of many are played by decoding a few patches. The formats differ in how a half-transparent picture is laid over
what is below it; each brings its own rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from PIL import Image

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom are outside

_CLEAR = (0, 0, 0, 0)
_MOST_PARTS = 32  # of the uncovered area; beyond, small gaps are no longer told apart, which costs decoding and changes no pixel


class Disposal(Enum):
    """What becomes of a patch's rectangle after it was shown."""

    KEEP = 0
    CLEAR = 1  # to transparent
    RESTORE = 2  # to what it was before


@dataclass(frozen=True, slots=True)
class Patch:
    """One step of an animation.

    Attributes:
        box: Its rectangle; what lies outside of the canvas is not shown.
        duration_ms: How long the frame is shown that it completes.
        decode: Its picture, RGBA and of the box's size; raises whatever Pillow raises on damaged data.
        over: Lays the picture over what is below, both RGBA and of one size, and may use up both; None where it replaces what is below.
    """

    box: Box
    duration_ms: int
    disposal: Disposal
    decode: Callable[[], Image.Image]
    over: Callable[[Image.Image, Image.Image], Image.Image] | None = None


@dataclass(frozen=True, slots=True)
class Animation:
    """A parsed file: its canvas and its patches, one a frame. A still picture is an animation of one."""

    width: int
    height: int
    patches: Sequence[Patch]


def leaves_blank(patch: Patch, canvas: tuple[int, int], was_blank: bool) -> bool:
    """Whether a canvas (width, height) holds nothing once a patch is disposed of. What is laid on a blank canvas replaces it."""
    if patch.disposal is Disposal.RESTORE:
        return was_blank
    covers = patch.box[:2] == (0, 0) and patch.box[2] >= canvas[0] and patch.box[3] >= canvas[1]
    return patch.disposal is Disposal.CLEAR and (was_blank or covers)


def play(animation: Animation, wanted: Sequence[int] | None = None) -> Iterator[tuple[int, Image.Image]]:
    """The wanted frames as they are shown, with their numbers; patches that no wanted frame shows are not decoded.

    Args:
        wanted: numbers of frames, strictly rising; None: all.
    Yields:
        A number and the canvas, RGBA; the canvas is drawn on when the next frame is asked for.
    """
    canvas = Image.new("RGBA", (animation.width, animation.height), _CLEAR)
    done = 0  # the canvas is as patch `done` finds it
    for number in range(len(animation.patches)) if wanted is None else wanted:
        patch = animation.patches[number]
        for earlier in _still_seen(animation, done, number):
            if earlier.disposal is Disposal.CLEAR:
                canvas.paste(_CLEAR, _on(canvas.size, earlier.box))
            else:
                _draw(canvas, earlier)
        box = _on(canvas.size, patch.box)
        before = canvas.crop(box) if patch.disposal is Disposal.RESTORE else None
        _draw(canvas, patch)
        yield number, canvas
        if patch.disposal is Disposal.CLEAR:
            canvas.paste(_CLEAR, box)
        elif before is not None:
            canvas.paste(before, box)
        done = number + 1


def _still_seen(animation: Animation, first: int, number: int) -> list[Patch]:
    """Those of the patches ``first``..``number``-1, in order, of which frame ``number`` can show anything, be it where they cleared.

    Walks back over the patches with the part of the canvas that no later one has covered.
    """
    size = (animation.width, animation.height)
    uncovered = [(0, 0, *size)]
    target = animation.patches[number]
    if target.over is None and target.disposal is not Disposal.RESTORE:  # restored, it shows again what it covers
        uncovered = _without(uncovered, target.box)
    seen: list[Patch] = []
    for patch in reversed(animation.patches[first:number]):
        if not uncovered:
            break
        if patch.disposal is Disposal.RESTORE or not any(_overlap(patch.box, part) for part in uncovered):
            continue
        seen.append(patch)
        if patch.disposal is Disposal.CLEAR or patch.over is None:
            uncovered = _without(uncovered, patch.box)
    return seen[::-1]


def _draw(canvas: Image.Image, patch: Patch) -> None:
    picture = patch.decode()
    left, top, right, bottom = patch.box
    if picture.size != (right - left, bottom - top):
        raise ValueError(f"a picture of {picture.width}×{picture.height} pixels where {right - left}×{bottom - top} are declared")
    box = _on(canvas.size, patch.box)
    if box != patch.box:
        picture = picture.crop((box[0] - left, box[1] - top, box[2] - left, box[3] - top))
    if patch.over is not None:
        picture = patch.over(canvas.crop(box), picture)
    canvas.paste(picture, box)


def _on(size: tuple[int, int], box: Box) -> Box:
    """The part of a box that is on the canvas; one of no extent if there is none."""
    left, top = min(box[0], size[0]), min(box[1], size[1])
    return left, top, min(max(left, box[2]), size[0]), min(max(top, box[3]), size[1])


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _without(parts: list[Box], box: Box) -> list[Box]:
    """The area of the parts, which do not overlap, less a box: again parts that do not overlap. Or all of it, if those are too many."""
    rest: list[Box] = []
    for part in parts:
        if not _overlap(part, box):
            rest.append(part)
            continue
        left, top, right, bottom = part
        middle_top, middle_bottom = max(top, box[1]), min(bottom, box[3])
        strips = (
            (left, top, right, middle_top),
            (left, middle_bottom, right, bottom),
            (left, middle_top, max(left, box[0]), middle_bottom),
            (min(right, box[2]), middle_top, right, middle_bottom),
        )
        rest += [strip for strip in strips if strip[0] < strip[2] and strip[1] < strip[3]]
    return rest if len(rest) <= _MOST_PARTS else parts
