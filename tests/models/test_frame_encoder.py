"""Frames described by CLIP: which numbers, of which model, and what is said when there is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from rdtf_ds.models import frame_encoder
from rdtf_ds.models.frame_encoder import CLIPFrames
from rdtf_ds.models.local_weights import KnownHashes
from rdtf_ds.models.missing import EncoderNotFound

CPU, SIZE, DIM = torch.device("cpu"), 16, 12


def save_model(folder: Path, seed: int = 0, **processing: object) -> Path:
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPVisionConfig(image_size=SIZE, patch_size=8, projection_dim=DIM, **shape)
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    if processing:
        (folder / "preprocessor_config.json").write_text(json.dumps(processing))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("clip") / "model")


def frames(count: int = 70) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)


@pytest.mark.parametrize("processing", [{}, {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}])
def test_features_are_those_of_the_model_normalised_by_its_constants(tmp_path, processing):
    folder = save_model(tmp_path, **processing)
    describe = CLIPFrames(str(folder), CPU)
    described = describe(frames())
    assert described.shape == (70, DIM) == (70, describe.dim) and described.dtype == np.float16 and describe.size == SIZE
    # https://github.com/openai/CLIP, clip.py, _transform: what CLIPImageProcessor takes where nothing else is said
    mean = processing.get("image_mean", [0.48145466, 0.4578275, 0.40821073])
    deviation = processing.get("image_std", [0.26862954, 0.26130258, 0.27577711])
    pixels = torch.from_numpy((frames() / 255 - mean) / deviation).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        expected = CLIPVisionModelWithProjection.from_pretrained(folder)(pixel_values=pixels).image_embeds
    expected = expected / expected.norm(dim=1, keepdim=True)
    assert np.abs(described.astype(np.float32) - expected.numpy()).max() < 2e-3
    assert np.allclose(np.linalg.norm(described.astype(np.float32), axis=1), 1, atol=2e-3)


def test_the_identity_is_of_weights_and_constants_not_of_the_place(model, tmp_path):
    shutil.copytree(model, tmp_path / "copy" / "image_encoder")
    same = CLIPFrames(str(tmp_path / "copy"), CPU).identity
    assert same == CLIPFrames(str(model), CPU).identity
    others = [save_model(tmp_path / "a", seed=1), save_model(tmp_path / "b", image_mean=[0, 0, 0])]
    assert len({same, *(CLIPFrames(str(other), CPU).identity for other in others)}) == 3


def test_weights_are_loaded_only_for_frames(model, monkeypatch):
    monkeypatch.setattr(frame_encoder, "load_whole", lambda *arguments, **more: pytest.fail("loaded"))
    describe = CLIPFrames(str(model), CPU)
    assert describe.dim == DIM
    with pytest.raises(pytest.fail.Exception, match="loaded"):
        describe(frames(1))


def test_the_hash_is_remembered(model, tmp_path, monkeypatch):
    first = CLIPFrames(str(model), CPU, KnownHashes(tmp_path))
    monkeypatch.setattr("rdtf_ds.models.local_weights.hashlib.file_digest", lambda *arguments: pytest.fail("hashed again"))
    assert CLIPFrames(str(model), CPU, KnownHashes(tmp_path)).identity == first.identity


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda folder: shutil.rmtree(folder), "neither a folder nor a hub id"),
        (lambda folder: (folder / "model.safetensors").unlink(), "loading it fails"),
        (lambda folder: (folder / "config.json").write_text("{"), "loading it fails"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "t5"}'), "not a CLIP model"),
        (lambda folder: (folder / "preprocessor_config.json").write_text('{"image_std": [0, 1, 1]}'), "image_mean and image_std must be"),
        (lambda folder: (folder / "preprocessor_config.json").write_text("["), "preprocessor_config.json' cannot be used"),
    ],
)
def test_what_is_no_clip_model_is_a_users_error(model, tmp_path, change, told):
    folder = tmp_path / "broken"
    shutil.copytree(model, folder)
    change(folder)
    with pytest.raises(EncoderNotFound, match=told) as caught:
        CLIPFrames(str(folder), CPU)
    assert "rdtf.data.frame_features is " in str(caught.value)
