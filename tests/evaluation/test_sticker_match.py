"""The judge on true clips, noisy clips, still clips and clips made to fool it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from rdtf_ds.data.clips.frame_features import as_float, thumbnail
from rdtf_ds.data.clips.writing import write_clip
from rdtf_ds.data.clustering import choose_frames
from rdtf_ds.data.synthetic import COLOURS, MOTIONS, Sticker, all_stickers, draw_frame_count, on_white, render
from rdtf_ds.evaluation.sticker_match import Report, detect_motion, dominant_colour, frame_change, judge
from rdtf_ds.seeding import numpy_generator

STICKERS = all_stickers(held_out=False) + all_stickers(held_out=True)


def true_clip(number: int, frames: int = 8, size: int = 64) -> np.ndarray:
    rng = numpy_generator("judge", number)
    clip = on_white(render(STICKERS[number], max(frames, draw_frame_count(rng)), size, rng))
    features = as_float(np.stack([thumbnail(Image.fromarray(frame)) for frame in clip]))
    return clip[choose_frames(features, frames, rng)]


@pytest.fixture(scope="module")
def clips() -> list[tuple[Sticker, np.ndarray]]:
    return [(sticker, true_clip(number)) for number, sticker in enumerate(STICKERS)]


def with_noise(frames: np.ndarray, seed: int, sigma: float = 25.0) -> np.ndarray:
    noise = numpy_generator("noise", seed).normal(0, sigma, frames.shape)
    return np.clip(np.rint(frames + noise), 0, 255).astype(np.uint8)


def test_true_clips_of_eight_clustered_frames(clips):
    report = judge(clips)
    assert report.clips == 216 and report.colour_match >= 0.99 and report.motion_match >= 0.97
    assert report.held_out_clips == 54 and report.held_out_colour_match >= 0.99
    # Each attribute value on a sixth of the prompts: held against another's prompt, (36 - 1) of 215 agree
    assert report.colour_match_shuffled == pytest.approx(35 / 215, abs=0.005)
    assert report.motion_match_shuffled == pytest.approx(35 / 215, abs=0.005)


def test_true_clips_under_noise(clips):
    report = judge([(sticker, with_noise(frames, number)) for number, (sticker, frames) in enumerate(clips)])
    assert report.colour_match >= 0.9 and report.motion_match >= 0.9


def test_twice_the_noise_hides_neither_colour_nor_motion(clips):
    noisy = [(sticker, with_noise(frames, number, sigma=50)) for number, (sticker, frames) in enumerate(clips[::7])]
    assert np.mean([detect_motion(frames) == sticker.motion for sticker, frames in noisy]) >= 0.97
    found = [dominant_colour(frames) for _, frames in noisy]
    assert [name for name, _ in found] == [sticker.colour for sticker, _ in noisy]
    assert np.mean([share for _, share in found]) > 0.9  # noise in the white is no foreground


def test_three_frames_are_enough(clips):
    report = judge([(sticker, frames[[0, 3, 7]]) for sticker, frames in clips])
    assert report.colour_match >= 0.99 and report.motion_match >= 0.97


def test_judged_from_gif_files_as_written(tmp_path, clips):
    read = []
    for number, (sticker, frames) in enumerate(clips[::9]):
        path = tmp_path / f"{number}.gif"
        write_clip(frames, path, 100)
        with Image.open(path) as gif:
            decoded = []
            for place in range(gif.n_frames):
                gif.seek(place)
                decoded.append(np.asarray(gif.convert("RGB")))
        read.append((sticker, np.stack(decoded)))
    report = judge(read)
    assert report.colour_match >= 0.99 and report.motion_match >= 0.97


def test_still_clips_get_no_motion_with_noise_or_without(clips):
    for number, (_, frames) in enumerate(clips[::3]):
        still = np.repeat(frames[4:5], 8, axis=0)
        assert detect_motion(still) is None and detect_motion(with_noise(still, number)) is None
        assert frame_change(still) == 0


def test_trembling_and_turning_back_are_no_slide(clips):
    for sticker, frames in clips[::5]:
        there_and_back = np.concatenate([frames[::2], frames[::-2][:4]])
        if sticker.motion in MOTIONS[:4]:
            assert detect_motion(there_and_back[[0, 1, 2, 3, 3, 2, 1, 0]]) is None
    small = np.stack([np.roll(clips[0][1][0], shift, axis=1) for shift in (0, 1, -1, 0, 1, 2, 1, 0)])
    assert detect_motion(small) is None


def test_reversed_clips_show_the_opposite_motion(clips):
    opposite = {"slides left": "slides right", "rises": "falls", "grows": "shrinks"}
    opposite |= {value: key for key, value in opposite.items()}
    for sticker, frames in clips[::4]:
        assert detect_motion(frames[::-1]) == opposite[sticker.motion]


def test_motion_is_a_share_of_the_picture_not_pixels():
    for size in (32, 128):
        found = [detect_motion(true_clip(number, size=size)) == STICKERS[number].motion for number in range(0, 216, 9)]
        assert np.mean(found) >= 0.97


def test_washed_out_colours_keep_their_name_and_greys_have_none():
    for name, colour in COLOURS.items():
        patch = np.full((4, 32, 32, 3), 255, np.uint8)
        patch[:, 8:24, 8:24] = colour
        assert dominant_colour(patch) == (name, 1.0)
        patch[:, 8:24, 8:24] = np.array(colour) * 0.6 + 0.4 * 255
        assert dominant_colour(patch)[0] == name
    for grey in (0, 90, 170):
        patch[:, 8:24, 8:24] = grey
        assert dominant_colour(patch) == (None, 0.0)
    assert dominant_colour(np.full((2, 16, 16, 3), 255, np.uint8)) == (None, 0.0)


def test_share_counts_foreground_pixels_only():
    patch = np.full((1, 40, 40, 3), 255, np.uint8)
    patch[:, :, :20] = COLOURS["blue"]
    patch[:, :, 20:30] = COLOURS["red"]
    name, share = dominant_colour(patch)
    assert name == "blue" and share == pytest.approx(2 / 3, abs=0.04)


def test_nothing_to_see_is_no_motion():
    white = np.full((8, 16, 16, 3), 255, np.uint8)
    assert detect_motion(white) is None and detect_motion(white[:1]) is None
    once = white.copy()
    once[3, 4:12, 4:12] = 0
    assert detect_motion(once) is None


def test_frame_change_by_hand():
    frames = np.zeros((3, 2, 2, 3), np.uint8)
    frames[1] = 10
    frames[2, 0] = 250
    assert frame_change(frames) == pytest.approx((10 + (240 + 10) / 2) / 2)
    assert frame_change(frames[:1]) == 0


def test_wrong_clips_lower_the_score_and_shuffling_is_the_mean_over_other_prompts(clips):
    asked = [Sticker("red", "circle", "grows"), Sticker("red", "circle", "grows"), Sticker("blue", "circle", "falls")]
    red, blue = (next(frames for sticker, frames in clips if sticker.colour == colour) for colour in ("red", "blue"))
    report = judge([(asked[0], red), (asked[1], blue), (asked[2], blue)])
    assert report.colour_match == pytest.approx(2 / 3)
    # found red, blue, blue; pairs (prompt i, clip j), i != j: (0,1) no (0,2) no (1,0) yes (1,2) no (2,0) no (2,1) yes
    assert report.colour_match_shuffled == pytest.approx(2 / 6)


def test_ratio_and_lines():
    report = Report(48, 0.8333, 0.17, 0.5, 0.16, 3.0, 24, 0.75, 4.0)
    assert report.change_ratio == 0.75
    assert report.lines() == [
        "colour match: 83 %",
        "colour match with prompts shuffled: 17 %",
        "colour match on held-out pairs: 75 % (24 of 48 clips)",
        "motion match: 50 %",
        "motion match with prompts shuffled: 16 %",
        "change between frames: 3.00 of 255 levels",
        "change between frames against training clips: 75 %",
    ]
    assert Report(48, 0.8, 0.2, 0.5, 0.2, 3.0, 0, None, None).change_ratio is None


def test_training_clips_give_the_ratio(clips):
    training = [frames for _, frames in clips[:6]]
    generated = [frames[[0, 2, 4, 6]] for frames in training]
    report = judge([(sticker, frames) for (sticker, _), frames in zip(clips, generated, strict=False)], training=training)
    ratio = np.mean([frame_change(frames) for frames in generated]) / np.mean([frame_change(frames) for frames in training])
    assert report.change_ratio == pytest.approx(ratio)
    with pytest.raises(ValueError, match="at least 2"):
        judge(clips[:1])
