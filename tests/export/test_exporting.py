"""Exports of checkpoints laid out as DeepSpeed and the trainer leave them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTokenizer, T5EncoderModel

from rdtf_ds.checkpoints.durable import digest_file
from rdtf_ds.checkpoints.manifest import MANIFEST, CheckpointError, read_key, read_manifest, write_manifest
from rdtf_ds.checkpoints.store import find_step_folder
from rdtf_ds.checkpoints.weights import CheckpointWeights
from rdtf_ds.errors import UserError
from rdtf_ds.export import exporting, frozen_parts, weight_files
from rdtf_ds.export.exporting import RECORD, export
from rdtf_ds.export.weight_files import UnexportableWeight, write_weights
from rdtf_ds.models.missing import EncoderNotFound
from rdtf_ds.models.tiny_encoders import write_tiny_encoders
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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_diverged_checkpoint_is_refused_by_name_and_leaves_nothing(tmp_path, value):
    model = small_dfgn(text_width=WIDTH)
    with torch.no_grad():
        model.conv_norm_out.bias[3] = value
    write_run(tmp_path / "run", model, world_size=2)
    with pytest.raises(UnexportableWeight, match=r"conv_norm_out\.bias holds 1 value"):
        export(tmp_path / "run", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_parameter_is_a_copy_that_holds_no_more_than_itself(run):
    """Neither its group nor the mapped file lives on with it."""
    for _, tensor in CheckpointWeights(find_step_folder(run)).parameters("master"):
        assert tensor._base is None or tensor._base.numel() == tensor.numel()
        assert tensor.untyped_storage().nbytes() == 4 * tensor.numel()


# --- the folder


OFFLINE = """
import socket, sys, numpy

def refuse(*arguments, **named):
    raise AssertionError(f"the network was asked: {arguments}")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

absent = ("deepspeed", "bitsandbytes")
sys.meta_path.insert(0, Absent())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] in absent else real(name, package)
from rdtf_ds.pipeline import RDTFPipeline
pipeline = RDTFPipeline.from_pretrained(sys.argv[1])
numpy.save(sys.argv[2], pipeline("a red star", seeds=[3]).frames)
heavy = {"decord", "faiss", "av", "rdtf_ds.training", "tensorboard", *absent} & set(sys.modules)
assert not heavy, heavy
"""


def test_folder_loads_without_a_network_deepspeed_and_bitsandbytes(exported, tmp_path):
    """Not offline by a switch: the hub may be asked, and any attempt to connect ends the script."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    command = [sys.executable, "-c", OFFLINE, exported.folder, str(tmp_path / "clip.npy")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    pipeline = RDTFPipeline.from_pretrained(exported.folder)
    pipeline.set_progress_bar_config(disable=True)
    assert np.array_equal(np.load(tmp_path / "clip.npy"), pipeline("a red star", seeds=[3]).frames)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_every_dtype_and_sharding_loads_to_the_same_weights(run, tmp_path, dtype, max_shard_size):
    report = export(run, tmp_path / "out", "master", dtype=dtype, max_shard_size=max_shard_size)
    stored = getattr(torch, dtype)
    expected = {name: tensor.to(stored) for name, tensor in small_dfgn(text_width=WIDTH).state_dict().items()}
    unet = RDTFPipeline.from_pretrained(tmp_path / "out", torch_dtype=stored).unet
    assert unet.dtype == stored and report.dtype == dtype
    assert all(torch.equal(tensor, expected[name]) for name, tensor in unet.state_dict().items())
    plain = RDTFPipeline.from_pretrained(tmp_path / "out").unet  # without a word, fp32 stays fp32
    assert plain.dtype == torch.float32
    assert all(torch.equal(tensor, expected[name].float()) for name, tensor in plain.state_dict().items())
    shards = list((tmp_path / "out" / "unet").glob("*.safetensors"))
    assert (len(shards) > 3) == (max_shard_size == "20KB")
    assert any((tmp_path / "out" / "text_encoder_2").glob("*.index.json")) == (max_shard_size == "20KB")


def test_the_sampler_and_the_frame_time_of_the_run_go_with_the_model(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    config = json.loads((folder / "config.json").read_text())
    config["rdtf"]["sampling"] |= {"sampler": "dpm++", "frame_ms": 70}
    (folder / "config.json").write_text(json.dumps(config))
    export(folder, tmp_path / "out", "master")
    pipeline = RDTFPipeline.from_pretrained(tmp_path / "out")
    assert type(pipeline.scheduler).__name__ == "DPMSolverMultistepScheduler" and pipeline.config.frame_ms == 70
    assert pipeline.scheduler.config.beta_schedule == "scaled_linear"
    assert "DPM-Solver++" in (tmp_path / "out" / "README.md").read_text()


def test_record_names_every_file_and_where_it_comes_from(run, exported):
    folder = Path(exported.folder)
    record = json.loads((folder / RECORD).read_text())
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {RECORD}
    assert record["files"].keys() == present
    assert all(digest == digest_file(folder / name).to_json() for name, digest in record["files"].items())
    step = find_step_folder(run)
    assert (record["checkpoint"], record["step"], record["applied_steps"]) == (step.name, 5, 4)
    assert (record["weights"], record["dtype"], record["parameters"]) == ("master", "float16", exported.parameters)
    assert record["config"]["encoders"]["autoencoder"] == "haar:2" and record["config"]["sampling"]["eta"] == 0.5
    assert record["model"]["block_out_channels"] == [16, 32]


def test_speed_is_that_of_the_fp32_weights(exported):
    assert exported.seconds > 0
    assert exported.gb_per_second == pytest.approx(4 * exported.parameters / 1e9 / exported.seconds)


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


def test_frozen_parts_pass_one_at_a_time(run, tmp_path, monkeypatch):
    """When the next one is loaded, and when DFGN's turn comes, the one before has given its weights up."""
    loaded: list[torch.nn.Module] = []

    def all_let_go() -> bool:
        return all(parameter.is_meta for model in loaded for parameter in model.parameters())

    def spied(load):
        def call(*arguments):
            assert all_let_go(), "two parts at once"
            part = load(*arguments)
            loaded.append(part[0] if isinstance(part, tuple) else part.vae)
            return part

        return call

    def write_last(*arguments):
        assert len(loaded) == 3 and all_let_go(), "a frozen part beside DFGN's weights"
        return write_weights(*arguments)

    for name in ("load_autoencoder", "load_clip", "load_t5"):
        monkeypatch.setattr(frozen_parts, name, spied(getattr(frozen_parts, name)))
    monkeypatch.setattr(exporting, "write_weights", write_last)
    export(run, tmp_path / "out")
    assert (tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors").is_file()


def test_sharded_sources_of_frozen_parts_are_read(run, tmp_path):
    write_tiny_encoders(tmp_path / "whole", WIDTH)
    sharded = tmp_path / "t5" / "text_encoder_2"
    T5EncoderModel.from_pretrained(tmp_path / "whole" / "text_encoder_2").save_pretrained(sharded, max_shard_size="30KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    shutil.copytree(tmp_path / "whole" / "tokenizer_2", tmp_path / "t5" / "tokenizer_2")
    export(run, tmp_path / "out", encoders={"t5": str(tmp_path / "t5")})
    given, kept = (T5EncoderModel.from_pretrained(tmp_path / name / "text_encoder_2").state_dict() for name in ("whole", "out"))
    assert given.keys() == kept.keys() and all(torch.equal(given[name], kept[name]) for name in given)


# --- refusals


@pytest.mark.parametrize(
    ("encoders", "words"),
    [
        ({"autoencoder": "haar:4"}, r"encoders\.autoencoder is 'haar:4', which has 48 latent channels.* trained with 12"),
        ({"clip": "tiny:32"}, r"encoders\.clip is 'tiny:32', which has 32 features a token.* trained with 64"),
        ({"t5": "tiny:128"}, r"encoders\.t5 is 'tiny:128', which has 128 features a token.* trained with 64"),
    ],
)
def test_frozen_parts_that_do_not_fit_the_model_are_refused(run, tmp_path, encoders, words):
    with pytest.raises(UserError, match=words):
        export(run, tmp_path / "out", encoders=encoders)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("named", "words"), [({"dtype": "int8"}, "dtype is 'int8'"), ({"max_shard_size": "5 apples"}, "max_shard_size")])
def test_no_such_dtype_or_size(run, tmp_path, named, words):
    with pytest.raises(UserError, match=words):
        export(run, tmp_path / "out", **named)
    assert not any(tmp_path.iterdir())


def test_a_disk_that_is_full_when_the_weights_come_leaves_nothing(run, tmp_path, monkeypatch):
    def write_some(path, fill):
        path.write_bytes(b"begun")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(weight_files, "write_file", write_some)
    with pytest.raises(UserError, match="cannot write .*No space left on device.*make room"):
        export(run, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_tokenizer_that_cannot_be_written_is_named(run, tmp_path, monkeypatch):
    def refuse(self, folder, **named):
        raise Exception("No space left on device (os error 28)")  # as the tokenizers library says it

    monkeypatch.setattr(CLIPTokenizer, "save_pretrained", refuse)
    with pytest.raises(UserError, match=r"cannot write .*tokenizer': No space left.*make room"):
        export(run, tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["{", '{"rdtf": {"sampling": {"steps": -1}}}', '{"rdtf": {"samplings": {}}}', "[]"])
def test_an_experiment_that_cannot_be_read_is_named(run, tmp_path, text):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


FULL = """
import resource, sys
from rdtf_ds.export.exporting import export
from rdtf_ds.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
try:
    export(sys.argv[1], sys.argv[2])
except UserError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.parametrize("limit", [500, 100_000])
def test_a_disk_that_fills_up_leaves_nothing_half_written(run, tmp_path, limit):
    """No file may grow beyond so many bytes: the first config, or the text encoder's weights, written by libraries in their own way."""
    command = [sys.executable, "-c", FULL, str(run), str(tmp_path / "out"), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "cannot write" in done.stdout and "make room" in done.stdout
    assert not any(tmp_path.iterdir())


def test_what_killed_exports_left_is_removed(run, tmp_path, capsys):
    """Of this folder's exports, and only of those that have ended."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    alive = os.getppid()
    names = [f".out.{number}.partial" for number in (ended.pid, os.getpid(), alive, 1)] + [
        ".out.x.partial",
        ".other.999.partial",
        ".out.-1.partial",
    ]
    for name in names:
        (tmp_path / name / "unet").mkdir(parents=True)
    export(run, tmp_path / "out", "master")
    assert {path.name for path in tmp_path.iterdir()} == {"out", *names[2:]}
    said = capsys.readouterr().err
    assert said.count("Removed ") == 2 and f"Removed '{tmp_path / names[0]}', which an export that was killed had left." in said


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
