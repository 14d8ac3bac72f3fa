"""Stand-ins for what validation calls, which take time of a clock of their own, and the meeting of two ranks that are threads."""

from __future__ import annotations

import copy
import json
import threading
from types import SimpleNamespace

import numpy as np

from rdtf_ds.diffusion.masks import Task
from rdtf_ds.training.held_out import SampleLoss
from rdtf_ds.training.validation_fvd import ClipFeatures
from rdtf_ds.training.validation_units import go_on


class Clock:
    """Time passes when a rank works; each rank lives in its own."""

    def __init__(self):
        self.local = threading.local()

    def perf_counter(self):
        return getattr(self.local, "now", 0.0)

    def work(self, seconds):
        self.local.now = self.perf_counter() + seconds


class Meeting:
    """Collectives of two threads; a call that the other rank does not make ends in an error, not in a hang."""

    def __init__(self, clock):
        self.barrier, self.values, self.clock = threading.Barrier(2, timeout=20), [None, None], clock
        self.calls = [[], []]

    def gather(self, rank, value, name="gather"):
        self.calls[rank].append(name)
        self.values[rank] = (value, self.clock.perf_counter())
        self.barrier.wait()
        values, latest = copy.deepcopy([value for value, _ in self.values]), max(now for _, now in self.values)
        self.barrier.wait()
        self.clock.local.now = latest  # whoever came first waited
        return values


class Log:
    """What `RunLog` has for validation, on rank 0."""

    def __init__(self, trained_s):
        self.trained_s, self.validations, self.said, self.shown, self.values = trained_s, [], [], [], []

    @property
    def validated_s(self):
        return sum(line["seconds"] for line in self.validations)

    def validation(self, line, values):
        self.validations.append(json.loads(json.dumps(line)))
        self.values.append(dict(values))

    def say(self, text):
        self.said.append(text)

    def gif(self, tag, path, step, shape):
        self.shown.append(tag)


class Pipeline:
    """Takes 2 s a clip; ``broken`` prompts fail with what they map to, after half a second."""

    def __init__(self, clock, broken):
        self.clock, self.broken, self.asked = clock, broken, []

    def __call__(self, prompt, *, frames, num_frames, num_inference_steps, seeds):
        self.asked.append(prompt)
        self.clock.work(0.5 if prompt in self.broken else 2.0)
        if prompt in self.broken:
            raise self.broken[prompt]
        return SimpleNamespace(frames=np.full((1, num_frames, 4, 4, 3), 7, np.uint8), durations_ms=[[50] * num_frames])


class Losses:
    """4 s for both samples of a rank, and 10 s for encoding, once."""

    def __init__(self, clock, rank, fails=None):
        self.clock, self.rank, self.fails, self.clips, self.prepared = clock, rank, fails, [None] * 4, False

    def prepare(self, hurry):
        if not self.prepared:
            self.clock.work(10.0)
        self.prepared = True
        return 2

    def measure(self, network, hurry):
        assert network == "mean", "the live weights are the mean ones"
        self.clock.work(4.0)
        go_on(hurry)
        if self.fails:
            raise self.fails
        return [SampleLoss(clip, Task.PREDICTION, 500, 1.0 + clip) for clip in (self.rank, self.rank + 2)]


class FVD:
    """30 s, and 5 s for real features the first time; one of its clips takes 3 s."""

    def __init__(self, clock, rank, fails=None):
        self.clock, self.rank, self.fails, self.count, self.variant, self.real_s = clock, rank, fails, 8, "I3D of a test", 0.0
        self.real = False

    def seconds(self, clip_s):
        return 20 * clip_s

    @property
    def preparing_s(self):
        return 0.0 if self.real else 5.0

    def make_one(self, pipeline, hurry):
        go_on(hurry)
        self.clock.work(3.0)
        if self.fails:
            raise self.fails

    def measure(self, pipeline, hurry):
        self.real_s = 0.0 if self.real else 5.0
        self.clock.work(30.0 + self.real_s)
        self.real = True
        if self.fails:
            raise self.fails
        rng = np.random.default_rng(self.rank)
        return [ClipFeatures(number, rng.normal(size=3), rng.normal(size=3)) for number in range(self.rank, 8, 2)]
