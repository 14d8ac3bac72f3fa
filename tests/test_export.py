"""Exports of checkpoints laid out as DeepSpeed and the trainer leave them."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save

from rdtf_ds.checkpoints.durable import digest_file
from rdtf_ds.checkpoints.manifest import MANIFEST, CheckpointError, read_key, read_manifest, write_manifest
from rdtf_ds.checkpoints.store import find_step_folder
from rdtf_ds.checkpoints.weights import CheckpointWeights
from rdtf_ds.errors import UserError
from rdtf_ds.export import UnexportableWeight, export, write_fp16
from rdtf_ds.models.missing import EncoderNotFound
from rdtf_ds.pipeline import RDTFPipeline
from tests.small_models import SIDE, small_dfgn, write_run

WIDTH = 64  # of the encoders made on the spot


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, small_dfgn(text_width=WIDTH), world_size=2)
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "model"
    return export(run, out, "master")


def reseal(step: Path, name: str | None = None, **changes: object) -> None:
    """Writes the manifest anew: with the digest of a file a test has changed, or with other entries."""
    manifest = {**read_manifest(step), **changes}
    if name is not None:
        manifest["files"][name] = digest_file(step / name).to_json()
    (step / MANIFEST).unlink()
    write_manifest(step, manifest)


# --- weights


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("weights", "factor"), [("master", 1), ("ema", 2)])
def test_weights_are_the_masters_or_their_mean_cast_to_fp16(tmp_path, world_size, weights, factor):
    model = small_dfgn(text_width=WIDTH)
    step = write_run(tmp_path / "run", model, world_size)
    assert len(CheckpointWeights(step).groups) > 4
    report = export(step, tmp_path / "out", weights)
    written = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    expected = {name: (factor * tensor).half() for name, tensor in model.state_dict().items()}
    assert written.keys() == expected.keys()  # and so no padding
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    assert report.parameters == sum(tensor.numel() for tensor in expected.values()) and report.step == 5


def test_stream_is_what_safetensors_writes():
    tensors = {"a": torch.randn(3, 5), "odd": torch.randn(7), "scalar": torch.tensor(2.5), "none": torch.zeros(0, 4)}
    file = io.BytesIO()
    write_fp16(file, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, tensors.items())
    ours, theirs = load(file.getvalue()), load(save({name: tensor.half() for name, tensor in tensors.items()}))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(("value", "accepted"), [(65504.0, True), (-65504.0, True), (65504.1, False), (-7e4, False)])
def test_values_beyond_fp16_are_refused(value, accepted):
    weight = torch.tensor([1.0, value])
    if accepted:
        write_fp16(io.BytesIO(), {"w": (2,)}, [("w", weight)])
    else:
        with pytest.raises(UnexportableWeight, match=r"block\.w reaches"):
            write_fp16(io.BytesIO(), {"block.w": (2,)}, [("block.w", weight)])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_diverged_checkpoint_is_refused_by_name_and_leaves_nothing(tmp_path, value):
    model = small_dfgn(text_width=WIDTH)
    with torch.no_grad():
        model.conv_norm_out.bias[3] = value
    write_run(tmp_path / "run", model, world_size=2)
    with pytest.raises(UnexportableWeight, match=r"conv_norm_out\.bias holds 1 value"):
        export(tmp_path / "run", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    "parameters", [[("a", torch.zeros(2))], [("b", torch.zeros(3)), ("a", torch.zeros(2))], [("a", torch.zeros(3)), ("b", torch.zeros(3))]]
)
def test_stream_holds_to_what_it_announced(parameters):
    with pytest.raises(ValueError, match="announced"):
        write_fp16(io.BytesIO(), {"a": (2,), "b": (3,)}, parameters)


def test_one_group_at_a_time_is_in_memory(run):
    """A parameter is a view of its group's flat tensor, and the group before is gone when the next one comes."""
    alive: dict[int, weakref.ref] = {}
    for _, tensor in CheckpointWeights(find_step_folder(run)).parameters("master"):
        storage = tensor.untyped_storage()
        alive[storage.data_ptr()] = weakref.ref(tensor._base if tensor._base is not None else tensor)
        del tensor, storage
        assert sum(reference() is not None for reference in alive.values()) <= 2


# --- the folder


def test_folder_loads_offline_without_training_code(exported, tmp_path):
    script = (
        "import sys, numpy\n"
        "sys.modules |= dict.fromkeys(('deepspeed', 'bitsandbytes'))  # as if not installed: importing them raises\n"
        "from rdtf_ds.pipeline import RDTFPipeline\n"
        "pipeline = RDTFPipeline.from_pretrained(sys.argv[1], local_files_only=True)\n"
        "numpy.save(sys.argv[2], pipeline('a red star', seeds=[3]).frames)\n"
        "heavy = {'decord', 'faiss', 'av', 'rdtf_ds.training', 'tensorboard'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script, exported.folder, str(tmp_path / "clip.npy")], check=True, timeout=120)
    pipeline = RDTFPipeline.from_pretrained(exported.folder)
    pipeline.set_progress_bar_config(disable=True)
    assert np.array_equal(np.load(tmp_path / "clip.npy"), pipeline("a red star", seeds=[3]).frames)
    half = RDTFPipeline.from_pretrained(exported.folder, torch_dtype=torch.float16)
    expected = {name: tensor.half() for name, tensor in small_dfgn(text_width=WIDTH).state_dict().items()}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in half.unet.state_dict().items())


def test_folder_keeps_the_run_settings(exported):
    pipeline = RDTFPipeline.from_pretrained(exported.folder)
    assert (pipeline.config.image_size, pipeline.config.steps, pipeline.config.eta) == (SIDE, 2, 0.5)
    assert (pipeline.config.text_scale, pipeline.config.max_frames) == (7.5, 8)
    scheduler = pipeline.scheduler.config
    assert (scheduler.beta_schedule, scheduler.beta_start, scheduler.beta_end) == ("scaled_linear", 0.00085, 0.012)
    assert (scheduler.prediction_type, scheduler.clip_sample) == ("epsilon", False)
    assert pipeline.unet.config.attention_backend == "auto"  # trained with another one
    assert type(pipeline.vae).__name__ == "HaarAutoencoder" and pipeline.vae.config.factor == 2


def test_model_card_says_where_the_model_comes_from(exported):
    card = (Path(exported.folder) / "README.md").read_text()
    assert card.startswith("---\n") and "$" not in card
    for fact in ("5 attempted, 4 applied", f"{exported.parameters:,}", "scaled_linear", "haar:2", "32 synthetic stickers", "16 × 16"):
        assert fact in card
    assert exported.bytes == sum(path.stat().st_size for path in Path(exported.folder).rglob("*") if path.is_file())


def test_other_encoder_sources_take_the_place_of_the_runs(run, tmp_path):
    with pytest.raises(EncoderNotFound, match="absent"):
        export(run, tmp_path / "out", encoders={"clip": str(tmp_path / "absent")})
    assert not any(tmp_path.iterdir())


# --- refusals


def test_out_must_be_free(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        export(run, tmp_path / "file")
    with pytest.raises(UserError, match="not empty"):
        export(run, tmp_path)
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    export(run, tmp_path / "empty")
    assert (tmp_path / "empty" / "model_index.json").is_file()


def test_newest_complete_step_of_a_run_is_taken(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    steps = folder / "checkpoints"
    first = steps / "step00000005-0001"
    (steps / "step00000009-0004").mkdir()  # no manifest: never complete
    shutil.copytree(first, steps / "step00000012-0005.partial")
    shutil.copytree(first, steps / "step00000007-0003")
    shutil.copytree(first, steps / "step00000008-0002")
    assert find_step_folder(folder) == find_step_folder(steps) == steps / "step00000007-0003"
    assert find_step_folder(first) == first


def test_folders_without_a_checkpoint_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        find_step_folder(tmp_path)
    with pytest.raises(CheckpointError, match="is no folder"):
        find_step_folder(tmp_path / "absent")


@pytest.mark.parametrize(
    ("weights", "name"), [("master", "zero_pp_rank_1_mp_rank_00_optim_states.pt"), ("ema", "ema_rank0001.safetensors")]
)
def test_damaged_and_missing_shards_are_refused(run, tmp_path, weights, name):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    shard = find_step_folder(folder) / name
    whole = bytearray(shard.read_bytes())
    whole[len(whole) // 2] ^= 1  # one flipped bit
    shard.write_bytes(bytes(whole))
    with pytest.raises(CheckpointError, match="changed or damaged"):
        export(folder, tmp_path / "out", weights)
    shard.write_bytes(bytes(whole[:100]))
    reseal(shard.parent, name)
    with pytest.raises(CheckpointError, match=name):
        export(folder, tmp_path / "out", weights)
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"has no {name}"):
        export(folder, tmp_path / "out", weights)
    assert not (tmp_path / "out").exists()


class Payload:
    """Runs code when unpickled carelessly."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_a_shard_cannot_run_code(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    name = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    step = find_step_folder(folder)
    torch.save({"optimizer_state_dict": Payload(tmp_path / "ran")}, step / name)
    reseal(step, name)
    with pytest.raises(CheckpointError, match="no shard"):
        export(folder, tmp_path / "out", "master")
    assert not (tmp_path / "ran").exists()


def test_shards_of_another_model_are_refused(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    step = find_step_folder(folder)
    reseal(step, model={**read_manifest(step)["model"], "block_out_channels": [16, 48]})
    with pytest.raises(CheckpointError, match="does not hold the model"):
        export(folder, tmp_path / "out")
    (step / "MANIFEST.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be used"):
        export(folder, tmp_path / "out")


def test_shards_too_short_for_their_parameters_are_refused(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    step = find_step_folder(folder)
    name = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    state = torch.load(step / name, weights_only=False)
    groups = state["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    groups[0] = groups[0].detach()[:-768].clone()
    torch.save(state, step / name)
    reseal(step, name)
    with pytest.raises(CheckpointError, match="not of one save"):
        export(folder, tmp_path / "out", "master")


def test_a_signed_run_is_exported_only_with_its_signature(run, tmp_path):
    folder, key = tmp_path / "run", tmp_path / "key"
    shutil.copytree(run, folder)
    key.write_text("a secret of enough bytes")
    config = json.loads((folder / "config.json").read_text())
    config["rdtf"]["checkpoint"] = {"key_file": str(key)}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="not signed with the key"):
        export(folder, tmp_path / "out", "master")
    step = find_step_folder(folder)
    manifest = read_manifest(step)
    (step / MANIFEST).unlink()
    write_manifest(step, manifest, read_key(key))
    assert export(folder, tmp_path / "out", "master").step == 5
