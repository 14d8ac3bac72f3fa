"""Which pictures are taken as they are, which are converted, which are refused; and how long frames are shown."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from rdtf_ds.clip_requests import clip_requests, frame_durations, picture_pixels
from rdtf_ds.errors import UserError

SIZE, BACKGROUND = 8, (10, 250, 10)


def given(picture: Image.Image | np.ndarray, fit: bool = False) -> np.ndarray:
    (request,) = clip_requests(None, {1: picture}, 0, None, 4)
    return picture_pixels(request.pictures[1], 1, SIZE, BACKGROUND, fit)


def palette(transparent: bool) -> Image.Image:
    image = Image.new("P", (SIZE, SIZE), 1)
    image.putpalette([0, 0, 0, 200, 30, 30])
    if transparent:
        image.info["transparency"] = 1
    return image


@pytest.mark.parametrize(
    ("picture", "colour"),
    [
        (Image.new("RGB", (SIZE, SIZE), (1, 2, 3)), (1, 2, 3)),
        (Image.new("RGBA", (SIZE, SIZE), (1, 2, 3, 255)), (1, 2, 3)),  # alpha, but nothing to see through
        (np.full((SIZE, SIZE, 3), 9, np.uint8), (9, 9, 9)),
        (np.full((SIZE, SIZE, 4), 255, np.uint8), (255, 255, 255)),
        (Image.new("L", (SIZE, SIZE), 77), (77, 77, 77)),
        (Image.new("1", (SIZE, SIZE), 1), (255, 255, 255)),
        (Image.new("LA", (SIZE, SIZE), (77, 255)), (77, 77, 77)),
        (palette(False), (200, 30, 30)),
        (Image.fromarray(np.full((SIZE, SIZE), 257 * 100, np.uint16)), (100, 100, 100)),  # 16 bits: 65535 is white
        (Image.fromarray(np.full((SIZE, SIZE), 65535, np.int32)), (255, 255, 255)),
    ],
)
def test_pictures_of_the_right_size_are_taken_in_any_mode(picture, colour):
    for fit in (False, True):
        frame = given(picture, fit)
        assert frame.shape == (SIZE, SIZE, 3) and frame.dtype == np.uint8 and (frame == colour).all()


HALF = Image.new("RGBA", (SIZE, SIZE), (1, 2, 3, 254))
RGB_WITH_TRANSPARENT_COLOUR = Image.new("RGB", (SIZE, SIZE), (1, 2, 3))
RGB_WITH_TRANSPARENT_COLOUR.info["transparency"] = (1, 2, 3)


@pytest.mark.parametrize("picture", [HALF, Image.new("LA", (SIZE, SIZE), (77, 0)), palette(True), RGB_WITH_TRANSPARENT_COLOUR])
def test_transparent_pixels_are_refused_or_laid_on_the_background(picture):
    with pytest.raises(UserError, match=r"frame 1 has transparent pixels.*fit=True.*--fit"):
        given(picture)
    if picture is not HALF:
        assert (given(picture, fit=True) == BACKGROUND).all()


@pytest.mark.parametrize(("width", "height"), [(SIZE, 4), (9, SIZE), (16, 16)])
def test_another_size_is_refused_or_fitted(width, height):
    picture = Image.new("RGB", (width, height), (1, 2, 3))
    with pytest.raises(UserError, match=f"frame 1 is {width} x {height} pixels, but this model makes 8 x 8.*--fit"):
        given(picture)
    assert given(picture, fit=True).shape == (SIZE, SIZE, 3)


def test_what_is_no_picture_is_refused():
    with pytest.raises(UserError, match="floating-point"):
        given(Image.new("F", (SIZE, SIZE), 0.5))
    transparent = Image.fromarray(np.zeros((SIZE, SIZE), np.uint16))
    transparent.info["transparency"] = 0
    with pytest.raises(UserError, match="16-bit"):
        given(transparent)
    with pytest.raises(UserError, match=r"uint16 \(8, 8, 3\)"):
        given(np.zeros((SIZE, SIZE, 3), np.uint16))
    with pytest.raises(UserError, match="frame 1 is 0 x 0 pixels, which is no picture"):
        given(np.zeros((0, 0, 3), np.uint8), fit=True)


def test_a_clip_needs_something_to_go_by_unless_it_is_asked_for_without():
    for prompt, frames in ((None, None), ("  ", {}), (["a", ""], None), ([None, "a"], [None, {0: HALF}])):
        with pytest.raises(UserError, match="neither a prompt nor a frame"):
            clip_requests(prompt, frames, 0, None, 4)
    assert [request.prompt for request in clip_requests(["a", " "], None, 0, None, 4, unconditional=True)] == ["a", None]
    assert len(clip_requests([None, "a"], [{0: HALF}, None], 0, None, 4)) == 2
    assert [request.seed for request in clip_requests("a", None, 7, None, 4, clips=3)] == [7, 8, 9]


def test_half_of_a_surrogate_pair_is_no_text():
    with pytest.raises(UserError, match=r"'\\ud83d' at character 2"):
        clip_requests(["good", "a \ud83d"], None, 0, None, 4)
    assert clip_requests("a \U0001f600", None, 0, None, 4)[0].prompt == "a \U0001f600"


def test_integers_of_any_library_are_seeds_and_frame_numbers():
    for seeds in (np.int64(3), np.array([3, 4]), torch.tensor(3), (np.uint8(3), 4)):
        found = [request.seed for request in clip_requests(["a", "b"], None, seeds, None, 4)]
        assert found == [3, 4] and all(type(seed) is int for seed in found)
    (request,) = clip_requests(None, {np.int64(2): HALF, 0: HALF}, 0, None, 4)
    assert list(request.pictures) == [0, 2] and all(type(number) is int for number in request.pictures)


@pytest.mark.parametrize("seeds", [0.5, "3", True, [0.5], ["3"], [None], np.array([0.5])])
def test_other_seeds_are_refused(seeds):
    with pytest.raises(UserError, match="seeds holds .*give a whole number, or one for each clip"):
        clip_requests("a", None, seeds, None, 4)


@pytest.mark.parametrize("number", ["0", 0.5, 1.0, True, None])
def test_other_frame_numbers_are_refused(number):
    for frames in ({number: HALF}, [{number: HALF}]):
        with pytest.raises(UserError, match=f"frames: {number!r} is no frame number; give whole numbers, 0 to 3"):
            clip_requests("a", frames, 0, None, 4)


@pytest.mark.parametrize("frames", [[np.zeros((SIZE, SIZE, 3), np.uint8)], np.zeros((1, SIZE, SIZE, 3), np.uint8), [HALF], HALF, 3, [0]])
def test_frames_without_numbers_are_refused(frames):
    with pytest.raises(UserError, match="frames: clip 0 has (ndarray|Image|int); give a mapping from frame numbers to pictures"):
        clip_requests("a", frames, 0, None, 4)


def test_durations():
    assert frame_durations(np.int64(100), 3) == [100] * 3 and type(frame_durations(np.int64(100), 3)[0]) is int
    assert frame_durations(80, 3) == [80, 80, 80] and frame_durations((10, 20, 30), 3) == [10, 20, 30]
    assert frame_durations(np.array([40, 50]), 2) == [40, 50] and frame_durations([10, 65535], 2) == [10, 65535]
    for wrong in ([10, 20], [10, 20, 30, 40], [], [10, 20, 9], 9, [10, 20, 30.0], [True, 20, 20], 0, -5, [10, 20, 65536]):
        with pytest.raises(UserError, match="durations_ms"):
            frame_durations(wrong, 3)
