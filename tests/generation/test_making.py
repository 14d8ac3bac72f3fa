"""Making: what is there is left, the same bytes wherever it was interrupted, and nothing is ever half there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rdtf_ds.data.clips.clip import DecodeLimits
from rdtf_ds.data.clips.decoding import decode_clip, probe_clip
from rdtf_ds.data.clips.metadata import read_metadata
from rdtf_ds.errors import UserError
from rdtf_ds.generation.jobs import Job
from rdtf_ds.generation.making import Made, make_clips
from rdtf_ds.generation.pictures import picture_hash
from tests.generation.fakes import SIDE, QuickPipeline

IDENTITY = {"model": "0123456789abcdef"}
RED = np.full((SIDE, SIDE, 3), (200, 30, 30), np.uint8)
JOBS = [Job(f"clip{number}", f"star {number}", seed=number, frames=3) for number in range(7)]


def make(jobs: list[Job], folder: Path, pipeline: QuickPipeline | None = None, **options: Any) -> Made:
    options = {"batch": 3, "suffix": ".png", "identity": IDENTITY, **options}
    return make_clips(pipeline or QuickPipeline(), jobs, folder, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_asked_for_is_what_is_written(tmp_path: Path) -> None:
    pipeline = QuickPipeline()
    job = Job("a", " a star\n😀 ", {2: RED}, 5, 4, 9, "dpm++", None, 2, 3.5, [50, 60, 70, 80])
    made = make([job], tmp_path / "new" / "deep", pipeline, suffix=".gif", keep_given=False, fit=True, scale=2)
    path = tmp_path / "new" / "deep" / "a.gif"
    assert made == Made((path,), ())
    (call,) = pipeline.calls
    assert call.pop("prompts") == [" a star\n😀 "] and np.array_equal(call.pop("frames")[0][2], RED)
    assert call == {
        "num_frames": 4, "num_inference_steps": 9, "sampler": "dpm++", "eta": None, "text_scale": 2, "image_scale": 3.5, "seeds": [5],
        "keep_given_frames": False, "fit": True,
    }  # fmt: skip
    info = probe_clip(path, DecodeLimits())
    assert (info.num_frames, info.width, info.height) == (4, 2 * SIDE, 2 * SIDE) and info.durations_ms == (50, 60, 70, 80)
    assert read_metadata(path) == {
        "prompt": " a star\n😀 ", "seed": 5, "frames": 4, "steps": 9, "sampler": "dpm++", "eta": None, "text_scale": 2.0,
        "image_scale": 3.5, "visible": {"2": picture_hash(RED)}, "keep_given": False, "scale": 2, "durations_ms": [50, 60, 70, 80],
        "model": "0123456789abcdef",
    }  # fmt: skip


def test_defaults_stand_in_the_metadata_as_numbers(tmp_path: Path) -> None:
    make([Job("a", "a star")], tmp_path)
    found = read_metadata(tmp_path / "a.png")
    assert found is not None
    assert (found["steps"], found["sampler"], found["eta"], found["text_scale"], found["frames"]) == (50, "ddim", 1.0, 7.5, 8)
    assert found["durations_ms"] == [120] * 8 and found["visible"] == {} and found["keep_given"] is True


@pytest.mark.parametrize("scale", [1, 3])
def test_enlarging_is_by_whole_pixels(tmp_path: Path, scale: int) -> None:
    make(JOBS[:1], tmp_path, scale=scale)
    make([replace(JOBS[0], name="plain")], tmp_path)
    plain = decode_clip(tmp_path / "plain.png", SIDE, (0, 0, 0), DecodeLimits())
    large = decode_clip(tmp_path / "clip0.png", SIDE * scale, (0, 0, 0), DecodeLimits())
    assert np.array_equal(large, plain.repeat(scale, axis=1).repeat(scale, axis=2))


def test_a_second_run_makes_nothing(tmp_path: Path) -> None:
    assert len(make(JOBS, tmp_path).made) == 7
    before = contents(tmp_path)
    pipeline = QuickPipeline()
    made = make(JOBS, tmp_path, pipeline)
    assert pipeline.calls == [] and made == Made((), tuple(tmp_path / f"clip{number}.png" for number in range(7)))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("absent", [(0,), (2, 3), (6,), (1, 4, 5), range(7)], ids=str)
def test_what_is_missing_is_made_in_the_batch_it_belongs_to(tmp_path: Path, absent: Any) -> None:
    make(JOBS, tmp_path)
    whole = contents(tmp_path)
    for number in absent:
        (tmp_path / f"clip{number}.png").unlink()
    pipeline, told = QuickPipeline(), []
    made = make(JOBS, tmp_path, pipeline, on_clip=lambda job, path, now: told.append((job.name, path.name, now)))
    assert contents(tmp_path) == whole
    assert [path.stem for path in made.made] == [f"clip{number}" for number in absent] and len(made.kept) == 7 - len(absent)
    assert sorted(seed for call in pipeline.calls for seed in call["seeds"]) == sorted(
        seed for group in ((0, 1, 2), (3, 4, 5), (6,)) if set(group) & set(absent) for seed in group
    )
    assert told == [(f"clip{number}", f"clip{number}.png", number in absent) for number in range(7)]


@pytest.mark.parametrize("call", [0, 1, 2])
def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path: Path, call: int) -> None:
    make(JOBS, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        make(JOBS, tmp_path / "cut", QuickPipeline(stop_at=call))
    assert len(list((tmp_path / "cut").glob("*"))) == 3 * call if call else not (tmp_path / "cut").exists()
    make(JOBS, tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


CHANGES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"prompt": "moon"}, {}, 'prompt "star 1", now "moon"'),
    ({"seed": 8}, {}, "seed 1, now 8"),
    ({"steps": 9}, {}, "steps 50, now 9"),
    ({"eta": 0}, {}, "eta 1.0, now 0.0"),
    ({"sampler": "unipc"}, {}, 'eta 1.0, now null; sampler "ddim", now "unipc"'),
    ({"durations_ms": 70}, {}, "durations_ms"),
    ({"pictures": {0: RED}}, {}, "visible {}, now"),
    ({}, {"identity": {"model": "another"}}, "model"),
    ({}, {"scale": 2}, "scale 1, now 2"),
    ({}, {"keep_given": False}, "keep_given true, now false"),
]


@pytest.mark.parametrize(("change", "options", "told"), CHANGES, ids=[told.split()[0] for _, _, told in CHANGES])
def test_clips_of_other_settings_are_refused_and_made_again_when_asked(tmp_path: Path, change: dict, options: dict, told: str) -> None:
    make(JOBS[:3], tmp_path)
    before = contents(tmp_path)
    jobs, pipeline = [JOBS[0], replace(JOBS[1], **change), JOBS[2]], QuickPipeline()
    with pytest.raises(UserError) as caught:
        make(jobs, tmp_path, pipeline, **options)
    assert told in str(caught.value) and "clip1.png' is there already" in str(caught.value) and "--overwrite" in str(caught.value)
    assert contents(tmp_path) == before and pipeline.calls == []
    made = make(jobs, tmp_path, pipeline, overwrite=True, **options)
    assert [path.stem for path in made.made] == (["clip1"] if change else ["clip0", "clip1", "clip2"])
    assert make(jobs, tmp_path, **options).made == ()


def test_files_of_others_are_not_overwritten(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "clip0.png")
    (tmp_path / "clip1.png").write_bytes(b"notes")
    with pytest.raises(UserError) as caught:
        make(JOBS, tmp_path)
    assert "clip0.png' is there already, and says nothing" in str(caught.value) and "clip1.png' is no GIF" in str(caught.value)
    assert sorted(contents(tmp_path)) == ["clip0.png", "clip1.png"]


def test_nothing_is_made_when_one_job_is_wrong(tmp_path: Path) -> None:
    pipeline = QuickPipeline()
    with pytest.raises(UserError, match="clip 'clip6'"):
        make([*JOBS[:6], replace(JOBS[6], frames=1)], tmp_path / "new", pipeline)
    assert pipeline.calls == [] and not (tmp_path / "new").exists()


@pytest.mark.parametrize("suffix", [".gif", ".mp4", ".webm"])
def test_a_clip_cut_short_does_not_count_as_there(tmp_path: Path, suffix: str) -> None:
    make(JOBS[:1], tmp_path, suffix=suffix)
    path = tmp_path / f"clip0{suffix}"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(UserError, match="cut short"):
        make(JOBS[:1], tmp_path, suffix=suffix)
    assert len(make(JOBS[:1], tmp_path, suffix=suffix, overwrite=True).made) == 1 and path.read_bytes() == whole


def test_a_file_in_the_folders_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(UserError, match="x' is a file"):
        make(JOBS, tmp_path / "x" / "y")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_in_a_clips_place_is_told_before_any_is_made(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "clip1.png").mkdir()
    pipeline = QuickPipeline()
    with pytest.raises(UserError, match="clip1.png' is a folder, so no clip can be written there; give another name"):
        make(JOBS, tmp_path, pipeline, overwrite=overwrite)
    assert not pipeline.calls


def test_leftovers_of_killed_runs_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    living = f".clip1.png.{1}.tmp"  # process 1 is always there
    for name in (".clip0.png.4194999.tmp", f".clip1.png.4194999.{32 * 'a'}.tmp", ".other.png.4194999.tmp", living):
        (tmp_path / name).write_bytes(b"half")
    make(JOBS[:2], tmp_path)
    assert sorted(contents(tmp_path)) == [living, ".other.png.4194999.tmp", "clip0.png", "clip1.png"]


def test_pictures_from_files_are_those_in_memory(tmp_path: Path) -> None:
    Image.fromarray(RED).save(tmp_path / "red.webp", lossless=True)
    make([replace(JOBS[0], pictures={1: tmp_path / "red.webp"})], tmp_path / "out")
    assert make([replace(JOBS[0], pictures={1: RED})], tmp_path / "out").made == ()
    assert make([replace(JOBS[0], pictures={1: Image.fromarray(RED)})], tmp_path / "out").made == ()


@pytest.mark.parametrize(("batch", "words"), [(3, r"3 clips at once. Take fewer at once \(--batch\)"), (1, "1 clip at once. Take float16")])
def test_a_gpu_that_is_too_small_is_told_and_clips_made_before_stay(tmp_path: Path, batch: int, words: str) -> None:
    class Small(QuickPipeline):
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            if len(self.calls) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return super().__call__(*arguments, **options)

    with pytest.raises(UserError, match=f"the GPU's memory does not do for {words}.*Clips made before are there"):
        make(JOBS, tmp_path, Small(), batch=batch)
    assert len(list(tmp_path.glob("*.png"))) == batch
