"""Folders of which something is missing or damaged are refused by name before anything is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import ByT5Tokenizer

from rdtf_ds.errors import UserError
from rdtf_ds.exported_model import PARTS, check_model, model_hash
from rdtf_ds.generation.model_outline import ModelOutline
from rdtf_ds.pipeline import RDTFPipeline
from tests.small_models import make_pipeline, small_dfgn, text_parts

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "whole"
    make_pipeline(text_parts(), small_dfgn()).save_pretrained(folder)
    return folder


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def refused(model: Path, message: str) -> None:
    for call in (check_model, RDTFPipeline.from_pretrained):
        with pytest.raises(UserError, match=message):
            call(model)


def test_a_whole_model_passes(whole):
    check_model(whole)
    index = json.loads((whole / "model_index.json").read_text())
    assert set(PARTS) == {name for name, value in index.items() if isinstance(value, list)} - {"background"}


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_named(model, part):
    shutil.rmtree(model / part)
    refused(model, f"lacks its part {part}: .*Copy the folder again, or export once more: python tools/export_fp16.py")
    check_model(model, given=[part])


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_or_garbled_description_is_named(model, part):
    file = model / part / PARTS[part][0]
    file.write_text("{")
    refused(model, f"{part}/{PARTS[part][0]}' cannot be read")
    file.write_text("[]")
    refused(model, "no JSON object")
    file.unlink()
    refused(model, f"{part}/{PARTS[part][0]}' is missing")


@pytest.mark.parametrize("part", [part for part, (_, weights) in PARTS.items() if weights])
def test_missing_and_damaged_weights_are_named(model, part):
    (file,) = (model / part).glob("*.safetensors")
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:100], b"", whole + b"\0", b"\xff" * len(whole), whole[:8] + b"x" + whole[9:]):
        file.write_bytes(damaged)
        refused(model, rf"{part}/{file.name}' \({len(damaged)} bytes\) are cut short or damaged")
    file.unlink()
    refused(model, f"{part}' has no weights")


def shard(model: Path) -> dict[str, str]:
    """The U-Net's weights in two files with an index, as diffusers writes what is large."""
    tensors = load_file(model / UNET)
    (model / UNET).unlink()
    names = sorted(tensors)
    files = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    where = {name: files[position % 2] for position, name in enumerate(names)}
    for file in files:
        save_file({name: tensors[name] for name in names if where[name] == file}, model / "unet" / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": where}
    (model / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return where


def test_sharded_weights(model):
    where = shard(model)
    check_model(model)
    RDTFPipeline.from_pretrained(model)
    second = model / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[:-4])
    refused(model, "00002-of-00002.safetensors.* cut short or damaged")
    tensors = load_file(model / "unet" / "diffusion_pytorch_model-00001-of-00002.safetensors")
    save_file(tensors, second)  # a whole file, but the wrong one
    refused(model, f"lacks {min(name for name, file in where.items() if file == second.name)}, which the index")
    second.unlink()
    refused(model, "00002-of-00002.safetensors' are missing")
    outside = model / "outside.safetensors"
    save_file({"x": tensors["conv_in.weight"] if "conv_in.weight" in tensors else next(iter(tensors.values()))}, outside)
    for where in ({}, {"x": 3}, {"x": "../outside.safetensors"}, {"x": str(outside)}, {"x": ".."}, {"x": ""}, {"x": ["a"]}, [3], None):
        index = json.dumps({"weight_map": where})
        (model / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
        refused(model, "names no shards")


def test_shards_without_their_index_are_named(model):
    shard(model)
    (model / "unet" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    refused(model, "unet' lacks diffusion_pytorch_model.safetensors.index.json, which says .*Copy the folder again")


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
def test_a_tokenizer_without_its_words_is_named(model, part):
    """transformers loads it, and then every word is the unknown one."""
    file = model / part / "tokenizer.json"
    content = file.read_text()
    file.write_text(content[: len(content) // 2])
    refused(model, f"{part}/tokenizer.json' cannot be read: .*Copy the folder again")
    file.unlink()
    (model / part / "special_tokens_map.json").write_text("{}")
    refused(model, f"{part}' has no vocabulary .*so no caption could be read. Copy the folder again")
    (model / part / "spiece.model").write_bytes(b"words")
    check_model(model)


def test_a_tokenizer_of_bytes_needs_no_words(model):
    shutil.rmtree(model / "tokenizer_2")
    ByT5Tokenizer().save_pretrained(str(model / "tokenizer_2"))
    check_model(model)


def test_weights_of_another_network_are_refused_and_not_filled_up_with_random_ones(model):
    tensors = load_file(model / UNET)
    removed = tensors.pop("conv_in.weight")
    save_file(tensors, model / UNET)
    refused(model, "conv_in.weight is absent in the file and")
    save_file(tensors | {"conv_in.weight": removed[1:]}, model / UNET)
    refused(model, r"conv_in.weight is \(15, 24, 3, 3\) in the file and \(16, 24, 3, 3\) in the model")
    save_file(tensors | {"conv_in.weight": removed, "more": removed.clone()}, model / UNET)
    refused(model, "more is .* in the file and absent in the model")
    config = json.loads((model / "unet/config.json").read_text())
    (model / "unet/config.json").write_text(json.dumps(config | {"sti_kernel_size": "wide"}))
    refused(model, "unet/config.json' describes no DFGN|not those of the model")
    for key, value in (("sti_kernel_size", "wide"), ("context_dim", -1), ("head_channels", 0)):
        (model / "unet/config.json").write_text(json.dumps(config | {key: value}))
        refused(model, "unet/config.json' describes no DFGN")


def test_other_folders_are_no_models(model, tmp_path):
    refused(tmp_path / "nothing", "no exported model: it has no model_index.json")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionPipeline"}))
    refused(model, "names the pipeline StableDiffusionPipeline")


@pytest.mark.parametrize(
    ("file", "values", "told"),
    [
        ("model_index.json", {"max_frames": None, "image_size": 0, "eta": "x", "background": [1, 2], "steps": True}, "has {}"),
        ("scheduler/scheduler_config.json", {"beta_start": "x", "beta_schedule": "x", "num_train_timesteps": -1}, "no DDIMScheduler"),
    ],
)
def test_a_description_of_odd_values_is_told(model, file, values, told):
    original = json.loads((model / file).read_text())
    assert ModelOutline(model).config.max_frames == 8
    for key, value in values.items():
        (model / file).write_text(json.dumps(original | {key: value}))
        with pytest.raises(UserError, match=f"{told.format(key)}.*Export the model once more"):
            ModelOutline(model)


def test_the_hash_names_what_is_in_the_folder(model, whole, tmp_path):
    first = model_hash(whole)
    assert len(first) == 16 and int(first, 16) >= 0 and model_hash(model) == first
    (model / "README.md").write_text("a card")
    assert model_hash(model) == first
    seen = {first}
    for name in (UNET, "vae/config.json", "tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json", "model_index.json"):
        file = model / name
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        seen.add(model_hash(model))
        file.write_bytes(content)
    assert len(seen) == 6 and model_hash(model) == first
    (model / UNET).rename(model / "unet/other.safetensors")
    assert model_hash(model) not in seen
    with pytest.raises(UserError, match="cannot be read as an exported model"):
        model_hash(tmp_path / "nothing")
