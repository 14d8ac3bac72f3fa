"""The checkpoint that is measured is one, and the figures are what they are called."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from safetensors.torch import load_file

from rdtf_ds.benchmarks import export as benchmark
from rdtf_ds.checkpoints.manifest import flaw_of, read_manifest
from rdtf_ds.checkpoints.weights import CheckpointWeights, ema_name, shard_path
from rdtf_ds.experiment import load_experiment
from rdtf_ds.training.shard_files import read_shard


@pytest.fixture(scope="module")
def experiment(project_root):
    return load_experiment(project_root / "ds_configs" / "tiny_cpu.json", ["rdtf.ema.enabled=true"])


def test_the_checkpoint_is_whole_and_holds_what_a_run_s_holds(tmp_path, experiment):
    step = benchmark.write_checkpoint(tmp_path / "run", experiment)
    manifest = read_manifest(step)
    assert flaw_of(step, manifest) is None
    content = read_shard(shard_path(step, 0))["optimizer_state_dict"]
    masters, moments = content["single_partition_of_fp32_groups"], content["base_optimizer_state"]["state"]
    assert [flat.numel() for flat in masters] == [group["numel"] for group in manifest["groups"]]
    for number, group in enumerate(manifest["groups"]):
        kept = moments[number][benchmark.QUANT]["state1"]
        assert kept.numel() == group["numel"] and kept.dtype == (torch.uint8 if group["bits"] == 8 else torch.float32)
    mean = load_file(step / ema_name(0))
    first = CheckpointWeights(step).groups[0]
    for weights, flat in (("master", masters[0]), ("ema", mean[first.name])):
        name, tensor = next(CheckpointWeights(step).parameters(weights))
        assert name == first.parameters[0][0] and torch.equal(tensor.flatten(), flat[: tensor.numel()]) and tensor.std() > 0.01


def test_memory_and_speed_stand_beside_the_fp16_size_and_the_copy():
    measured = {"parameters": 10**9, "VmHWM": 10**9, "gb_per_second": 0.5, "seconds": 8.0}
    memory, speed, seconds = benchmark._rows("ema", 4 * 10**9, 2.0, measured, 1.3)
    assert (memory.value, memory.ratio, memory.bar, memory.holds) == (1.0, 0.5, 1.3, True)
    assert (speed.value, speed.ratio, speed.bar) == (0.5, 0.25, None)  # 4 GB in 2 s are copied: 2 GB/s
    assert (seconds.value, seconds.ratio) == (8.0, 4.0)
    over = benchmark._rows("ema", 4 * 10**9, 2.0, {**measured, "VmHWM": 2_700_000_000}, 1.3)[0]
    assert over.ratio == pytest.approx(1.35) and over.holds is False


def test_a_whole_run_of_a_tiny_model(tmp_path, project_root):
    """In the place of full_cpu.json, so that all is as at full size but the size."""
    raw = json.loads((project_root / "ds_configs" / "tiny_cpu.json").read_text())
    (tmp_path / "full_cpu.json").write_text(json.dumps(raw))
    (tmp_path / "work").mkdir()
    parser = argparse.ArgumentParser()
    benchmark.add_arguments(parser)
    report = benchmark.run(parser.parse_args(["--configs", str(tmp_path), "--folder", str(tmp_path / "work")]))
    assert [row["name"].rpartition(" ")[2] for row in report["rows"]] == ["ema"] * 3 + ["master"] * 3
    memory = report["rows"][0]
    assert 0.2 < memory["value"] < 1.5 and memory["bar"] == benchmark.MEMORY_BAR and memory["holds"] is False  # the libraries alone
    assert all(row["value"] > 0 for row in report["rows"])
    assert not any((tmp_path / "work").iterdir())
