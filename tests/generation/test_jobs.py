"""Jobs: which make a batch together, and everything wrong with them said at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rdtf_ds.errors import UserError
from rdtf_ds.generation.jobs import Job, batches, check_jobs, durations_of, refuse, settings_of
from rdtf_ds.generation.pictures import open_picture, picture_hash
from tests.generation.fakes import SIDE, QuickPipeline

STAR = Job("star", "a star")
RED = np.full((SIDE, SIDE, 3), (200, 30, 30), np.uint8)


def test_batches_are_jobs_of_equal_settings() -> None:
    jobs = [replace(STAR, name=str(number), seed=number) for number in range(5)]
    assert [[job.name for job in group] for group in batches(jobs, 2)] == [["0", "1"], ["2", "3"], ["4"]]
    assert [len(group) for group in batches(jobs, 9)] == [5]


@pytest.mark.parametrize(
    "change",
    [
        {"frames": 4}, {"steps": 3}, {"sampler": "unipc"}, {"eta": 0.5}, {"text_scale": 1.0}, {"image_scale": 2.0},
        {"prompt": " "}, {"pictures": {0: RED}},
    ],  # fmt: skip
    ids=lambda change: next(iter(change)),
)
def test_another_setting_is_another_batch(change: dict) -> None:
    jobs = [STAR, replace(STAR, name="b", **change), replace(STAR, name="c")]
    assert [[job.name for job in group] for group in batches(jobs, 8)] == [["star", "c"], ["b"]]
    assert [[job.name for job in group] for group in batches(jobs, 1)] == [["star"], ["c"], ["b"]]


@pytest.mark.parametrize("change", [{"seed": 9}, {"prompt": "b"}, {"durations_ms": 30}], ids=lambda change: next(iter(change)))
def test_seed_caption_and_durations_may_differ_within_a_batch(change: dict) -> None:
    assert [len(group) for group in batches([STAR, replace(STAR, name="b", **change)], 8)] == [2]


def test_the_models_defaults_fill_what_is_not_said() -> None:
    model = QuickPipeline()
    assert tuple(settings_of(model, STAR)) == (8, 50, "ddim", 1.0, 7.5, 7.5)
    chosen = replace(STAR, frames=3, steps=5, sampler="dpm++", text_scale=2, image_scale=0)
    assert tuple(settings_of(model, chosen)) == (3, 5, "dpm++", None, 2, 0)
    assert durations_of(model, STAR) == [120] * 8 and durations_of(model, chosen) == [120] * 3
    assert durations_of(model, replace(chosen, durations_ms=[10, 20, 30])) == [10, 20, 30]


def test_good_jobs_pass() -> None:
    check_jobs([STAR, Job("picture", None, {0: RED}, frames=2), replace(STAR, name="星-😀.v2")], QuickPipeline())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"frames": 1}, "2 to 8"),
        ({"frames": 9}, "2 to 8"),
        ({"steps": 0}, "1 to 1000"),
        ({"eta": 1.5}, "eta is 1.5"),
        ({"eta": 0.5, "sampler": "unipc"}, "has none"),
        ({"sampler": "euler"}, "ddim, dpm\\+\\+, unipc"),
        ({"text_scale": float("nan")}, "text_scale"),
        ({"durations_ms": [100, 100]}, "2 numbers"),
        ({"durations_ms": 5}, "10 to 65535 whole"),
        ({"prompt": " "}, "nothing to go by"),
        ({"pictures": {8: RED}}, "numbered 0 to 7"),
        ({"pictures": {number: RED for number in range(8)}}, "none is left"),
        ({"pictures": {0: RED[:, :8]}}, "8 x 16 pixels"),
        ({"pictures": {0: np.zeros((SIDE, SIDE, 4), np.uint8)}}, "transparent"),
        ({"pictures": {0: Path("absent.png")}}, "no such file"),
        ({"seed": 1.5}, "whole number"),
        ({"name": "a/b"}, "no name for a file"),
        ({"name": ".hidden"}, "no name for a file"),
        ({"name": ""}, "no name for a file"),
        ({"name": "a\n"}, "no name for a file"),
        ({"name": "漢" * 67}, "longer than 200 bytes"),
        ({"name": "a\ud800"}, r"the name 'a\\ud800' has '\\ud800' at character 1"),
        ({"prompt": "a star \udc99"}, r"the prompt .* has '\\udc99' at character 7"),
        ({"text_scale": 10**400}, "too large"),
        ({"eta": 10**400}, "too large"),
        ({"durations_ms": 65536}, "10 to 65535 whole"),
    ],
)
def test_each_mistake_is_told(change: dict, told: str) -> None:
    with pytest.raises(UserError, match=told):
        check_jobs([replace(STAR, **change)], QuickPipeline())


def test_fitting_allows_what_does_not_fit() -> None:
    check_jobs([replace(STAR, pictures={0: RED[:, :8], 1: np.zeros((SIDE, SIDE, 4), np.uint8)})], QuickPipeline(), fit=True)


def test_all_mistakes_at_once_and_where_they_stand() -> None:
    third = replace(STAR, name="c", durations_ms=1, pictures={9: RED})
    jobs = [replace(STAR, frames=1), replace(STAR, name="b", steps=0, durations_ms=1), third]
    with pytest.raises(UserError) as caught:
        check_jobs(jobs, QuickPipeline(), told={"c": "prompts.txt, line 3"})
    lines = str(caught.value).splitlines()
    assert lines[0] == "4 things are wrong:" and len(lines) == 5
    assert lines[1].startswith("  clip 'star': num_frames") and lines[2].startswith("  clip 'b': num_inference_steps")
    assert all(line.startswith("  prompts.txt, line 3: ") for line in lines[3:])


def test_names_are_distinct_even_where_case_is_not() -> None:
    with pytest.raises(UserError, match="'STAR' is taken by another clip, 'star'"):
        check_jobs([STAR, replace(STAR, name="STAR")], QuickPipeline())
    with pytest.raises(UserError, match="'star' is taken"):
        check_jobs([STAR, replace(STAR, seed=1)], QuickPipeline())


def test_of_many_mistakes_twenty_are_told() -> None:
    with pytest.raises(UserError) as caught:
        refuse([f"mistake {number}" for number in range(23)])
    assert len(str(caught.value).splitlines()) == 22 and "and 3 more" in str(caught.value)
    refuse([])


def test_a_picture_of_too_many_pixels_is_not_decoded(tmp_path):
    """41 megapixels in a file of a few kilobytes."""
    Image.new("1", (8200, 5000)).save(tmp_path / "large.png")
    with pytest.raises(UserError, match="large.png' has 8200 x 5000 pixels; save it with 40 million at most"):
        open_picture(tmp_path / "large.png")
    Image.new("1", (8000, 5000)).save(tmp_path / "large.png")
    assert open_picture(tmp_path / "large.png").size == (8000, 5000)


def test_pictures_open_upright_and_still(tmp_path: Path) -> None:
    picture = Image.fromarray(np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # held a quarter turn to the left
    picture.save(tmp_path / "turned.png", exif=exif)
    assert open_picture(tmp_path / "turned.png").size == (2, 3)
    Image.new("L", (4, 4)).save(tmp_path / "a.gif", save_all=True, append_images=[Image.new("L", (4, 4), 255)])
    with pytest.raises(UserError, match="animation of 2 frames"):
        open_picture(tmp_path / "a.gif")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(UserError, match="broken.png' cannot be read"):
        open_picture(tmp_path / "broken.png")


def test_a_pictures_hash_is_of_its_pixels() -> None:
    assert picture_hash(np.zeros((1, 1, 3), np.uint8)) == "709e80c88487a2411e1ee4dfb9f22a861492d20c4765150c0c794abd70f8147c"  # sha256sum
    assert picture_hash(RED) != picture_hash(RED.swapaxes(0, 1)[..., ::-1])
