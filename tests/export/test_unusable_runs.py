"""Which checkpoint of a run is exported, and runs that are not: diverged, damaged, forged, of another model, not signed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from rdtf_ds.checkpoints.manifest import MANIFEST, CheckpointError, read_key, read_manifest, write_manifest
from rdtf_ds.checkpoints.store import find_step_folder
from rdtf_ds.export.exporting import export
from rdtf_ds.export.weight_files import UnexportableWeight
from tests.export.runs import WIDTH, reseal
from tests.small_models import small_dfgn, write_run


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


@pytest.mark.parametrize("text", ["{", '{"rdtf": {"sampling": {"steps": -1}}}', '{"rdtf": {"samplings": {}}}', "[]"])
def test_an_experiment_that_cannot_be_read_is_named(run, tmp_path, text):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


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
