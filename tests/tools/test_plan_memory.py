"""tools/plan_memory.py as people type it, and what it says of the full model."""

from __future__ import annotations

import json
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
def plan_memory(tool, project_root, typed):
    """Calls the tool on tiny_cpu.json; returns exit code, standard output, standard error."""
    return typed(tool, "--deepspeed_config", project_root / "ds_configs" / "tiny_cpu.json")


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
    _, moved, _ = plan_memory("--set", "rdtf.memory.activation_checkpointing=blocks_cpu_offload")
    assert "1 decoder, 82 MB; 82 MB each" in out, "tiny_cpu.json has one worker"
    assert "CPU memory of each rank beside that" in moved and "CPU memory of each rank beside that" not in out


def test_several_cards_are_a_line_each(plan_memory, monkeypatch):
    code, out, _ = plan_memory("--gpu", "8gb", "t4")
    heading, *lines = out.splitlines()
    assert code == 0 and "predicted, not measured" in heading and [line.split()[0] for line in lines] == ["8gb", "t4"]
    assert all("fits, free" in line for line in lines)
    for name in ("8gb", "t4"):
        monkeypatch.setitem(GPUS, name, replace(GPUS[name], bytes=1000))
    code, out, _ = plan_memory("--gpu", "8gb", "t4")
    assert code == 1 and out.count("does not fit, short of") == 2
    code, out, _ = plan_memory("--gpu", "all", "--json")
    reports = json.loads(out)["cards"]
    assert code == 0 and [report["gpu"] for report in reports] == list(GPUS) and not reports[0]["fits"] and reports[-1]["fits"]


def test_a_card_that_cannot_train_this_is_left_out(plan_memory):
    code, out, err = plan_memory("--gpu", "v100-32gb", "a100-40gb", "--set", "bf16.enabled=true")
    assert code == 0 and "v100-32gb: " in err and "bf16 needs 8.0" in err
    assert out.splitlines()[0].endswith("of each rank:") and "1 x a100-40gb" in out


def test_the_chart_is_a_picture(plan_memory, tmp_path):
    code, _, _ = plan_memory("--gpu", "t4", "--chart", tmp_path / "plan.png")
    assert code == 0 and (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    code, _, err = plan_memory("--gpu", "t4", "--chart", tmp_path / "no" / "plan.png")
    assert code == 2 and "plan.png: it cannot be written" in err
    code, _, err = plan_memory("--gpu", "t4", "8gb", "--chart", tmp_path / "two.png")
    assert code == 2 and "--chart draws one kind of GPU" in err and not (tmp_path / "two.png").exists()


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


@pytest.fixture(scope="module")
def full(project_root):
    """A card's plan of a shipped config, as `describe` reads it; each config is traced once."""
    read = {}

    def made(config, gpu, **changes):
        if config not in read:
            experiment = load_experiment(project_root / "ds_configs" / config, require_data=False)
            read[config] = describe(experiment, 1, read_encoders(experiment.rdtf.encoders))
        setup, sources = read[config]
        return plan(replace(setup, **changes), sources, GPUS[gpu]), sources

    return made


def test_the_full_model_fits_a_v100_with_more_than_a_third_free(full):
    """The bars the project set itself, predicted: at least 35 % of a V100-32GB free, encoders resident, micro-batch 1."""
    made, sources = full("v100.json", "v100-32gb")
    groups = sources.groups(made.setup.group_size)
    assert sum(sum(group.sizes) for group in groups) == 955_305_956
    assert made.setup.encoders == "resident" and made.setup.ema == "gpu" and made.setup.micro_batch == 1
    assert made.margin > 0.35 * GPUS["v100-32gb"].bytes and made.host == {} == made.seconds
    assert not full("v100.json", "v100-16gb")[0].fits
    # One group alone would have 4 bytes of fp32 working copies for each parameter.
    alone, _ = full("v100.json", "v100-32gb", group_size=2**31)
    steps = [next(phase.total for phase in each.phases if phase.name == "step") for each in (alone, made)]
    assert steps[0] - steps[1] > 3.5 * 955_305_956


def test_the_full_model_fits_a_16_gb_card_without_optimizer_offload(full):
    made, _ = full("v100_16gb.json", "v100-16gb")
    assert made.setup.encoders == "cached" and not made.setup.offload_optimizer and made.setup.ema == "gpu"
    assert made.margin > 0.1 * GPUS["v100-16gb"].bytes


def test_the_full_model_fits_a_12_gb_card_without_ema_and_an_8_gb_card_with_offload(full):
    made, _ = full("gpu_12gb.json", "rtx3060")
    assert made.fits and made.setup.ema == "off" and not made.setup.offload_optimizer
    offloaded, _ = full("gpu_8gb.json", "8gb")
    assert offloaded.fits and offloaded.setup.offload_optimizer
    assert offloaded.seconds.keys() == {"zero_optimization.offload_optimizer", "rdtf.ema.device", "rdtf.memory.encoders"}
    assert 20e9 < sum(offloaded.host.values()) < 30e9
