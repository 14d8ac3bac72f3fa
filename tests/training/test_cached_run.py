"""Runs that train from a feature cache: they learn what runs with encoders learn, go on bit by bit, and refuse what does not fit."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rdtf_ds.data.cache_header import CacheError, write_header
from rdtf_ds.data.synthetic import write_stickers
from rdtf_ds.errors import UserError
from rdtf_ds.experiment import load_experiment
from rdtf_ds.models.text_conditioning import TextEncoders
from rdtf_ds.models.tiny_encoders import write_tiny_encoders
from rdtf_ds.training import validation_assembly
from rdtf_ds.training.assembly import Run, build_run
from rdtf_ds.training.checkpoint import Saved
from rdtf_ds.training.dry_run import describe
from rdtf_ds.training.held_out import HeldOutLoss, means
from rdtf_ds.training.run_state import resume, save
from rdtf_ds.training.validation_assembly import build_pipeline, held_out_clips, run_encoders
from rdtf_ds.training.validation_pipeline import LatePipeline
from tests.models.test_frame_encoder import save_model
from tests.small_models import load_tool

CPU = torch.device("cpu")
LIVELY = (
    "train_batch_size=3", "train_micro_batch_size_per_gpu=3", "rdtf.data.workers=0", "rdtf.curriculum.fast_horizon=1",
    "rdtf.curriculum.slow_horizon=2", "rdtf.curriculum.k_p=40",
)  # fmt: skip
DROPS = ("rdtf.data.no_text_probability=0.2", "rdtf.data.no_image_probability=0.2", "rdtf.data.neither_probability=0.2")
WHOLE_WORDS = "rdtf.data.word_hide_probability=0"
LOG = SimpleNamespace(flush=lambda: {}, scalar=lambda *arguments: None, alarm=pytest.fail)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_stickers(folder, 7, 0, 32)
    return folder


@pytest.fixture
def made(process_group: None, project_root: Path, tmp_path: Path, clips: Path) -> Callable[..., Run]:
    """A run of the tiny config over these clips; with "cached" its cache is filled first, once for each folder."""
    tool = load_tool(project_root, "cache_dataset")
    config = project_root / "ds_configs" / "tiny_cpu.json"

    def make(mode: str, *settings: str, folder: str = "run", cache: str = "cache", fill: bool = True) -> Run:
        settings = (*LIVELY, *settings)
        if mode == "cached":
            if fill and not (tmp_path / cache).exists():
                sets = [word for setting in settings for word in ("--set", setting)]
                command = ["--deepspeed_config", str(config), *sets, "--data_dir", str(clips), "--out", str(tmp_path / cache)]
                assert tool.main(command) == 0
            settings = (*settings, "rdtf.memory.encoders=cached", f"rdtf.memory.cache_dir={tmp_path / cache}")
        return build_run(load_experiment(config, settings, data_dir=clips, output_dir=tmp_path / folder), 0, 1, CPU)

    return make


def learn(run: Run, first: int, stop: int) -> list[tuple[float, list[str]]]:
    """Train as `train_step` does; the loss of each step and the captions its samples had."""
    told = []
    for _, batches in run.loader.steps(first, stop):
        for batch in batches:
            run.engine.backward(run.objective.losses(run.engine.forward, run.objective.encode(batch)), batch.timestep)
        outcome = run.engine.step()
        run.queue.push(run.curriculum.observe(run.queue.state, outcome.loss, outcome.sample_losses, outcome.timesteps))
        told.append((outcome.loss, [caption for batch in batches for caption in batch.captions]))
    return told


def no_encoders(*arguments: Any) -> None:
    pytest.fail("a cached run loads no encoders for training")


@pytest.mark.parametrize("guidance", ["latent", "pixel"])
def test_without_hidden_words_the_losses_are_those_of_the_encoders(made, monkeypatch, guidance):
    settings = (*DROPS, WHOLE_WORDS, f"rdtf.model.guidance={guidance}")
    resident = learn(made("resident", *settings, folder="resident"), 0, 6)
    made("cached", *settings, folder="first")
    monkeypatch.setattr("rdtf_ds.training.encoders.load_autoencoder", no_encoders)
    monkeypatch.setattr(TextEncoders, "from_pretrained", no_encoders)
    monkeypatch.setattr("rdtf_ds.data.dataset.decode_clip", no_encoders)
    monkeypatch.setattr("rdtf_ds.data.clips.decoding.read_place", no_encoders)
    cached = learn(made("cached", *settings, folder="cached"), 0, 6)
    assert [captions for _, captions in cached] == [captions for _, captions in resident]
    assert any("#" in caption for _, captions in cached for caption in captions), "some sample lost its text"
    assert [loss for loss, _ in cached] == pytest.approx([loss for loss, _ in resident], abs=1e-6)
    assert len({loss for loss, _ in cached}) == 6


def test_in_half_precision_the_latents_are_rounded_and_little_else(made):
    settings = (*DROPS, WHOLE_WORDS, "fp16.enabled=true", "rdtf.verify_fp16_on_cpu=true", "rdtf.model.guidance=pixel")
    resident, cached = made("resident", *settings, folder="resident"), made("cached", *settings, folder="cached")
    for _, (plain, stored) in zip(range(4), zip(resident.loader.steps(0), cached.loader.steps(0), strict=False), strict=False):
        expected, encoded = (run.objective.encode(batches[0]) for run, (_, batches) in ((resident, plain), (cached, stored)))
        assert stored[1][0].features.latents.dtype == torch.float16
        assert torch.equal(encoded.text.clip, expected.text.clip) and torch.equal(encoded.text.t5, expected.text.t5)
        real = expected.frame_mask[:, None, :, None, None]
        difference = torch.where(real, encoded.sample - expected.sample, 0).float().abs().max().item()
        assert difference <= 2**-9, "a unit in the last place of latents between 2 and 4, and of their rounded sum"
        for run in (resident, cached):
            run.queue.push(run.queue.state)


def test_a_stopped_run_goes_on_bit_by_bit(made):
    whole = made("cached", folder="whole")
    expected = learn(whole, 0, 6)
    assert len({tuple(captions) for _, captions in expected}) == 6
    stopped = made("cached", folder="stopped")
    assert resume(stopped) is None
    first = learn(stopped, 0, 3)
    assert isinstance(save(stopped, LOG), Saved)
    resumed = made("cached", folder="stopped")
    answer = resume(resumed)
    assert answer is not None and answer.step == 3 and answer.notes == ()
    assert first + learn(resumed, 3, 6) == expected
    assert all(torch.equal(a, b) for a, b in zip(resumed.engine.masters, whole.engine.masters, strict=True))


def test_a_run_may_change_to_a_cache_and_back_and_is_told(made):
    run = made("resident")
    learn(run, 0, 2)
    assert isinstance(save(run, LOG), Saved)
    cached = made("cached")
    answer = resume(cached)
    assert answer is not None and answer.step == 2
    told = "\n".join(answer.notes)
    assert 'rdtf.memory.encoders was "resident" and is now "cached"' in told and "feature cache was null and is now {" in told
    learn(cached, 2, 4)
    assert isinstance(save(cached, LOG), Saved)
    answer = resume(made("resident"))
    assert answer is not None and answer.step == 4 and 'was "cached" and is now "resident"' in "\n".join(answer.notes)


def test_validation_loads_the_encoders_late_and_makes_the_same_clips(made, monkeypatch, caplog):
    asked = {"frames": {0: np.full((32, 32, 3), 90, np.uint8)}, "num_frames": 3, "num_inference_steps": 2, "seeds": [5]}
    resident = made("resident", folder="resident", cache="other")
    expected = build_pipeline(resident)("a red star", **asked).frames
    run = made("cached", folder="cached")
    run.engine.model.load_state_dict(resident.engine.model.state_dict())
    loaded, load = [], validation_assembly.load_encoders
    monkeypatch.setattr(validation_assembly, "load_encoders", lambda *arguments: loaded.append(arguments[2]) or load(*arguments))
    pipeline = build_pipeline(run)
    assert isinstance(pipeline, LatePipeline)
    pipeline.set_progress_bar_config(disable=True)
    assert loaded == [] and caplog.text == ""
    assert np.array_equal(pipeline("a red star", **asked).frames, expected)
    assert loaded == [CPU] and "loading them on the CPU" in caplog.text
    monkeypatch.setattr(TextEncoders, "_tokens", no_encoders)  # what was encoded once is kept
    assert np.array_equal(pipeline("a red star", **asked).frames, expected)
    assert loaded == [CPU] and len(caplog.records) == 1
    other = build_pipeline(replace(run, engine=SimpleNamespace(model=run.engine.model, device=CPU, rank=1)))
    with pytest.raises(pytest.fail.Exception):
        other("a red star", **asked)
    assert len(caplog.records) == 1, "one rank tells for all"


def test_encoders_that_cannot_be_loaded_late_are_tried_once(made, monkeypatch):
    tried = []

    def refuse(*arguments):
        tried.append(arguments)
        raise UserError("the encoders are gone")

    monkeypatch.setattr(validation_assembly, "load_encoders", refuse)
    pipeline = build_pipeline(made("cached"))
    for _ in range(2):
        with pytest.raises(UserError, match="the encoders are gone"):
            pipeline("a red star", num_frames=3, num_inference_steps=2, seeds=[5])
    assert len(tried) == 1


def test_held_out_losses_are_the_same_wherever_the_encoders_are(made, monkeypatch):
    losses, loaded, load = [], [], validation_assembly.load_encoders
    monkeypatch.setattr(validation_assembly, "load_encoders", lambda *arguments: loaded.append(arguments[2]) or load(*arguments))
    for where in ("resident", "cpu", "cached"):
        settings = ("rdtf.memory.encoders=cpu",) if where == "cpu" else ()
        run = made("cached" if where == "cached" else "resident", *settings, folder=where)
        torch.manual_seed(0)
        torch.nn.init.normal_(run.engine.model.conv_out.weight)  # zero at first: whatever it is shown, it would say the same
        encoders = run_encoders(run)
        measure = HeldOutLoss(held_out_clips(run), (100, 900), 0, run.objective, encoders, 0, 1)
        losses.append(means(measure.measure(run.engine.model)))
        assert measure.prepared and len(measure.clips) == 7
        if where == "cached":
            assert loaded == [CPU], "loaded late, once"
            asked = {"frames": {}, "num_frames": 3, "num_inference_steps": 1, "seeds": [5]}
            build_pipeline(run, encoders)("a red star", **asked)
        assert loaded == ([CPU] if where == "cached" else [])
    assert losses[0]["loss"] > 0.5 and losses[1] == pytest.approx(losses[0], rel=1e-6) and losses[2] == pytest.approx(losses[0], rel=1e-6)


def test_weights_are_hashed_once_for_many_starts(made, tmp_path, monkeypatch):
    folder = tmp_path / "encoders"
    write_tiny_encoders(folder, width=16)
    sources = [f"rdtf.encoders.{name}={folder}" for name in ("autoencoder", "clip", "t5")]
    made("cached", *sources)
    assert (tmp_path / "cache" / "weights.json").is_file()
    monkeypatch.setattr("rdtf_ds.models.local_weights.hashlib", SimpleNamespace(sha256=hashlib.sha256, file_digest=no_encoders))
    made("cached", *sources)


def test_encoders_that_cannot_be_loaded_are_tried_once(made, monkeypatch):
    run, tries = made("cached"), []

    def load(*arguments):
        tries.append(arguments)
        raise UserError("no such encoder")

    monkeypatch.setattr(validation_assembly, "load_encoders", load)
    pipeline = build_pipeline(run)
    for _ in range(3):
        with pytest.raises(UserError, match="no such encoder"):
            pipeline("a red star", num_frames=3)
    assert len(tries) == 1


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("rdtf.data.image_size=64", "rdtf.data.image_size is 64 here, but the cache was made with 32"),
        ("rdtf.data.background=[0,0,0]", r"rdtf.data.background is \[0, 0, 0\] here"),
        ("rdtf.encoders.autoencoder=haar:2", 'rdtf.encoders.autoencoder is "haar:2" here, but the cache was made with "haar:4"'),
        ("rdtf.encoders.clip=tiny:32", 'rdtf.encoders.clip is "tiny:32" here, but the cache was made with "tiny"'),
        ("rdtf.encoders.text_length=70", "rdtf.encoders.text_length is 70 here, but the cache was made with 77"),
        ("rdtf.encoders.t5_dtype=bfloat16", 'rdtf.encoders.t5_dtype is "bfloat16" here'),
        ("rdtf.data.max_frames=9", "rdtf.data.max_frames is 9 here, but the cache was made with 128"),
        ("rdtf.data.word_hide_probability=0.2", "rdtf.data.word_hide_probability is 0.2 here, but the cache was made with 0.1"),
        ("rdtf.data.frame_features=CLIP_FOLDER", 'rdtf.data.frame_features is ".*clip" here, but the cache was made with "thumbnail"'),
        ("rdtf.model.guidance=pixel", 'rdtf.model.guidance is "pixel" here, but the cache was made with "latent"'),
        ("bf16.enabled=true", 'precision is "bf16" here, but the cache was made with "fp32"'),
    ],
)
def test_a_cache_of_other_keys_is_refused(made, setting, told, tmp_path):
    made("cached")
    if "CLIP_FOLDER" in setting:
        setting = setting.replace("CLIP_FOLDER", str(save_model(tmp_path / "clip")))
    with pytest.raises(CacheError, match=told) as caught:
        made("cached", setting, fill=False)
    assert str(caught.value).count(" here, but the cache") == 1, "nothing else differs"


def test_a_cache_that_lacks_a_clip_names_it_and_the_command(made, clips, tmp_path):
    run = made("cached")
    for clip_id in run.index.trainable.tolist()[2:4]:
        run.cached.cache.path(run.cached.key(clip_id)).unlink()
    first = run.index.rows[run.index.trainable[2]].path
    with pytest.raises(CacheError, match="2 of 7 clips are not in the feature cache") as caught:
        made("cached", fill=False)
    assert f"'{tmp_path / 'cache'}', the first one '{first}'. Extend it: " in str(caught.value)
    assert f"--data_dir {clips} --out {tmp_path / 'cache'}" in str(caught.value)
    with pytest.raises(CacheError, match="is no feature cache"):
        made("cached", cache="elsewhere", fill=False)


def test_a_clip_that_the_tool_could_not_decode_is_quarantined(made):
    run = made("cached")
    clip_id = run.index.trainable.tolist()[1]
    run.cached.cache.path(run.cached.key(clip_id)).unlink()
    run.cached.cache.mark_broken(run.cached.key(clip_id), "truncated in the middle")
    again = made("cached", fill=False)
    assert clip_id not in again.index.trainable and len(again.index.trainable) == 6
    assert again.quarantine.bad == 1
    told = [json.loads(line) for line in again.quarantine.path.read_text().splitlines()]
    assert [(line["path"], line["reason"]) for line in told] == [(run.index.path(clip_id), "truncated in the middle")]
    for clip_id in again.index.trainable.tolist():
        again.cached.cache.path(again.cached.key(clip_id)).unlink()
        again.cached.cache.mark_broken(again.cached.key(clip_id), "all of them")
    with pytest.raises(CacheError, match="nothing to train on"):
        made("cached", fill=False)


def test_validation_without_encoders_here_is_refused_at_the_start(made, tmp_path, caplog):
    folder = tmp_path / "encoders"
    write_tiny_encoders(folder, width=16)
    sources = [f"rdtf.encoders.{name}={folder}" for name in ("autoencoder", "clip", "t5")]
    validates = "rdtf.validation.interval=5"
    run = made("cached", *sources, validates)
    assert re.fullmatch("[0-9a-f]{64}", run.cached.cache.header.identity["rdtf.encoders.t5"]["weights"])
    for path in (*folder.glob("text_encoder_2/*.safetensors"), folder / "vae" / "config.json"):
        path.unlink()
    with pytest.raises(UserError, match=r"rdtf.encoders.autoencoder, rdtf.encoders.t5 cannot be loaded.*--set rdtf.validation.interval=0"):
        made("cached", *sources, validates)
    assert caplog.text == ""
    learn(made("cached", *sources, "rdtf.validation.interval=0"), 0, 1)
    assert "rdtf.encoders.autoencoder, rdtf.encoders.t5: no weights here to compare" in caplog.text


def test_encoders_replaced_in_their_folder_are_noticed(made, tmp_path):
    folder = tmp_path / "encoders"
    write_tiny_encoders(folder, width=16)
    sources = [f"rdtf.encoders.{name}={folder}" for name in ("autoencoder", "clip", "t5")]
    made("cached", *sources)
    copy = tmp_path / "copy"
    write_tiny_encoders(copy, width=16)
    made("cached", *(source.replace(str(folder), str(copy)) for source in sources))
    write_tiny_encoders(tmp_path / "replaced", width=16, vocabulary=("another",))
    (folder / "text_encoder").rename(tmp_path / "gone")
    (tmp_path / "replaced" / "text_encoder").rename(folder / "text_encoder")
    with pytest.raises(CacheError, match=r"rdtf.encoders.clip is .* \(weights [0-9a-f]{12}, tok.* here, but .* \(weights"):
        made("cached", *sources)
    shutil.rmtree(folder / "text_encoder")
    (tmp_path / "gone").rename(folder / "text_encoder")
    made("cached", *sources)
    vocabulary = folder / "tokenizer" / "tokenizer.json"
    vocabulary.write_text(vocabulary.read_text().replace("}", " }"))
    with pytest.raises(CacheError, match=r"rdtf.encoders.clip is .* \(weights .*, tokenizer [0-9a-f]{12}\) here, but the cache was made"):
        made("cached", *sources)


def test_a_dry_run_knows_of_the_cache(made, tmp_path):
    run = made("cached")
    text = describe(run.experiment, 1, CPU)
    parameters = text.partition("parameters ")[2].partition("(")[0]
    assert "NOT READY" not in text and f"{sum(group.numel for group in run.engine.groups):,}" in parameters
    header = run.cached.cache.header
    other = replace(header, clip_dim=32, identity={**header.identity, "rdtf.encoders.clip": {"source": "no/clip", "weights": "1f"}})
    write_header(tmp_path / "cache", other)
    assert "NOT READY: the feature cache" in (text := describe(run.experiment, 1, CPU)) and "no/clip" in text
    (tmp_path / "cache" / "cache.json").unlink()
    text = describe(run.experiment, 1, CPU)
    assert text.count("NOT READY") == 1 and "is no feature cache" in text
