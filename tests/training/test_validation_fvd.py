from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rdtf_ds.errors import UserError
from rdtf_ds.evaluation.frechet import Normal, frechet_distance
from rdtf_ds.evaluation.i3d_weights import WeightsNotFound
from rdtf_ds.experiment import load_experiment
from rdtf_ds.training import validation_assembly, validation_fvd
from rdtf_ds.training.dry_run import describe
from rdtf_ds.training.validation_fvd import ClipFeatures, RealClip, TrainingFVD, fvd_of, fvd_weights
from rdtf_ds.training.validation_units import Interrupted


class Features:
    """A clip's mean colour, in the place of I3D's logits."""

    def __init__(self, weights, batch):
        assert batch == 1
        self.weights, self.seen = weights, []

    def variant(self, num_frames):
        return f"means of {num_frames} frames"

    def __call__(self, clips):
        clips = list(clips)
        self.seen += clips
        return np.stack([clip.reshape(-1, 3).mean(axis=0) for clip in clips]).astype(np.float64)


class Pipeline:
    """Every frame is the first one, turned a shade by the seed."""

    def __init__(self):
        self.asked = []

    def __call__(self, prompt, *, frames, num_frames, num_inference_steps, seeds):
        self.asked.append((prompt, list(frames), num_frames, num_inference_steps, seeds[0]))
        clip = np.repeat(frames[0][None], num_frames, axis=0) // 2 + seeds[0] % 100
        return SimpleNamespace(frames=clip[None].astype(np.uint8), durations_ms=[[50] * num_frames])


def read(number):
    rng = np.random.default_rng(number)
    return RealClip(f"clip {number}", rng.integers(0, 200, (5, 4, 4, 3), np.uint8))


@pytest.fixture
def make(monkeypatch):
    monkeypatch.setattr(validation_fvd, "VideoFeatures", Features)

    def build(rank=0, world_size=1, count=7, seed=3, read=read):
        return TrainingFVD(None, count, read, num_frames=5, side=4, steps=9, seed=seed, rank=rank, world_size=world_size)

    return build


def test_each_real_clip_is_compared_with_one_made_from_its_first_frame_and_caption(make):
    fvd, pipeline = make(), Pipeline()
    pairs = fvd.measure(pipeline, lambda: False)
    assert [pair.number for pair in pairs] == list(range(7)) and fvd.variant == "means of 5 frames"
    assert [asked[:4] for asked in pipeline.asked] == [(f"clip {n}", [0], 5, 9) for n in range(7)]
    for pair in pairs:
        real = read(pair.number).frames
        assert np.array_equal(pair.real, real.reshape(-1, 3).mean(axis=0))
        seed = pipeline.asked[pair.number][4]
        assert np.array_equal(pair.made, (real[0] // 2 + seed % 100).reshape(-1, 3).mean(axis=0))
    assert len({asked[4] for asked in pipeline.asked}) == 7


def test_features_of_real_clips_are_made_once(make):
    fvd, pipeline = make(), Pipeline()
    assert fvd.preparing_s > 0
    first = fvd.measure(pipeline, lambda: False)
    assert fvd.preparing_s == 0 and fvd.real_s > 0
    before = len(fvd._features.seen)
    again = fvd.measure(pipeline, lambda: False)
    assert len(fvd._features.seen) - before == 7 and fvd.real_s == 0
    assert fvd_of(again) == fvd_of(first), "the same clips at every measurement"
    assert fvd_of(make(seed=4).measure(pipeline, lambda: False)) != fvd_of(first)


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_measures_the_same(make, world):
    alone = fvd_of(make().measure(Pipeline(), lambda: False))
    shares = [make(rank, world).measure(Pipeline(), lambda: False) for rank in reversed(range(world))]
    assert fvd_of([pair for share in shares for pair in share]) == alone
    assert sorted(len(share) for share in shares) == sorted(len(range(rank, 7, world)) for rank in range(world))


def test_the_distance_is_frechets():
    rng = np.random.default_rng(0)
    real, made = rng.normal(size=(9, 3)), rng.normal(1, 2, size=(9, 3))
    pairs = [ClipFeatures(n, real[n], made[n]) for n in range(9)]
    expected = frechet_distance(Normal.of_samples(real), Normal.of_samples(made))
    assert fvd_of(pairs[::-1]) == expected > 0
    assert fvd_of([ClipFeatures(n, real[n], real[n]) for n in range(9)]) == pytest.approx(0, abs=1e-9)


def test_its_cost_is_told_before_it_is_measured(make):
    fvd = make(rank=1, world_size=2)
    fvd._feature_s = 0.5
    assert fvd.seconds(2.0) == pytest.approx(4 * 2.5), "7 clips on 2 ranks are 4 rounds"
    assert fvd.preparing_s == pytest.approx(4 * 0.5)


def test_one_clip_is_the_first_of_this_ranks_share(make):
    fvd, trial, whole = make(rank=1, world_size=2), Pipeline(), Pipeline()
    fvd.make_one(trial, lambda: False)
    assert len(fvd._features.seen) == 1, "the call of the start; none here"
    fvd.measure(whole, lambda: False)
    assert trial.asked == whole.asked[:1] and trial.asked[0][0] == "clip 1"
    make(rank=3, world_size=4, count=3).make_one(trial, lambda: False)
    assert len(trial.asked) == 1, "more ranks than clips"
    with pytest.raises(Interrupted):
        fvd.make_one(trial, lambda: True)


def test_a_stop_and_a_clip_that_is_gone(make):
    pipeline = Pipeline()
    with pytest.raises(Interrupted):
        make().measure(pipeline, lambda: len(pipeline.asked) == 2)
    assert len(pipeline.asked) == 2

    def gone(number):
        raise UserError("it can no longer be read")

    with pytest.raises(UserError, match="no longer"):
        make(read=gone).measure(pipeline, lambda: False)


@pytest.fixture
def run(project_root, tmp_path):
    """What of a run FVD is built from."""
    settings = ["rdtf.validation.interval=5", "rdtf.validation.fvd_interval=10"]
    experiment = load_experiment(project_root / "ds_configs" / "tiny_cpu.json", settings, output_dir=tmp_path)
    ids = np.arange(4)
    index = SimpleNamespace(held_out=ids, trainable=ids[:0], rows=[SimpleNamespace(kept=8)] * 4)
    return SimpleNamespace(experiment=experiment, index=index, engine=SimpleNamespace(rank=0, world_size=2))


@pytest.mark.parametrize(
    ("mine", "other", "told"),
    [
        (UserError("'w.pt' is not I3D"), None, "rank 0 cannot measure: 'w.pt' is not I3D"),
        (ZeroDivisionError("by what"), None, "rank 0 cannot measure: ZeroDivisionError: by what"),
        (None, "MemoryError: ", "rank 1 cannot measure: MemoryError: "),
    ],
)
def test_a_rank_that_cannot_measure_is_refused_by_all_whatever_it_raised(run, monkeypatch, mine, other, told):
    met, said = [], []

    def features(weights, batch):
        if mine is not None:
            raise mine
        return Features(weights, batch)

    def gather(value):
        met.append(value)
        return [value, other]

    monkeypatch.setattr(validation_fvd, "VideoFeatures", features)
    monkeypatch.setattr(validation_assembly, "gather_objects", gather)
    monkeypatch.setattr(validation_assembly, "on_rank_zero", lambda make: make())
    with pytest.raises(UserError, match=f"asks for FVD, which {told}") as refused:
        validation_assembly._build_fvd(run, SimpleNamespace(say=said.append))
    assert len(met) == 1 and refused.value.everywhere and said == []


def test_fvd_that_every_rank_can_measure_is_told(run, monkeypatch):
    said = []
    monkeypatch.setattr(validation_fvd, "VideoFeatures", Features)
    monkeypatch.setattr(validation_assembly, "gather_objects", lambda value: [value, None])
    monkeypatch.setattr(validation_assembly, "on_rank_zero", lambda make: make())
    assert validation_assembly._build_fvd(run, SimpleNamespace(say=said.append)).count == 4
    assert said == [f"FVD every 10 steps, of 4 held-out clips (256 were asked for): means of {run.experiment.rdtf.data.frames} frames"]


def test_another_networks_file_is_told_by_a_dry_run(project_root, tmp_path):
    class Mean(torch.nn.Module):
        def forward(self, clips: torch.Tensor) -> torch.Tensor:
            return clips.mean()

    torch.jit.script(Mean()).save(str(tmp_path / "other.pt"))
    settings = ["rdtf.validation.interval=5", "rdtf.validation.fvd_interval=10", f"rdtf.validation.fvd_weights={tmp_path / 'other.pt'}"]
    experiment = load_experiment(project_root / "ds_configs" / "tiny_cpu.json", settings, output_dir=tmp_path / "run")
    assert f"NOT READY: '{tmp_path / 'other.pt'}' does not work as I3D" in describe(experiment, 1, torch.device("cpu"))


def test_missing_weights_are_refused_at_the_start_and_told_by_a_dry_run(project_root, tmp_path, monkeypatch):
    settings = ["rdtf.validation.interval=5", "rdtf.validation.fvd_interval=10", f"rdtf.validation.fvd_weights={tmp_path / 'i3d.ckpt'}"]
    experiment = load_experiment(project_root / "ds_configs" / "tiny_cpu.json", settings, output_dir=tmp_path / "run")
    assert fvd_weights(experiment.rdtf) == tmp_path / "i3d.ckpt"
    with pytest.raises(UserError, match="i3d.ckpt"):
        TrainingFVD(fvd_weights(experiment.rdtf), 4, read, num_frames=5, side=4, steps=1, seed=0, rank=0, world_size=1)
    text = describe(experiment, 1, torch.device("cpu"))
    assert f"NOT READY: '{tmp_path / 'i3d.ckpt'}'" in text and "every 10 steps FVD of 256 clips" in text
    assert "validation      every 5 steps: loss of 16 clips (trained on, since rdtf.data.validation_fraction is 0) at 5 timesteps" in text
    assert "at most 5.0% of the time" in text

    def none():
        raise WeightsNotFound("FVD needs I3D's weights, and they are not here.")

    monkeypatch.setattr("rdtf_ds.evaluation.fvd.find_weights", none)
    package = load_experiment(project_root / "ds_configs" / "tiny_cpu.json", settings[:2], output_dir=tmp_path / "run")
    assert fvd_weights(package.rdtf) is None and "NOT READY: FVD needs I3D's weights" in describe(package, 1, torch.device("cpu"))
