from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from rdtf_ds.errors import UserError
from rdtf_ds.training import validation
from rdtf_ds.training.validation import Request, Validation, _visible_frames, make_requests, sample_clips, write_gifs

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


def test_visible_frames_are_those_of_the_clip():
    for request in requests():
        clip_id = int(request.prompt.split()[1])
        k = min(8, LENGTHS[clip_id])
        assert request.num_frames == k and len(request.visible) < k
        for number, frame in request.visible.items():
            offset = int(frame[0, 0, 0]) - 10 * clip_id
            assert 0 <= offset < LENGTHS[clip_id] and (offset == 0) == (number == 0)


def test_each_kind_shows_its_frames():
    assert [_visible_frames("text", 8), _visible_frames("image", 8)] == [[], [0]]
    assert [_visible_frames("prediction", 8), _visible_frames("prediction", 3)] == [[0, 1, 2, 3], [0, 1]]
    assert [_visible_frames("interpolation", 8), _visible_frames("interpolation", 3)] == [[0, 2, 4, 6], [0, 2]]


class Pipeline:
    """Makes clips whose value is their seed, but none of the ``broken`` prompts, and notes what it was asked."""

    def __init__(self, broken=()):
        self.asked, self.broken = [], broken

    def set_progress_bar_config(self, **options):
        pass

    def __call__(self, prompt, *, frames, num_frames, num_inference_steps, seeds):
        self.asked.append((prompt, num_inference_steps))
        if prompt in self.broken:
            raise UserError(f"{prompt} made NaN")
        clip = np.full((1, num_frames, 4, 4, 3), seeds[0] % 256, np.uint8)
        return type("Output", (), {"frames": clip})


def test_clips_come_back_in_order_with_their_requests(process_group, tmp_path):
    pipeline, made = Pipeline(), requests()
    clips, failures = sample_clips(pipeline, made, 0, 1, 7)
    assert failures == []
    assert [request.name for request, _ in clips] == [request.name for request in made]
    assert all((frames == request.seed % 256).all() and len(frames) == request.num_frames for request, frames in clips)
    assert pipeline.asked == [(request.prompt, 7) for request in made]
    paths = write_gifs(clips, tmp_path / "step")
    assert [path.name for path in paths] == [f"{request.name}.gif" for request in made] and all(path.stat().st_size for path in paths)
    assert "02_prediction: clip" in (tmp_path / "step" / "prompts.txt").read_text()


def test_each_rank_makes_its_share(process_group):
    made = [Request(str(number), f"p{number}", {}, 3, number) for number in range(5)]
    shares = []
    for rank in range(2):
        pipeline = Pipeline()
        sample_clips(pipeline, made, rank, 2, 1)
        shares.append([prompt for prompt, _ in pipeline.asked])
    assert shares == [["p0", "p2", "p4"], ["p1", "p3"]]


class Log:
    """Keeps what is said and shown."""

    def __init__(self):
        self.said, self.shown = [], []

    def say(self, text):
        self.said.append(text)

    def gif(self, tag, path, step, shape):
        self.shown.append((tag, path.name, step, shape))


@pytest.fixture
def validate(monkeypatch, tmp_path):
    """Validation of five clips on two ranks, one after the other, in this process: rank 0's log, and the collectives of both."""

    def run(*broken):
        made = [Request(str(number), f"p{number}", {}, 3, number) for number in range(5)]
        log, collectives, gathered = Log(), {0: [], 1: []}, []
        for rank in (1, 0):
            mine = collectives[rank]

            def gather(value, mine=mine):
                mine.append("gather")
                gathered.insert(0, value)
                return gathered

            @contextmanager
            def applied_to(engine, mine=mine):
                mine.append("show")
                yield
                mine.append("show")

            monkeypatch.setattr(validation, "gather_objects", gather)
            engine, ema = SimpleNamespace(rank=rank, world_size=2), SimpleNamespace(applied_to=applied_to)
            Validation(Pipeline(broken), made, 1)(engine, ema, tmp_path, log if rank == 0 else Log(), 40, lambda: False)
        return log, collectives

    return run


def test_a_clip_that_fails_on_one_rank_is_a_warning_and_all_ranks_meet(validate, tmp_path):
    log, collectives = validate("p1", "p2")
    assert collectives[0] == collectives[1] == ["show", "gather", "show"]
    assert [tag for tag, *_ in log.shown] == ["samples/0", "samples/3", "samples/4"] and log.shown[1][1:] == ("3.gif", 40, (4, 4))
    assert log.said == [f"Warning: after step 40 no validation clip {n}: p{n} made NaN" for n in (1, 2)]
    assert (tmp_path / "samples" / "step00000040" / "prompts.txt").read_text() == "0: p0\n3: p3\n4: p4\n"


def test_nothing_is_written_when_no_clip_was_made(validate, tmp_path):
    log, _ = validate(*(f"p{number}" for number in range(5)))
    assert len(log.said) == 5 and not log.shown and not any(tmp_path.iterdir())


def test_a_full_disk_is_a_warning(validate, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(validation, "write_clip", full)
    log, collectives = validate()
    assert collectives[0] == collectives[1] and not log.shown
    assert len(log.said) == 1 and log.said[0].startswith("Warning") and "No space left" in log.said[0] and "step00000040" in log.said[0]
