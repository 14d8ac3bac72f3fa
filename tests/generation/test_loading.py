"""A model is loaded onto its device, and what keeps it from there is told."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from rdtf_ds import __version__
from rdtf_ds.errors import UserError
from rdtf_ds.exported_model import model_hash
from rdtf_ds.generation.loading import identity_of, load_pipeline
from rdtf_ds.pipeline import RDTFPipeline
from tests.small_models import make_pipeline, small_dfgn, text_parts


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_pipeline(text_parts(), small_dfgn()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_of_it_is_in_the_format_asked_for(model: Path, dtype: str) -> None:
    pipeline = load_pipeline(model, "cpu", dtype)
    assert {pipeline.unet.dtype, pipeline.vae.dtype} == {getattr(torch, dtype)} and pipeline.device.type == "cpu"


@pytest.mark.parametrize(
    ("dtype", "offload", "remedy"),
    [("float32", False, "Take --dtype float16, --offload"), ("float16", False, "Take --offload"), ("float16", True, "--device cpu")],
)
def test_a_gpu_too_small_is_one_paragraph(model: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, offload: bool, remedy: str) -> None:
    asked = []

    def full(self: RDTFPipeline, *where: str) -> None:
        asked.append(where)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(RDTFPipeline, "enable_model_cpu_offload" if offload else "to", full)
    with pytest.raises(UserError) as told:
        load_pipeline(model, "cuda:1", dtype, offload)
    assert f"'{model}' does not fit into the memory that is free on cuda:1, in {dtype}." in str(told.value) and remedy in str(told.value)
    assert asked == ([()] if offload else [("cuda:1",)])


def test_clips_are_known_by_model_format_and_version(model: Path) -> None:
    assert identity_of(model, "float16") == {"model": model_hash(model), "dtype": "float16", "rdtf_ds": __version__}


def test_what_the_libraries_cannot_use_is_one_paragraph(model: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(model, tmp_path / "model"))
    (damaged / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=rf"'{damaged}' cannot be loaded \(\w+: .*Copy the folder again, or export once more"):
        load_pipeline(damaged, "cpu", "float32")
