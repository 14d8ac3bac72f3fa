from __future__ import annotations

import json
import pickle
from dataclasses import replace

import pytest
import torch

from rdtf_ds.data.indexing.problem import Problem
from rdtf_ds.data.quarantine import TooManyBadFiles
from rdtf_ds.data.synthetic import write_stickers
from rdtf_ds.errors import UserError
from rdtf_ds.experiment import load_experiment
from rdtf_ds.models.autoencoder import HaarAutoencoder
from rdtf_ds.models.text_conditioning import TextFeatures
from rdtf_ds.models.tiny_encoders import write_tiny_encoders
from rdtf_ds.training import dry_run, engine, validation_assembly
from rdtf_ds.training.assembly import (
    build_model,
    build_run,
    config_hash,
    prepare_folder,
    split_model,
    write_config,
)
from rdtf_ds.training.dry_run import describe
from rdtf_ds.training.validation_assembly import build_pipeline, validation_requests


@pytest.fixture
def tiny(project_root, tmp_path):
    def load(*settings: str, **options):
        return load_experiment(project_root / "ds_configs" / "tiny_cpu.json", settings, **({"output_dir": tmp_path / "run"} | options))

    return load


@pytest.mark.parametrize("guidance", ["latent", "pixel"])
def test_the_network_fits_latents_guidance_and_text(tiny, guidance):
    model = build_model(tiny(f"rdtf.model.guidance={guidance}").rdtf, latent_channels=12, clip_dim=64, t5_dim=24)
    channels = 12 + (12 if guidance == "latent" else 4)
    answer = model(torch.randn(2, channels, 3, 8, 8), torch.tensor([5, 9]), TextFeatures(torch.randn(2, 7, 64), torch.randn(2, 7, 24)))
    assert answer.shape == (2, 12, 3, 8, 8)
    assert model.checkpointing == "blocks"


def test_channels_last_changes_the_layout_not_the_answer(tiny):
    inputs = torch.randn(1, 8, 3, 8, 8), torch.tensor([5]), TextFeatures(torch.randn(1, 7, 16), torch.randn(1, 7, 16))
    layouts, answers = [], []
    for setting in ("false", "true"):
        torch.manual_seed(0)
        model = build_model(tiny(f"rdtf.memory.channels_last={setting}").rdtf, 4, 16, 16)
        torch.nn.init.normal_(model.conv_out.weight)
        model.conv_in.register_forward_hook(
            lambda module, given, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last) and not out.is_contiguous())
        )
        answers.append(model(*inputs))
    assert layouts == [False, True]
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4)


def test_zero_initialised_outputs_get_32_bits(tiny):
    model = build_model(tiny().rdtf, 4, 16, 16)
    wide = {name for group in split_model(model, tiny().rdtf) if group.bits == 32 for name, _ in group.parameters}
    assert "conv_out.weight" in wide and model.zero_initialised_parameters() <= wide and "conv_in.weight" not in wide
    assert {group.bits for group in split_model(model, tiny("rdtf.optimizer.bits=32").rdtf)} == {32}


def test_the_hash_tells_experiments_apart_but_not_folders(tiny, tmp_path):
    assert config_hash(tiny()) == config_hash(tiny(output_dir=tmp_path / "elsewhere"))
    assert len({config_hash(tiny()), config_hash(tiny(seed=4)), config_hash(tiny("gradient_clipping=2.0"))}) == 3


def test_the_config_is_saved_resolved_and_loads_again(tiny, tmp_path):
    experiment = tiny("rdtf.curriculum.delay=3")
    prepare_folder(tmp_path / "run")
    write_config(tmp_path / "run", experiment)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["rdtf"]["curriculum"]["delay"] == 3
    assert load_experiment(tmp_path / "run" / "config.json").resolved() == experiment.resolved()


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output_dir"):
        prepare_folder(tmp_path / "file" / "run")


def test_stickers_are_made_once_and_problems_stop_a_run(process_group, tiny, tmp_path):
    experiment = tiny("rdtf.data.synthetic_clips=10", "rdtf.data.max_bad_fraction=0.15", "train_batch_size=1", "rdtf.data.workers=0")
    run = build_run(experiment, 0, 1, torch.device("cpu"))
    made = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "stickers").iterdir()}
    assert len(run.index.rows) == 10
    again = build_run(experiment, 0, 1, torch.device("cpu"))
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "stickers").iterdir()} == made
    assert again.identity == run.identity
    longer = replace(run, experiment=tiny("rdtf.data.synthetic_clips=10", "rdtf.max_steps=999", "train_batch_size=1"))
    schedules = [each.identity.may_differ["rdtf"]["curriculum"]["static_steps"] for each in (run, longer)]
    assert schedules == [experiment.rdtf.max_steps, 999], "a run made longer must be told that its schedule changes"
    assert all(torch.equal(a, b) for a, b in zip(run.engine.masters, again.engine.masters, strict=True)), "the seed alone makes the weights"
    run.merge_problems([], 0)
    run.merge_problems([Problem("a.gif", "truncated", 3, "aa")], 0)
    with pytest.raises(TooManyBadFiles, match="2 of 10"):
        run.merge_problems([Problem("b.gif", "truncated", 4, "bb")], 1)
    assert [json.loads(line)["path"] for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()] == ["a.gif", "b.gif"]


def test_a_dry_run_of_the_full_model_needs_no_encoders(project_root, tmp_path):
    settings = ["rdtf.encoders.autoencoder=no/autoencoder", "rdtf.data.synthetic_clips=64", "rdtf.data.data_dir=null"]
    experiment = load_experiment(project_root / "ds_configs" / "v100.json", settings, output_dir=tmp_path)
    text = describe(experiment, 8, torch.device("cpu"))
    assert "NOT READY" in text and "parameters      955," in text and "16 = 8 rank(s) x 1 at once x 2 in turn" in text
    assert "step 0: IPT 0.600, PDT 0.250, GRT 0.150" in text and "step 50000: IPT 0.200, PDT 0.300, GRT 0.500" in text
    assert "NOT READY: autoencoder not found" in text and "NOT READY: fp16.enabled = true, but torch sees no GPU" in text


def test_a_dry_run_tells_what_would_stop_the_run(tiny, tmp_path, monkeypatch):
    clips = tmp_path / "clips"
    write_stickers(clips, 6, 0, 16)
    for name in ("x.gif", "y.gif"):
        (clips / name).write_bytes(b"GIF89a")
    data = f"rdtf.data.data_dir={clips}"
    assert "NOT READY" not in describe(tiny(data, "rdtf.data.max_bad_fraction=0.25"), 1, torch.device("cpu"))
    (tmp_path / "file").write_text("")
    text = describe(tiny(data, "rdtf.data.max_bad_fraction=0.24", output_dir=tmp_path / "file" / "run"), 1, torch.device("cpu"))
    assert "NOT READY: 2 of 8 data files cannot be decoded (25.0%)" in text and "the first one 'x.gif': " in text
    assert f"cannot be written: '{tmp_path / 'file'}' is a file" in text and text.count("NOT READY") == 2
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    assert f"'{tmp_path}' may not be written" in describe(tiny(data, "rdtf.data.max_bad_fraction=1"), 1, torch.device("cpu"))
    monkeypatch.setenv("RANK", "1")
    assert describe(tiny(data), 1, torch.device("cpu")) == ""


def test_a_dry_run_reads_widths_without_weights(tiny, tmp_path):
    write_tiny_encoders(tmp_path / "encoders", width=24)
    for weights in (tmp_path / "encoders").rglob("*.safetensors"):
        weights.unlink()
    folder = tmp_path / "encoders"
    sources = [f"rdtf.encoders.{name}={folder}" for name in ("autoencoder", "clip", "t5")]
    assert dry_run._widths(tiny(*sources).rdtf) == (4, 24, 24)
    made = tiny("rdtf.encoders.autoencoder=haar:2", "rdtf.encoders.clip=tiny:32", "rdtf.encoders.t5=tiny").rdtf
    assert dry_run._widths(made) == (12, 32, 64)
    HaarAutoencoder(4).save_pretrained(tmp_path / "haar")
    assert dry_run._widths(tiny(f"rdtf.encoders.autoencoder={tmp_path / 'haar'}", *sources[1:]).rdtf)[0] == 48


def test_validation_keeps_to_the_memory_keys_and_rank_zero_reads_its_clips(process_group, tiny, monkeypatch):
    settings = ["rdtf.data.synthetic_clips=10", "rdtf.memory.autoencoder_slice=3", "train_batch_size=1", "rdtf.data.workers=0"]
    run = build_run(tiny(*settings), 0, 1, torch.device("cpu"))
    assert build_pipeline(run).config.slice_frames == 3
    made = validation_requests(run)
    assert len(made) == run.experiment.rdtf.validation.clips

    def receive(answer, src):
        assert src == 0 and answer == [None] * len(answer)
        answer[0] = pickle.loads(pickle.dumps(made))

    monkeypatch.setattr(validation_assembly, "decode_clip", lambda *arguments, **named: pytest.fail("rank 1 read a clip"))
    monkeypatch.setattr(engine.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(engine.dist, "broadcast_object_list", receive)
    received = validation_requests(run)
    assert [(r.name, r.prompt, r.seed, list(r.visible)) for r in received] == [(r.name, r.prompt, r.seed, list(r.visible)) for r in made]
    assert all((r.visible[n] == m.visible[n]).all() for r, m in zip(received, made, strict=True) for n in m.visible)
