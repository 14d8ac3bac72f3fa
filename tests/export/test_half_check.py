"""The question asked of an exported model, and what is said of its answer."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import rdtf_ds.export.half_check as checking
from rdtf_ds.errors import UserError
from rdtf_ds.export.exporting import export
from rdtf_ds.export.half_check import BARS, compare, half_check, seeded_question
from rdtf_ds.export.weight_files import DTYPES, WEIGHTS_FILE
from tests.small_models import small_dfgn, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, small_dfgn(text_width=64), world_size=1)
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sound_export_holds_and_the_error_is_that_of_its_dtype(run, tmp_path, dtype):
    export(run, tmp_path / "out", "master", dtype=dtype)
    check = half_check(run, tmp_path / "out", "master", dtype)
    assert check.holds and check.nonfinite == 0 and check.values > 1000 and "holds" in str(check)
    floor = {"float16": 2**-13, "bfloat16": 2**-10, "float32": 0.0}[dtype]
    assert floor <= check.relative_error < BARS[dtype] / 3  # fp32 against itself: exactly the same


def test_other_weights_than_were_exported_miss_the_bar(run, tmp_path):
    export(run, tmp_path / "out", "ema")  # twice the masters
    assert half_check(run, tmp_path / "out", "ema", "float16").holds
    missed = half_check(run, tmp_path / "out", "master", "float16")
    assert not missed.holds and missed.relative_error > 0.1 and "MISSED" in str(missed)


def test_an_activation_beyond_fp16_is_found_though_every_weight_fits(run, tmp_path):
    export(run, tmp_path / "out", "master")
    path = tmp_path / "out" / "unet" / WEIGHTS_FILE
    weights = load_file(path)
    weights["conv_out.weight"] = torch.full_like(weights["conv_out.weight"], 6e4)
    save_file(weights, path)
    check = half_check(run, tmp_path / "out", "master", "float16")
    assert not check.holds and check.nonfinite > 0 and check.relative_error is None and "overflows" in str(check)


def test_a_gpu_that_is_busy_is_no_failed_check(run, tmp_path, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    export(run, tmp_path / "out", "master")
    monkeypatch.setattr(checking, "_answer", full)
    with pytest.raises(UserError, match=f"'{tmp_path / 'out'}' is whole, but was not checked: .*CUDA_VISIBLE_DEVICES="):
        half_check(run, tmp_path / "out", "master", "float16")


def test_the_question_is_the_same_every_time_and_spans_the_timesteps():
    config = small_dfgn().config
    sample, timesteps, text = seeded_question(config, 8, 1000)
    again, _, text_again = seeded_question(config, 8, 1000)
    assert torch.equal(sample, again) and all(torch.equal(a, b) for a, b in zip(text, text_again, strict=True))
    assert sample.shape == (3, config.in_channels, 8, 4, 4) and timesteps.tolist() == [0, 500, 999]
    assert 0.9 < float(sample.std()) < 1.1 and text.clip.shape == (3, 77, config.clip_dim)


@pytest.mark.parametrize(("factor", "error"), [(1.0, 0.0), (1.01, 0.01), (0.0, 1.0), (-1.0, 2.0)])
def test_the_error_is_relative_to_fp32(factor, error):
    expected = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).double()
    assert compare(factor * expected, expected, "float16").relative_error == pytest.approx(error, abs=1e-12)


def test_answers_of_zeros_and_numbers_that_are_none():
    zeros = torch.zeros(6)
    assert compare(zeros, zeros, "float16").holds  # never trained: conv_out starts at zero
    assert not compare(zeros + 1e-3, zeros, "bfloat16").holds
    check = compare(torch.tensor([float("nan"), 1.0, float("inf")]), torch.ones(3), "float16")
    assert (check.nonfinite, check.values, check.relative_error, check.holds) == (2, 3, None, False)
    assert str(check).startswith("2 of 3 values")
