"""tools/plan_memory.py as people type it, and what it says of the full model."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

from rdtf_ds.experiment import load_experiment
from rdtf_ds.memory.encoders import read_encoders
from rdtf_ds.memory.gpus import GPUS
from rdtf_ds.memory.planner import plan
from rdtf_ds.training.memory_plan import describe
from tests.small_models import load_tool


@pytest.fixture
def tool(project_root):
    return load_tool(project_root, "plan_memory")


@pytest.fixture
def plan_memory(tool, project_root, monkeypatch, capsys):
    """Calls the tool on tiny_cpu.json; returns exit code, standard output, standard error."""

    def call(*arguments):
        config = str(project_root / "ds_configs" / "tiny_cpu.json")
        monkeypatch.setattr(sys, "argv", ["plan_memory.py", "--deepspeed_config", config, *map(str, arguments)])
        capsys.readouterr()
        code = tool.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_json_is_one_object_and_adds_up(plan_memory):
    code, out, _ = plan_memory("--gpus", 2, "--gpu", "t4", "--json")
    report = json.loads(out)
    assert code == 0 and report["predicted"] is True and report["fits"] is True
    assert (report["gpus"], report["gpu"], report["accumulation"], report["largest_micro_batch"]) == (2, "t4", 2, 2)
    names = ["initialise", "forward", "backward", "step", "save", "resume"]
    assert [phase["name"] for phase in report["phases"]] == names, "tiny_cpu.json makes no clips while it trains"
    for phase in report["phases"]:
        assert phase["total"] == sum(phase["bytes"].values()) <= report["peak_bytes"]
        assert {"weights", "masters", "CUDA context", "allocator slack"} <= phase["bytes"].keys()
    assert report["margin_bytes"] == report["gpu_bytes"] - report["peak_bytes"]
    assert report["peak_phase"] in names and report["assumed_encoders"] == []


def test_text_says_that_it_is_predicted(plan_memory):
    code, out, _ = plan_memory("--gpus", 1)
    assert code == 0
    assert "predicted, not measured" in out and "fits, free" in out and "Largest micro-batch that fits: 4." in out
    _, checkpointed, _ = plan_memory("--set", "rdtf.memory.activation_checkpointing=blocks_cpu_offload")
    assert "upper bound" in checkpointed and "upper bound" not in out


def test_what_does_not_fit_is_said_with_what_would(plan_memory, monkeypatch):
    size = json.loads(plan_memory("--json")[1])["peak_bytes"]
    monkeypatch.setitem(GPUS, "8gb", replace(GPUS["8gb"], bytes=size - 1))
    code, out, _ = plan_memory("--gpu", "8gb")
    assert code == 1 and "DOES NOT FIT" in out and "It would fit with " in out
    monkeypatch.setitem(GPUS, "8gb", replace(GPUS["8gb"], bytes=1000))
    code, out, _ = plan_memory("--gpu", "8gb", "--json")
    assert code == 1 and json.loads(out)["changes"] is None and json.loads(out)["largest_micro_batch"] is None


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--gpu", "abacus"], "known are"),
        (["--gpus", 3], "GPU counts that"),
        (["--gpu", "v100-32gb", "--set", "bf16.enabled=true"], "bf16 needs 8.0"),
        (["--set", "rdtf.optimizer.bitz=8"], "bitz"),
    ],
)
def test_what_cannot_be_planned_is_one_paragraph(plan_memory, arguments, told):
    code, out, err = plan_memory(*arguments)
    assert code == 2 and out == "" and told in err and "Traceback" not in err


def test_the_full_model_on_one_card(tool, project_root):
    """The bars the project set itself, predicted: 35 % of a V100-32GB free with the encoders on it, a 16 GB card without EMA."""
    experiment = load_experiment(project_root / "ds_configs" / "v100.json", require_data=False)
    setup, sources = describe(experiment, 1, read_encoders(experiment.rdtf.encoders))
    groups = sources.groups(setup.group_size)
    assert sum(sum(group.sizes) for group in groups) == 955_305_956
    large = GPUS["v100-32gb"]
    made = plan(setup, sources, large)
    assert made.peak.name == "backward" and made.margin > 0.35 * large.bytes
    small = GPUS["v100-16gb"]
    assert not plan(setup, sources, small).fits
    cached = replace(sources, encoder_bytes=0)
    assert plan(replace(setup, ema=False), cached, small).margin > 0.1 * small.bytes
    # One group alone would have 6 bytes of fp32 working copies for each parameter.
    alone = {phase.name: phase.total for phase in plan(replace(setup, group_size=2**31), sources, large).phases}
    grouped = {phase.name: phase.total for phase in made.phases}
    assert alone["step"] - grouped["step"] > 5 * 955_305_956
