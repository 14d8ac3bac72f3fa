"""A run that cannot fit is refused with what would make it fit, before anything is made."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rdtf_ds.errors import UserError
from rdtf_ds.experiment import load_experiment
from rdtf_ds.memory.gpus import find_gpu
from rdtf_ds.training import memory_check
from rdtf_ds.training.device_memory import Room
from rdtf_ds.training.dry_run import describe
from rdtf_ds.training.memory_check import check_memory, foretell, keep_plan, refusal, tightest
from rdtf_ds.training.memory_plan import plan_experiment
from rdtf_ds.training.telemetry import RunLog

CPU = torch.device("cpu")


@pytest.fixture
def tiny(project_root):
    return load_experiment(project_root / "ds_configs" / "tiny_cpu.json")


@pytest.fixture
def room(monkeypatch):
    """Sets what every rank may take."""

    def give(total, taken=0, **more):
        monkeypatch.setattr(memory_check, "room_of", lambda device, ranks: Room("the device", total, taken, **more))

    return give


def test_a_run_that_fits_is_told(tiny, room, process_group, capsys):
    room(10**9)
    report = check_memory(tiny, 1, CPU)
    told = capsys.readouterr().err
    assert report["fits"] and f"Peak: {report['peak_phase']}" in told and "Memory, predicted" in told and "Warning" not in told


def test_a_run_that_cannot_fit_is_refused_unless_told_otherwise(tiny, room, process_group, capsys):
    room(10**9)
    peak = check_memory(tiny, 1, CPU)["peak_bytes"]
    room(peak)
    assert check_memory(tiny, 1, CPU)["margin_bytes"] == 0
    room(peak + 10**6, 2 * 10**6, ranks=1)
    with pytest.raises(UserError, match="--ignore_memory_plan starts it all the same") as refused:
        check_memory(tiny, 1, CPU)
    assert refused.value.everywhere and "does not fit into memory: " in str(refused.value) and " 1 MB more than " in str(refused.value)
    capsys.readouterr()
    assert not check_memory(tiny, 1, CPU, ignore=True)["fits"]
    told = capsys.readouterr().err
    assert "Warning: This run does not fit" in told and "It starts all the same (--ignore_memory_plan)" in told


def test_on_a_card_it_says_what_would_make_it_fit(tiny, room, process_group):
    needed = plan_experiment(tiny, 1, find_gpu("t4")).plan.peak.total
    room(needed + 10**9, 10**9 + 1, capability=(7, 0))
    with pytest.raises(UserError) as refused:
        check_memory(tiny, 1, CPU)
    told = str(refused.value)
    assert "It would fit with " in told and "there are on the device, of whose" in told and "other processes hold 1.00 GB" in told
    room(needed, 0, capability=(7, 0))
    assert check_memory(tiny, 1, CPU)["gpu"] == "the device"


def test_what_waits_in_cpu_memory_must_fit_there(project_root, room, process_group):
    keys = ["rdtf.ema.device=cpu", "rdtf.ema.enabled=true"]
    waits = load_experiment(project_root / "ds_configs" / "tiny_cpu.json", keys)
    need = sum(plan_experiment(waits, 1, find_gpu("t4")).plan.host.values())
    assert need > 0
    room(10**12, capability=(7, 0), host=need)
    assert check_memory(waits, 1, CPU)["fits"]
    room(10**12, capability=(7, 0), host=need - 1)
    with pytest.raises(UserError, match="does not fit into CPU memory") as refused:
        check_memory(waits, 1, CPU)
    assert refused.value.everywhere and "EMA" in str(refused.value) and "rdtf.ema.device=gpu" in str(refused.value)
    assert check_memory(waits, 1, CPU, ignore=True)["fits"]


def test_a_planner_that_fails_is_no_wall(tiny, room, process_group, monkeypatch, capsys):
    def broken(*_):
        raise KeyError("aten::new")

    room(10**9)
    monkeypatch.setattr(memory_check, "plan_experiment", broken)
    with pytest.raises(UserError, match="could not be predicted .KeyError.*--ignore_memory_plan starts without a plan"):
        check_memory(tiny, 1, CPU)
    assert check_memory(tiny, 1, CPU, ignore=True) is None and "starts without a plan" in capsys.readouterr().err
    keep_plan(None, None, None, 0)


def test_the_rank_with_the_least_decides():
    assert tightest([Room("a", 10, 0, host=7), Room("b", 5, 0, host=9)]) == Room("b", 5, 0, host=7)
    assert tightest([Room("a", 10, 0), Room("b", 10, 7), Room("c", 10, 4)]).name == "b"
    assert tightest([Room("a", 10, 0), Room("c", 10, 4, ranks=3)]).name == "c"


def test_planning_leaves_random_numbers_dtype_and_gradients_alone(tiny):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    random.seed(4)
    np.random.seed(4)
    states = random.getstate(), np.random.get_state()[1].copy()
    foretell(tiny, 1, CPU)
    assert torch.equal(torch.rand(3), expected)
    assert random.getstate() == states[0] and np.array_equal(np.random.get_state()[1], states[1])
    made = torch.ones(1)
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled() and type(made) is torch.Tensor and made.item() == 1.0


def test_the_table_is_kept_in_the_folder_and_in_tensorboard(tiny, room, process_group, tmp_path, capsys):
    room(10**9)
    report = check_memory(tiny, 1, CPU)
    with RunLog(tmp_path, 0, 0, 4, {}) as log:
        keep_plan(report, tmp_path, log, 0)
    text = (tmp_path / "memory_plan.txt").read_text()
    assert "activations" in text and "Peak: " in text and text.endswith("\n")
    assert str(tmp_path / "memory_plan.txt") in capsys.readouterr().err
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert text.strip() in events.Tensors("memory/plan/text_summary")[0].tensor_proto.string_val[0].decode()
    (picture,) = events.Images("memory/plan")
    assert picture.encoded_image_string.startswith(b"\x89PNG") and (picture.width, picture.height, picture.step) == (1100, 600, 0)
    again = tmp_path / "again"
    with RunLog(again, 0, 3, 4, {}) as log:
        keep_plan(report, again, log, 3)
    events = EventAccumulator(str(again / "tensorboard"))
    events.Reload()
    assert (again / "memory_plan.txt").exists() and events.Tags()["images"] == [], "a resumed run draws nothing"


def test_a_folder_that_refuses_the_table_is_named(tiny, room, process_group, tmp_path):
    room(10**9)
    report = check_memory(tiny, 1, CPU)
    with RunLog(tmp_path / "log", 0, 1, 4, {}) as log, pytest.raises(UserError, match="memory_plan.txt' cannot be written"):
        (tmp_path / "file").write_text("")
        keep_plan(report, tmp_path / "file", log, 1)


def test_a_dry_run_shows_the_plan_and_what_stands_against_it(tiny, room):
    room(10**9)
    text = describe(tiny, 1, CPU)
    assert "memory          predicted " in text and "Peak: " in text and "NOT READY" not in text
    room(1000)
    assert "NOT READY: This run does not fit into memory: " in describe(tiny, 1, CPU)


def test_a_dry_run_on_the_wrong_device_plans_nothing(project_root, monkeypatch):
    experiment = load_experiment(project_root / "ds_configs" / "tiny_cpu.json", ["fp16.enabled=true"])
    monkeypatch.setattr(memory_check, "plan_experiment", lambda *_: pytest.fail("planned for a device that cannot train this"))
    assert "memory          not planned" in describe(experiment, 1, CPU)


def test_a_refusal_names_the_share_of_a_rank():
    report = {"peak_bytes": 3 * 10**9, "gpu_bytes": 2 * 10**9, "margin_bytes": -(10**9), "peak_phase": "step", "changes": None}
    told = refusal(report, Room("this machine's memory", 5 * 10**9, 10**9, ranks=2))
    assert "step is predicted to need 3.00 GB a rank, 1.00 GB more than the 2.00 GB there are for each of 2 rank(s)" in told
    assert "(5.00 GB, of which 1.00 GB are in use)" in told
