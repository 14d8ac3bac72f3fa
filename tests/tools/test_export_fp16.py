"""tools/export_fp16.py as people type it."""

from __future__ import annotations

import json

import pytest
import torch

from tests.small_models import load_tool, small_dfgn, write_run


@pytest.fixture
def export(project_root, typed):
    """Calls the tool; returns exit code, standard output, standard error."""
    return typed(load_tool(project_root, "export_fp16"))


def test_json_is_all_that_stands_on_standard_output(export, tmp_path):
    write_run(tmp_path / "run", small_dfgn(text_width=64), world_size=1)
    code, out, err = export(tmp_path / "run", tmp_path / "out", "--weights", "master", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["step"] == 5 and report["weights"] == "master" and report["folder"] == str(tmp_path / "out")
    assert (tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    code, out, _ = export(tmp_path / "run", tmp_path / "mean")
    assert code == 0 and "step 5 (ema, float16)" in out and "tools/generate.py --model" in out


def test_bad_input_is_one_paragraph_and_exit_code_2(export, tmp_path):
    code, out, err = export(tmp_path / "absent", tmp_path / "out", "--encoders", "clip=somewhere")
    assert code == 2 and out == "" and "is no folder" in err and err.count("\n") == 1
    code, out, err = export(tmp_path, tmp_path / "out", "--encoders", "vae=somewhere")
    assert code == 2 and out == "" and "autoencoder, clip, t5" in err


def test_encoder_sources_reach_the_export(export, tmp_path):
    write_run(tmp_path / "run", small_dfgn(text_width=64), world_size=1)
    code, _, err = export(tmp_path / "run", tmp_path / "out", "--encoders", "autoencoder=haar:2", f"t5={tmp_path / 'absent'}")
    assert code == 2 and str(tmp_path / "absent") in err


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_checked_export_says_how_far_it_is_from_fp32(export, tmp_path, dtype):
    write_run(tmp_path / "run", small_dfgn(text_width=64), world_size=1)
    wanted = ("--weights", "master", "--dtype", dtype, "--half_check")
    code, out, err = export(tmp_path / "run", tmp_path / "out", *wanted, "--max_shard_size", "50KB", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["dtype"] == dtype and report["half_check"]["holds"] and 0 < report["half_check"]["relative_error"] < 0.02
    assert report["gb_per_second"] > 0 and (tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    code, out, _ = export(tmp_path / "run", tmp_path / "told", *wanted)
    assert code == 0 and f"DFGN in {dtype} is off by" in out and "GB/s" in out


def test_an_export_that_fails_its_check_stays_and_is_exit_code_1(export, tmp_path):
    """Every weight fits fp16 and one activation does not."""
    model = small_dfgn(text_width=64)
    with torch.no_grad():
        model.conv_out.weight.fill_(6e4)
    write_run(tmp_path / "run", model, world_size=1)
    code, out, err = export(tmp_path / "run", tmp_path / "out", "--weights", "master", "--half_check")
    assert code == 1 and "overflows" in out, err
    assert (tmp_path / "out" / "model_index.json").is_file()


def test_interrupted_it_says_what_is_there(export, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    write_run(tmp_path / "run", small_dfgn(text_width=64), world_size=1)
    with monkeypatch.context() as patched:
        patched.setattr("rdtf_ds.export.exporting.write_weights", interrupted)
        code, out, err = export(tmp_path / "run", tmp_path / "out")
    assert (code, out, err.splitlines()[-1]) == (130, "", f"Interrupted; nothing of '{tmp_path / 'out'}' was kept.")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    monkeypatch.setattr("rdtf_ds.export.half_check.open_checkpoint", interrupted)
    code, out, err = export(tmp_path / "run", tmp_path / "out", "--half_check")
    assert (code, out, err.splitlines()[-1]) == (130, "", f"Interrupted; '{tmp_path / 'out'}' is whole, but was not checked.")
