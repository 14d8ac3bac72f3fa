"""What an exported folder holds: the weights of a checkpoint laid out as DeepSpeed and the trainer leave it, and the run's settings."""

from __future__ import annotations

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

from rdtf_ds import __version__
from rdtf_ds.checkpoints.durable import digest_file
from rdtf_ds.checkpoints.store import find_step_folder
from rdtf_ds.checkpoints.weights import CheckpointWeights
from rdtf_ds.errors import UserError
from rdtf_ds.export.exporting import RECORD, export
from rdtf_ds.pipeline import RDTFPipeline
from tests.export.runs import WIDTH
from tests.small_models import SIDE, small_dfgn, write_run

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


@pytest.mark.parametrize(("named", "words"), [({"dtype": "int8"}, "dtype is 'int8'"), ({"max_shard_size": "5 apples"}, "max_shard_size")])
def test_no_such_dtype_or_size(run, tmp_path, named, words):
    with pytest.raises(UserError, match=words):
        export(run, tmp_path / "out", **named)
    assert not any(tmp_path.iterdir())


def test_a_parameter_is_a_copy_that_holds_no_more_than_itself(run):
    """Neither its group nor the mapped file lives on with it."""
    for _, tensor in CheckpointWeights(find_step_folder(run)).parameters("master"):
        assert tensor._base is None or tensor._base.numel() == tensor.numel()
        assert tensor.untyped_storage().nbytes() == 4 * tensor.numel()


def test_speed_is_that_of_the_fp32_weights(exported):
    assert exported.seconds > 0
    assert exported.gb_per_second == pytest.approx(4 * exported.parameters / 1e9 / exported.seconds)


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


def test_folder_keeps_the_run_settings(exported):
    pipeline = RDTFPipeline.from_pretrained(exported.folder)
    assert (pipeline.config.image_size, pipeline.config.steps, pipeline.config.eta) == (SIDE, 2, 0.5)
    assert (pipeline.config.text_scale, pipeline.config.max_frames) == (7.5, 8)
    scheduler = pipeline.scheduler.config
    assert (scheduler.beta_schedule, scheduler.beta_start, scheduler.beta_end) == ("scaled_linear", 0.00085, 0.012)
    assert (scheduler.prediction_type, scheduler.clip_sample) == ("epsilon", False)
    assert pipeline.unet.config.attention_backend == "auto"  # trained with another one
    assert type(pipeline.vae).__name__ == "HaarAutoencoder" and pipeline.vae.config.factor == 2


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
    assert record["rdtf_ds"] == __version__, "also where the package is run from its sources"


def test_model_card_says_where_the_model_comes_from(exported):
    card = (Path(exported.folder) / "README.md").read_text()
    assert card.startswith("---\n") and "$" not in card
    for fact in ("5 attempted, 4 applied", f"{exported.parameters:,}", "scaled_linear", "haar:2", "32 synthetic stickers", "16 × 16"):
        assert fact in card
    assert exported.bytes == sum(path.stat().st_size for path in Path(exported.folder).rglob("*") if path.is_file())
