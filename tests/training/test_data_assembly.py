"""The data of a run: where its index is kept and shared, what else it may hang on, and that a dry run leaves nothing behind."""

from __future__ import annotations

import hashlib
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rdtf_ds.data.synthetic import write_stickers
from rdtf_ds.errors import UserError
from rdtf_ds.experiment import load_experiment
from rdtf_ds.models.missing import EncoderNotFound
from rdtf_ds.training import data_assembly
from rdtf_ds.training.assembly import build_run
from rdtf_ds.training.data_assembly import decode_limits, index_folder, make_index, open_data
from rdtf_ds.training.dry_run import describe
from rdtf_ds.training.validation_assembly import validation_requests
from tests.models.test_frame_encoder import save_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_stickers(folder, 12, 0, 16)
    (folder / "x.gif").write_bytes(b"GIF89a")
    return folder


@pytest.fixture
def tiny(project_root: Path, tmp_path: Path, clips: Path) -> Any:
    def load(*settings: str, folder: str = "run", **options: Any) -> Any:
        quick = ("train_batch_size=1", "rdtf.data.workers=0")
        config = project_root / "ds_configs" / "tiny_cpu.json"
        return load_experiment(config, (*quick, *settings), **({"data_dir": clips, "output_dir": tmp_path / folder} | options))

    return load


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def test_every_key_of_the_data_reaches_the_index(process_group, tiny, tmp_path):
    keys = (
        "video_clip_s=2", "validation_fraction=0.25", 'group_pattern="^(0)"', "drop_duplicates=false", "background=[1,2,3]",
        "max_pixels=70001", "max_frames=9", "max_source_frames=99", "max_bytes=70002", "max_total_pixels=70003", "decode_timeout_s=7",
    )  # fmt: skip
    experiment = tiny(*(f"rdtf.data.{key}" for key in keys))
    settings = make_index(experiment.rdtf, tmp_path / "run", CPU).settings
    assert (settings.video_clip_s, settings.validation_fraction, settings.group_pattern) == (2.0, 0.25, "^(0)")
    assert (settings.drop_duplicates, settings.background, settings.features) == (False, (1, 2, 3), "thumbnail:8")
    assert settings.limits == decode_limits(experiment.rdtf)
    limits = settings.limits
    assert (limits.max_pixels, limits.max_frames, limits.max_source_frames, limits.max_bytes) == (70001, 9, 99, 70002)
    assert (limits.max_total_pixels, limits.timeout_s) == (70003, 7.0)


def test_an_index_is_kept_with_the_run_or_shared_by_runs(process_group, tiny, tmp_path, monkeypatch):
    first, _ = open_data(tiny(), tmp_path / "run", CPU)
    assert first.folder.parent == tmp_path / "run" / "kept_index" and len(list((tmp_path / "run" / "index").glob("index-*"))) == 1
    shared = f"rdtf.data.index_dir={tmp_path / 'shared'}"
    index, cached = open_data(tiny(shared), tmp_path / "run", CPU)
    assert len(list((tmp_path / "shared").glob("index-*"))) == 1 and index == first and cached is None
    monkeypatch.setattr("rdtf_ds.data.indexing.examining.Examiner.rows", lambda *arguments: pytest.fail("examined again"))
    again, _ = open_data(tiny(shared, folder="other"), tmp_path / "other", CPU)
    assert again.fingerprint == index.fingerprint and [path.name for path in (tmp_path / "other").iterdir()] == ["kept_index"]


def test_where_the_index_lies_is_no_part_of_a_runs_identity(process_group, tiny, tmp_path):
    plain = build_run(tiny(), 0, 1, CPU)
    shared = build_run(tiny(f"rdtf.data.index_dir={tmp_path / 'shared'}"), 0, 1, CPU)
    assert plain.identity == shared.identity
    assert plain.identity.may_differ["data fingerprint"] == plain.index.fingerprint
    split = build_run(tiny("rdtf.data.validation_fraction=0.4"), 0, 1, CPU)
    assert split.identity.must_match == plain.identity.must_match
    assert split.identity.may_differ["data fingerprint"] != plain.identity.may_differ["data fingerprint"]


def test_a_rank_that_cannot_open_the_index_stops_all_with_the_remedy(process_group, tiny, tmp_path, monkeypatch):
    index = make_index(tiny().rdtf, tmp_path / "run", CPU)
    pickled = pickle.dumps(index)
    # What another rank does: it is handed what rank 0 built, and its node does not have the folder.
    monkeypatch.setattr(data_assembly, "patiently_on_rank_zero", lambda work, beat: pickled)
    assert open_data(tiny(), tmp_path / "run", CPU)[0] == index
    shutil.rmtree(tmp_path / "run" / "index")
    with pytest.raises(UserError, match=r"rank 0 cannot open what rank 0 built: there is no index .*rdtf.data.index_dir") as caught:
        open_data(tiny(), tmp_path / "run", CPU)
    assert caught.value.everywhere and "Every node must see the folder of rdtf.data.index_dir" in str(caught.value)
    monkeypatch.setattr(data_assembly, "gather_objects", lambda fault: [None, "no cache"])
    with pytest.raises(UserError, match="rank 1 cannot open what rank 0 built: no cache"):
        data_assembly._on_every_rank(lambda: 1, "rdtf.memory.cache_dir")


def test_frames_may_be_told_apart_by_a_model(process_group, tiny, tmp_path):
    model = save_model(tmp_path / "clip")
    run = build_run(tiny(f"rdtf.data.frame_features={model}"), 0, 1, CPU)
    features = run.index.frame_features(0)
    assert run.index.settings.features.startswith("clip:") and features.shape == (run.index.frame_counts[0], 12)
    assert np.allclose(np.linalg.norm(features, axis=1), 1, atol=2e-3)
    _, batches = next(run.loader.steps(0))
    assert batches[0].problems == []
    assert run.index.fingerprint != build_run(tiny(folder="plain"), 0, 1, CPU).index.fingerprint
    assert (tmp_path / "run" / "index" / "weights.json").is_file()
    with pytest.raises(EncoderNotFound, match="rdtf.data.frame_features is '.*nowhere'"):
        build_run(tiny(f"rdtf.data.frame_features={tmp_path / 'nowhere'}", folder="third"), 0, 1, CPU)


def test_validation_is_about_held_out_clips_if_there_are_any(process_group, tiny):
    run = build_run(tiny("rdtf.data.validation_fraction=0.4", "rdtf.validation.clips=12"), 0, 1, CPU)
    held = {run.index.caption(clip_id) for clip_id in run.index.held_out}
    assert 2 <= len(run.index.held_out) < 12
    asked = validation_requests(run)
    assert len(asked) == len(run.index.held_out) and {request.prompt for request in asked} <= held
    plain = build_run(tiny("rdtf.validation.clips=12", folder="plain"), 0, 1, CPU)
    assert len(validation_requests(plain)) == 12


def test_an_index_and_a_cache_have_a_folder_each(tiny, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    cached = ("rdtf.memory.encoders=cached", f"rdtf.memory.cache_dir={tmp_path / 'a'}")
    with pytest.raises(UserError, match="rdtf.data.index_dir and rdtf.memory.cache_dir are one folder"):
        make_index(tiny(*cached, f"rdtf.data.index_dir={tmp_path / 'link' / 'a'}").rdtf, tmp_path / "run", CPU)
    assert not (tmp_path / "a").exists()
    within = tiny(*cached, f"rdtf.data.index_dir={tmp_path / 'a' / 'index'}").rdtf
    assert index_folder(within, tmp_path / "run") == tmp_path / "a" / "index"


def of_data(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(("data", "epochs", "plan"))]


@pytest.mark.parametrize("shared", [False, True])
def test_a_dry_run_uses_the_index_that_is_there_and_changes_nothing(tiny, tmp_path, monkeypatch, shared):
    settings = [f"rdtf.data.index_dir={tmp_path / 'shared'}"] if shared else []
    before = files(tmp_path)
    text = describe(tiny(*settings), 1, CPU)
    assert "12 to train on" in text and files(tmp_path) == before and not (tmp_path / "run").exists()
    index = make_index(tiny(*settings).rdtf, tmp_path / "run", CPU)
    before = files(tmp_path)
    monkeypatch.setattr("rdtf_ds.training.dry_run.EXAMINED_AT_MOST", 0)
    # Known clips come from the folder; nothing is decoded.
    monkeypatch.setattr("rdtf_ds.data.indexing.examining.Examiner.rows", lambda *arguments: pytest.fail("examined again"))
    again = describe(tiny(*settings), 1, CPU)
    assert of_data(again) == of_data(text) and len(of_data(text)) > 3
    assert files(tmp_path) == before and index.summary() in text
    (tmp_path / "way").symlink_to(tiny().rdtf.data.data_dir)  # the same folder by another name has the same index
    assert "not indexed yet" not in describe(tiny(*settings, data_dir=tmp_path / "way"), 1, CPU)


def test_a_dry_run_counts_what_is_not_indexed_when_that_would_take_long_or_a_model(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("rdtf_ds.data.indexing.examining.Examiner.rows", lambda *arguments: pytest.fail("examined"))
    monkeypatch.setattr("rdtf_ds.training.dry_run.EXAMINED_AT_MOST", 12)
    text = describe(tiny(), 1, CPU)
    command = f"python tools/index_data.py {tiny().rdtf.data.data_dir} --out {tmp_path / 'run' / 'index'}"
    assert "data            13 of 13 clips are not indexed yet" in text and command in text and "plan            step 0" in text
    monkeypatch.setattr("rdtf_ds.models.frame_encoder.CLIPFrames._load", lambda self: pytest.fail("weights were loaded"))
    before = files(tmp_path)
    model = save_model(tmp_path / "clip")
    monkeypatch.setattr("rdtf_ds.training.dry_run.EXAMINED_AT_MOST", 99)
    assert "13 of 13 clips are not indexed yet" in describe(tiny(f"rdtf.data.frame_features={model}"), 1, CPU)
    assert "13 of 13 clips are not indexed yet" in describe(tiny("rdtf.data.frame_features=some/model"), 1, CPU)
    assert {name: digest for name, digest in files(tmp_path).items() if not name.startswith("clip")} == before


def test_a_dry_run_with_a_model_plans_over_what_is_indexed_without_its_weights(tiny, tmp_path, monkeypatch):
    experiment = tiny(f"rdtf.data.frame_features={save_model(tmp_path / 'clip')}")
    index = make_index(experiment.rdtf, tmp_path / "run", CPU)
    monkeypatch.setattr("rdtf_ds.models.frame_encoder.CLIPFrames._load", lambda self: pytest.fail("weights were loaded"))
    assert index.summary() in describe(experiment, 1, CPU)
