"""What each task of the page takes: every choice of filled slots against the rule in words."""

from __future__ import annotations

from itertools import combinations

import pytest

from rdtf_ds.diffusion.masks import Task, mask_family
from rdtf_ds.errors import UserError
from rdtf_ds.web.slots import Preset, asked_for, hint, require, slot_name

FRAMES = 8
CHOICES = [chosen for count in range(FRAMES + 1) for chosen in combinations(range(FRAMES), count)]


def taken(preset, frames, num_frames=FRAMES, prompt="a cat waves"):
    try:
        require(preset, frames, num_frames, prompt)
    except UserError as error:
        assert f"{preset}" in str(error)
        return False
    return True


def masked(task, k=FRAMES):
    return [tuple(number for number, visible in enumerate(mask) if visible) for mask in mask_family(task, k)]


def test_text_takes_no_picture():
    assert [frames for frames in CHOICES if taken(Preset.TEXT, frames)] == [()]
    assert not taken(Preset.TEXT, (), prompt=" \n")


def test_text_and_picture_takes_any_one():
    assert [frames for frames in CHOICES if taken(Preset.PICTURE, frames)] == [(number,) for number in range(FRAMES)]
    assert taken(Preset.PICTURE, (0,), prompt="")


def test_prediction_takes_what_training_shows():
    allowed = [frames for frames in CHOICES if taken(Preset.PREDICTION, frames) and len(frames) < FRAMES]
    assert set(allowed) == set(masked(Task.PREDICTION))
    assert taken(Preset.PREDICTION, {1, 0}, prompt="") and not taken(Preset.PREDICTION, (0, 2))


def test_interpolation_takes_gaps():
    allowed = {frames for frames in CHOICES if taken(Preset.INTERPOLATION, frames)}
    assert set(masked(Task.INTERPOLATION)) < allowed
    assert allowed == {
        frames
        for frames in CHOICES
        if len(frames) >= 2 and any(after - before > 1 for before, after in zip(frames, frames[1:], strict=False))
    }


def test_any_frames_needs_something_to_go_by():
    assert taken(Preset.ANY, (2, 5), prompt="") and taken(Preset.ANY, ()) and not taken(Preset.ANY, (), prompt="")


@pytest.mark.parametrize("preset", Preset)
def test_what_is_marked_is_taken(preset):
    for num_frames in range(3, FRAMES + 1):
        frames = asked_for(preset, num_frames)
        assert taken(preset, frames, num_frames)
        marked = [number for number in range(FRAMES) if "▸" in slot_name(number, preset, num_frames)]
        assert marked == list(frames)
        assert [slot_name(number, preset, num_frames).strip("▸ –") for number in range(FRAMES)] == [str(n) for n in range(FRAMES)]
    assert slot_name(4, preset, 4) == "4 –" and slot_name(3, preset, 4).endswith("3")


@pytest.mark.parametrize("preset", Preset)
def test_a_picture_past_the_end_is_named(preset):
    with pytest.raises(UserError, match="Frame 5 has a picture, but the clip has 5 frames, 0 to 4"):
        require(preset, (0, 5), 5, "a cat")
    assert len({hint(each, 5) for each in Preset}) == len(Preset) and "0 and 4" in hint(Preset.INTERPOLATION, 5)
