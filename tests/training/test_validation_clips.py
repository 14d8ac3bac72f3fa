from __future__ import annotations

import numpy as np
import pytest

from rdtf_ds.errors import UserError
from rdtf_ds.training import validation_clips
from rdtf_ds.training.validation_clips import MadeClip, Request, make_clip, make_requests, show_clips, visible_frames, write_gifs

LENGTHS = {0: 20, 1: 5, 2: 3, 3: 8, 4: 30, 5: 12}


def decode(clip_id):
    """Frame f of clip c has the value 10c + f everywhere; clip 4 is broken."""
    if clip_id == 4:
        return None
    values = 10 * clip_id + np.arange(LENGTHS[clip_id])
    return np.broadcast_to(values[:, None, None, None], (LENGTHS[clip_id], 4, 4, 3)).astype(np.uint8)


def requests(seed=0, count=5):
    return make_requests(seed, count, list(LENGTHS), lambda clip: f"clip {clip}", decode, 8)


def test_requests_are_fixed_go_through_the_kinds_and_skip_broken_clips():
    made = requests()
    assert [request.name for request in made] == ["00_text", "01_image", "02_prediction", "03_interpolation", "04_text"]
    assert sorted(int(request.prompt.split()[1]) for request in made) == [0, 1, 2, 3, 5]
    assert len({request.seed for request in made}) == 5
    again = requests()
    assert [(r.name, r.prompt, r.seed) for r in again] == [(r.name, r.prompt, r.seed) for r in made]
    assert [r.prompt for r in requests(seed=1)] != [r.prompt for r in made]
    assert [r.name for r in requests(count=3)] == ["00_text", "01_image", "02_prediction"]


def test_visible_frames_are_those_of_the_clip():
    for request in requests():
        clip_id = int(request.prompt.split()[1])
        k = min(8, LENGTHS[clip_id])
        assert request.num_frames == k and len(request.visible) < k
        for number, frame in request.visible.items():
            offset = int(frame[0, 0, 0]) - 10 * clip_id
            assert 0 <= offset < LENGTHS[clip_id] and (offset == 0) == (number == 0)


def test_each_kind_shows_its_frames():
    assert [visible_frames("text", 8), visible_frames("image", 8)] == [[], [0]]
    assert [visible_frames("prediction", 8), visible_frames("prediction", 3)] == [[0, 1, 2, 3], [0, 1]]
    assert [visible_frames("interpolation", 8), visible_frames("interpolation", 3)] == [[0, 2, 4, 6], [0, 2]]


class Pipeline:
    """Refuses what the real one does; a clip's value is its seed."""

    def __init__(self):
        self.asked = []

    def __call__(self, prompt, *, frames, num_frames, num_inference_steps, seeds, unconditional=False):
        if not prompt.strip() and not frames and not unconditional:
            raise UserError("an empty prompt with no frame")
        self.asked.append((prompt, num_inference_steps, unconditional))
        clip = np.full((1, num_frames, 4, 4, 3), seeds[0] % 256, np.uint8)
        return type("Output", (), {"frames": clip, "durations_ms": [[70] * num_frames]})


def test_a_clip_without_a_caption_is_asked_for_all_the_same():
    pipeline, frame = Pipeline(), np.zeros((4, 4, 3), np.uint8)
    for prompt, visible in (("a star", {}), (" ", {}), ("", {0: frame})):
        made = make_clip(pipeline, Request("x", prompt, visible, 3, 77), 9)
        assert (made.frames == 77).all() and made.frames.shape == (3, 4, 4, 3) and made.durations_ms == [70] * 3
    assert pipeline.asked == [("a star", 9, False), (" ", 9, True), ("", 9, False)]


def made_clips():
    return [(request, MadeClip(np.full((request.num_frames, 4, 6, 3), 9, np.uint8), [50] * request.num_frames)) for request in requests()]


class Log:
    """Keeps what is said and shown."""

    def __init__(self):
        self.said, self.shown = [], []

    def say(self, text):
        self.said.append(text)

    def gif(self, tag, path, step, shape):
        self.shown.append((tag, path.name, step, shape))


def test_gifs_and_their_prompts_are_written_and_shown(tmp_path):
    log = Log()
    show_clips(made_clips(), tmp_path / "step", log, 40)
    assert len(log.shown) == 5 and log.shown[2] == ("samples/02_prediction", "02_prediction.gif", 40, (4, 6)) and not log.said
    assert all((tmp_path / "step" / name).stat().st_size for _, name, _, _ in log.shown)
    assert [line.partition(":")[0] for line in (tmp_path / "step" / "prompts.txt").read_text().splitlines()] == [
        request.name for request in requests()
    ]


def test_a_gif_keeps_its_time(tmp_path):
    from PIL import Image

    with Image.open(write_gifs(made_clips()[:1], tmp_path)[0]) as picture:
        assert picture.info["duration"] == 50


def test_a_full_disk_is_a_warning(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(validation_clips, "write_clip", full)
    log = Log()
    show_clips(made_clips(), tmp_path / "step00000040", log, 40)
    assert not log.shown and len(log.said) == 1
    assert log.said[0].startswith("Warning") and "No space left" in log.said[0] and "step00000040" in log.said[0]


@pytest.mark.parametrize("k", range(3, 9))
def test_no_kind_shows_all(k):
    assert all(len(visible_frames(kind, k)) < k for kind in validation_clips.KINDS)
