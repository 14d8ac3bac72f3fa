"""The studio with a pipeline of known answers: GIFs with their settings inside, notes on fitted pictures, one clip at a time."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from PIL import Image

from rdtf_ds import __version__
from rdtf_ds.data.clips.metadata import read_metadata
from rdtf_ds.errors import UserError
from rdtf_ds.generation.jobs import Job
from rdtf_ds.web.studio import UPLOADED, Studio, open_studio, open_upload
from tests.small_models import SIDE, make_pipeline, small_dfgn, text_parts

RED = (220, 30, 30)


@pytest.fixture(scope="module")
def pipeline():
    return make_pipeline(text_parts(), small_dfgn())


@pytest.fixture
def studio(pipeline, tmp_path) -> Studio:
    return Studio(pipeline, tmp_path, {"model": "0123456789abcdef"})


def job(**changes) -> Job:
    return Job(**{"name": "sticker", "prompt": "a red star", "seed": 3, "frames": 4, "steps": 3} | changes)


def test_a_clip_is_a_gif_that_says_how_it_was_made(studio):
    steps = []
    made = studio.make(job(durations_ms=90), lambda done, of: steps.append((done, of)))
    with Image.open(made.path) as image:
        assert image.format == "GIF" and image.n_frames == 4 and image.size == (SIDE, SIDE) and image.info["duration"] == 90
    said = read_metadata(made.path)
    assert said is not None
    assert said["prompt"] == "a red star" and said["seed"] == 3 and said["model"] == "0123456789abcdef" and said["steps"] == 3
    assert steps == [(1, 3), (2, 3), (3, 3)] and made.notes == () and made.seconds > 0


def test_the_same_job_is_the_same_clip_in_a_file_of_its_own(studio):
    first, second, other = studio.make(job()), studio.make(job()), studio.make(job(seed=4))
    assert first.path != second.path and first.path.read_bytes() == second.path.read_bytes() != other.path.read_bytes()


def test_pictures_are_fitted_and_the_notes_say_so(studio):
    fits, wide, clear = Image.new("RGB", (SIDE, SIDE), RED), Image.new("RGB", (40, 20), RED), Image.new("RGBA", (SIDE, SIDE), (*RED, 0))
    assert studio.make(job(pictures={0: fits})).notes == ()
    made = studio.make(job(pictures={0: fits, 1: wide, 2: clear}))
    assert made.notes == (
        f"Frame 1 was fitted into {SIDE} × {SIDE} on the background: it was 40 × 20 pixels.",
        f"Frame 2 was fitted into {SIDE} × {SIDE} on the background: it has transparent pixels.",
    )
    with Image.open(made.path) as image:
        image.seek(1)
        fitted = np.asarray(image.convert("RGB"))
    assert (fitted[: SIDE // 4] == 255).all() and (fitted[SIDE // 4 + 1 : -SIDE // 4 - 1] == RED).all()
    assert studio.make(job(pictures={0: Image.new("RGBA", (SIDE, SIDE), (*RED, 255))})).notes == (), "opaque as it is"


def test_an_error_leaves_the_studio_open(studio, monkeypatch):
    with pytest.raises(UserError, match="all 4 frames are given"):
        studio.make(job(pictures={number: Image.new("RGB", (SIDE, SIDE)) for number in range(4)}))

    def fail(*arguments, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(studio.pipeline.unet, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        studio.make(job())
    monkeypatch.undo()
    assert studio.make(job()).path.is_file()


def test_clips_are_made_one_at_a_time(tmp_path, pipeline, monkeypatch):
    inside, most = 0, 0
    original = type(pipeline).__call__
    meeting = threading.Barrier(3)

    def counted(self, *arguments, **options):
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        try:
            return original(self, *arguments, **options)
        finally:
            inside -= 1

    monkeypatch.setattr(type(pipeline), "__call__", counted)
    studio = Studio(pipeline, tmp_path, {})
    made = []

    def visit(seed):
        meeting.wait(60)
        made.append(studio.make(job(seed=seed, steps=6)).path)

    threads = [threading.Thread(target=visit, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert most == 1 and len(set(made)) == 3


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"no picture", "cannot identify"), (b"", "cannot"), (None, "truncated")],
)
def test_an_unreadable_upload_is_named_without_the_servers_folder(tmp_path, data, said):
    path = tmp_path / "upload.png"
    if data is None:
        Image.effect_noise((64, 64), 90).save(path)
        data = path.read_bytes()[:900]
    path.write_bytes(data)
    with pytest.raises(UserError, match="Frame 5: the picture 'upload.png' cannot be read") as raised:
        open_upload({"path": str(path), "meta": UPLOADED}, 5, tmp_path)
    assert said in str(raised.value) and str(tmp_path) not in str(raised.value)


def test_an_upload_stands_upright(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # the camera was held sideways
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert open_upload({"path": f"{tmp_path}/a.jpg", "meta": UPLOADED}, 0, tmp_path).size == (20, 30)


def test_only_what_has_an_uploads_mark_is_opened(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    path = f"{tmp_path}/a.png"
    for upload in (path, {"path": path}, {"path": path, "meta": {}}, {"path": [path], "meta": UPLOADED}, {"meta": UPLOADED}, [path], 3):
        with pytest.raises(UserError, match="Frame 2: its picture was not uploaded here"):
            open_upload(upload, 2, tmp_path)
    with pytest.raises(UserError, match="not uploaded here"):
        open_upload({"path": path, "meta": UPLOADED}, 2, tmp_path / "uploads")


def test_a_link_in_a_circle_is_no_upload(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "a.png")
    for path in (tmp_path / "a.png", tmp_path / ("a" * 5000), tmp_path / "a\0"):
        with pytest.raises(UserError, match="Frame 2: its picture was not uploaded here"):
            open_upload({"path": str(path), "meta": UPLOADED}, 2, tmp_path)


def test_a_model_is_opened_with_its_hash(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "model")
    studio = open_studio(tmp_path / "model", tmp_path, "cpu")
    assert len(studio.identity["model"]) == 16 and f"{studio.pipeline.unet.dtype}" == "torch.float32"
    said = read_metadata(studio.make(job()).path)
    assert studio.identity.items() <= said.items() and (said["dtype"], said["rdtf_ds"]) == ("float32", __version__)


def test_what_is_not_there_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no model_index\.json"):
        open_studio(tmp_path, tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: torch sees no GPU here"):
        open_studio(tmp_path, tmp_path, "cuda")
