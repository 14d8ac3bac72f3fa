"""The layered player: frames by hand, few frames equal to the same of all, and no patch decoded that cannot be seen."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rdtf_ds.data.clips.animation import Animation, Box, Disposal, Patch, leaves_blank, play
from rdtf_ds.data.clips.apng import read_png
from rdtf_ds.data.clips.gif import read_gif
from rdtf_ds.data.clips.webp import blend, read_webp
from tests.data import hand_made
from tests.data.hand_made import BLUE, COLOURS, GREEN, RED, Layer, apng, gif, random_animation, webp
from tests.data.players import blended, ffmpeg_frames, libwebp_frames, need, shown

READERS: dict[str, Callable[[bytes, int], Animation]] = {"gif": read_gif, "png": read_png, "webp": read_webp}
KEEP, CLEAR, RESTORE = Disposal
LEFT, RIGHT, ALL = (0, 0, 2, 2), (2, 0, 4, 2), (0, 0, 4, 2)
SIZE = (4, 2)


def played(animation: Animation, wanted: list[int] | None = None) -> list[np.ndarray]:
    """Copies of the canvas, whose numbers are those asked for."""
    shown = [(number, np.array(canvas)) for number, canvas in play(animation, wanted)]
    assert [number for number, _ in shown] == (wanted if wanted is not None else list(range(len(animation.patches))))
    return [frame for _, frame in shown]


@pytest.mark.parametrize("format", READERS)
@given(seed=st.integers(0, 2**32 - 1), data=st.data())
def test_chosen_frames_equal_the_same_of_all(format: str, seed: int, data: st.DataObject) -> None:
    file, count = random_animation(format, seed)
    animation = READERS[format](file, 3000)
    assert len(animation.patches) == count
    everything = played(animation)
    wanted = data.draw(st.lists(st.integers(0, count - 1), unique=True, min_size=1).map(sorted))
    for number, frame in zip(wanted, played(animation, wanted), strict=True):
        np.testing.assert_array_equal(frame, everything[number])


@pytest.mark.parametrize("format", READERS)
def test_a_frame_after_a_chosen_one_shows_what_that_one_covered(format: str) -> None:
    for seed in [2_072_808_608, *range(60)]:
        file, count = random_animation(format, seed)
        animation = READERS[format](file, 3000)
        everything = played(animation)
        for first in range(count - 1):
            for frame, number in zip(played(animation, [first, first + 1]), (first, first + 1), strict=True):
                np.testing.assert_array_equal(frame, everything[number], err_msg=f"seed {seed}, frame {number} of {first}, {first + 1}")


@pytest.mark.parametrize("seed", range(25))
def test_random_webp_is_played_as_libwebp_does_to_the_last_bit(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "a.webp"
    path.write_bytes(random_animation("webp", seed)[0])
    expected, durations = libwebp_frames(path)
    animation = read_webp(path.read_bytes(), 3000)
    assert durations == [patch.duration_ms for patch in animation.patches] == [40] * len(expected)
    np.testing.assert_array_equal(np.stack(played(animation)), expected)


@pytest.mark.parametrize("seed", range(6))
def test_random_gif_is_played_as_ffmpeg_does(seed: int, tmp_path: Path) -> None:
    need("ffmpeg")
    rng = np.random.default_rng(seed)
    patches = [hand_made.Patch(BLUE, (0, 0, 9, 7), 1, RED)]
    for disposal in rng.integers(1, 4, 8).tolist():
        left, top = int(rng.integers(9)), int(rng.integers(7))
        box = (left, top, int(rng.integers(1, 10 - left)), int(rng.integers(1, 8 - top)))
        patches.append(hand_made.Patch(rng.integers(0, 4, (box[3], box[2])), box, disposal, RED))
    (tmp_path / "a.gif").write_bytes(gif(9, 7, patches))
    ours = np.stack(played(read_gif((tmp_path / "a.gif").read_bytes(), 3000)))
    np.testing.assert_array_equal(shown(ours), shown(ffmpeg_frames(tmp_path / "a.gif", 9, 7)))


def libwebp_pixel(source: list[int], below: list[int]) -> list[int]:
    """BlendPixelNonPremult of libwebp, one pixel in Python's integers."""
    alpha = source[3]
    if alpha in (0, 255):
        return source if alpha else below
    under = below[3] * (256 - alpha) >> 8
    scale = (1 << 24) // (alpha + under)
    return [(one * alpha + other * under) * scale >> 24 for one, other in zip(source[:3], below[:3], strict=True)] + [alpha + under]


def test_webp_blending_is_the_integer_rule_and_near_the_real_one() -> None:
    rng = np.random.default_rng(0)
    source, below = rng.integers(0, 256, (2, 64, 64, 4), dtype=np.uint8)
    source[:8, :, 3], source[8:16, :, 3], below[::5, :, 3], below[1::5, :, 3] = 0, 255, 0, 255
    laid = blend(source, below)
    expected = [libwebp_pixel(*pair) for pair in zip(source.reshape(-1, 4).tolist(), below.reshape(-1, 4).tolist(), strict=True)]
    assert laid.reshape(-1, 4).tolist() == expected
    solid = laid[..., 3] > 64
    assert np.abs(laid - blended(source, below))[solid].max() < 4


def counted(specification: list[tuple[Box, Disposal, bool]], decoded: list[int], size: tuple[int, int] = SIZE) -> Animation:
    """Patches of the colour of their number that note when they are decoded; True: laid over what is below."""

    def decode(number: int, box: Box) -> Image.Image:
        decoded.append(number)
        return Image.new("RGBA", (box[2] - box[0], box[3] - box[1]), (number, 0, 0, 255))

    patches = [
        Patch(box, 0, disposal, partial(decode, number, box), Image.alpha_composite if over else None)
        for number, (box, disposal, over) in enumerate(specification)
    ]
    return Animation(*size, patches)


@pytest.mark.parametrize(
    ("specification", "wanted", "decoded"),
    [
        pytest.param([(ALL, KEEP, False)] * 5, [3], [3], id="replaced"),
        pytest.param([(ALL, KEEP, True)] * 4, [2], [0, 1, 2], id="laid over"),
        pytest.param([(ALL, KEEP, True)] * 4, [1, 3], [0, 1, 2, 3], id="goes on from the last"),
        pytest.param([(ALL, CLEAR, True)] * 4, [2], [2], id="cleared"),
        pytest.param([(ALL, KEEP, True), (ALL, RESTORE, True), (ALL, KEEP, True)], [2], [0, 2], id="restored"),
        pytest.param([(LEFT, KEEP, False), (RIGHT, KEEP, False), (LEFT, KEEP, False)], [2], [1, 2], id="beside"),
        pytest.param([(ALL, KEEP, True), (LEFT, CLEAR, True), (RIGHT, CLEAR, True), (LEFT, KEEP, True)], [3], [3], id="cleared by halves"),
        pytest.param([(ALL, KEEP, True), (LEFT, CLEAR, True), (LEFT, KEEP, True)], [2], [0, 2], id="cleared in part"),
        pytest.param([(LEFT, KEEP, False), ((1, 0, 4, 2), KEEP, False)], [1], [0, 1], id="one column is left"),
        pytest.param([(ALL, KEEP, False)] * 3, [0, 2], [0, 2], id="between two"),
        pytest.param([(ALL, KEEP, False), ((9, 9, 11, 11), KEEP, False), (LEFT, KEEP, True)], [2], [0, 2], id="off the canvas"),
    ],
)
def test_only_what_can_be_seen_is_decoded(specification: list, wanted: list[int], decoded: list[int]) -> None:
    seen: list[int] = []
    played(counted(specification, seen), wanted)
    assert seen == decoded


@given(seed=st.integers(0, 2**32 - 1))
def test_what_is_decoded_is_just_what_a_pixel_by_pixel_search_finds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.integers(0, 7, (8, 2, 2)), axis=1) + [[0, 0], [1, 1]]
    specification = [
        ((*map(int, first), *map(int, last)), Disposal(int(rng.integers(3))), bool(rng.random() < 0.5))
        for first, last in corners
    ]
    wanted = int(rng.integers(8))
    uncovered, expected = np.ones((8, 8), bool), [wanted]
    for number in range(wanted, -1, -1):
        (left, top, right, bottom), disposal, over = specification[number]
        area = (slice(top, bottom), slice(left, right))
        if number < wanted:
            if disposal is RESTORE or not uncovered[area].any():
                continue
            if disposal is KEEP:
                expected.append(number)
        shows_it_again = disposal is RESTORE  # what the wanted frame covers may be asked for next
        if (not over and not shows_it_again) or (disposal is CLEAR and number < wanted):
            uncovered[area] = False
    seen: list[int] = []
    played(counted(specification, seen, (8, 8)), [wanted])
    assert seen == sorted(expected)


def test_very_many_gaps_change_no_pixel() -> None:
    rng = np.random.default_rng(3)
    corners = rng.integers(0, 60, (300, 2)).tolist()
    specification = [((0, 0, 64, 64), KEEP, False)] + [((x, y, x + 2, y + 2), Disposal(int(rng.integers(3))), False) for x, y in corners]
    everything = played(counted(specification, [], (64, 64)))
    seen: list[int] = []
    np.testing.assert_array_equal(played(counted(specification, seen, (64, 64)), [300])[0], everything[300])
    assert len(seen) <= 301


def test_when_a_canvas_is_blank_again() -> None:
    def after(box: Box, disposal: Disposal, was_blank: bool) -> bool:
        return leaves_blank(counted([(box, disposal, False)], []).patches[0], SIZE, was_blank)

    assert after(ALL, CLEAR, False) and after(LEFT, CLEAR, True) and after(LEFT, RESTORE, True) and after((0, 0, 9, 9), CLEAR, False)
    assert not (after(LEFT, CLEAR, False) or after(ALL, KEEP, True) or after(ALL, RESTORE, False) or after((1, 0, 4, 2), CLEAR, False))


def test_a_picture_of_another_size_is_refused() -> None:
    animation = Animation(*SIZE, [Patch(LEFT, 0, KEEP, lambda: Image.new("RGBA", (3, 2)))])
    with pytest.raises(ValueError, match="3×2 pixels where 2×2"):
        played(animation)


@pytest.mark.parametrize(
    ("disposal", "transparent", "last"),
    [
        (0, None, "rrg ........."),  # kept
        (1, None, "rrg ........."),
        (2, None, "..g ........."),  # cleared to transparent, as browsers do, not to the background colour
        (3, None, "bbg ........."),  # as it was before
        (2, BLUE, "..g ........."),
    ],
)
def test_gif_disposal_by_hand(disposal: int, transparent: int | None, last: str) -> None:
    rows = [(BLUE, (0, 0, 2, 1), 0, None), (RED, (0, 0, 2, 1), disposal, transparent), (GREEN, (2, 0, 1, 1), 0, None)]
    frames = played(read_gif(gif(3, 4, [hand_made.Patch(*row) for row in rows]), 3000))
    assert len(frames) == 3
    expected = [COLOURS[mark] for mark in last.replace(" ", "")]
    for pixel, colour in zip(frames[-1].reshape(-1, 4), expected, strict=True):
        assert pixel[3] == 0 if colour is None else tuple(pixel) == (*colour, 255)
    assert tuple(frames[1][0, 0]) == (255, 0, 0, 255)


@pytest.mark.parametrize("default_image", [False, True])
@pytest.mark.parametrize("disposal", [0, 1, 2])
def test_apng_blending_and_disposal_by_hand(disposal: int, default_image: bool) -> None:
    layers = [
        Layer((200, 0, 0, 255), (0, 0, 2, 2)),
        Layer((0, 100, 0, 128), (0, 0, 3, 1), disposal),  # half over red, half over nothing
        Layer((0, 0, 50, 100), (1, 0, 2, 1), blend=0),  # replaces
    ]
    animation = read_png(apng(3, 2, layers, default_image), 3000)
    assert [patch.duration_ms for patch in animation.patches] == [50, 50, 50]
    base = np.zeros((2, 3, 4))
    base[:, :2] = (200, 0, 0, 255)
    middle = base.copy()
    middle[:1] = blended(np.broadcast_to(np.array([0.0, 100, 0, 128]), (1, 3, 4)), base[:1])
    last = {0: middle.copy(), 1: middle.copy(), 2: base.copy()}[disposal]
    if disposal == 1:
        last[:1] = 0
    last[0, 1:] = (0, 0, 50, 100)
    for ours, expected in zip(played(animation), [base, middle, last], strict=True):
        assert np.abs(ours - expected).max() <= 1


def test_a_first_apng_frame_disposed_to_previous_is_cleared() -> None:
    animation = read_png(apng(1, 1, [Layer((9, 9, 9, 255), (0, 0, 1, 1), disposal=2), Layer((0, 0, 0, 0), (0, 0, 1, 1))]), 3000)
    assert [frame[0, 0].tolist() for frame in played(animation)] == [[9, 9, 9, 255], [0, 0, 0, 0]]


def test_parsing_stops_after_one_frame_too_many() -> None:
    assert len(read_gif(gif(1, 1, [hand_made.Patch(RED, (0, 0, 1, 1))] * 9), 4).patches) == 5
    assert len(read_webp(webp(1, 1, [Layer((1, 2, 3, 255), (0, 0, 1, 1))] * 9), 4).patches) == 5
    assert len(read_png(apng(1, 1, [Layer((1, 2, 3, 255), (0, 0, 1, 1))] * 9), 4).patches) == 5
