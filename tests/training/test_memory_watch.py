"""How much there is, how much was held, and that a plan is held against both."""

from __future__ import annotations

import gc
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rdtf_ds.training import device_memory
from rdtf_ds.training.device_memory import CardPeaks, ResidentPeaks, Room, card_room, cgroup_limits, machine_memory, room_of, whole_peak
from rdtf_ds.training.memory_watch import UNPLANNED, MemoryWatch, StepWatch
from rdtf_ds.training.telemetry import RunLog, scalars
from tests.training.test_telemetry import record

GB = 10**9


class Meter:
    """A device that holds what it is told to."""

    by_phase = True

    def __init__(self, *readings):
        self.readings, self.restarts = list(readings), 0

    def restart(self):
        self.restarts += 1

    def read(self):
        return self.readings.pop(0)


def held(*sizes):
    return Meter(*({"peak": size, "rss": 10 * size} for size in sizes))


class Log:
    def __init__(self):
        self.said, self.values = [], []

    def say(self, text):
        self.said.append(text)

    def scalar(self, tag, value, done):
        self.values.append((tag, value, done))


def test_each_phase_keeps_its_highest_peak():
    meter = held(1, 50, 20, 30, 7, 40, 10)
    watch = MemoryWatch(meter, {"forward": 100, "backward": 200, "step": 300})
    for lap in ("data", "forward", "encode", "backward", "forward", "step", "step"):
        watch.lap(lap)
    assert watch.measured == {"forward": 50, "backward": 30, "step": 40}, "encoding is part of forward, reading data of no phase"
    assert meter.restarts == 7
    assert watch.read() == {"rss": 500, "measured": watch.measured, "predicted": {"forward": 100, "backward": 200, "step": 300}}
    json.dumps(watch.read())


def test_a_phase_begins_where_it_is_entered():
    watch = MemoryWatch(held(900, 5), {"save": 10})
    with watch.phase("save"):
        pass
    assert watch.measured == {"save": 5} and watch.read()["rss"] == 9000, "what was before it counts for the whole"


def test_a_process_that_cannot_tell_phases_apart_measures_the_run():
    meter = held(30, 40)
    meter.by_phase = False
    watch, log = MemoryWatch(meter, {"forward": 100, "step": 300}), Log()
    watch.lap("forward")
    watch.lap("anything")
    assert watch.measured == {"run": 40} and watch.predicted == {"run": 300}
    watch.report(log, 1)
    assert "cannot be told apart" in log.said[0]


def test_other_ranks_measure_nothing():
    watch, log = MemoryWatch.on(torch.device("cpu"), 1, {"step": 5}), Log()
    with watch.phase("step"):
        watch.lap("step")
    watch.report(log, 1)
    assert watch.measured == {} and not log.said and not log.values and watch.read()["rss"] == whole_peak()


def test_measured_stands_beside_predicted_when_it_grows():
    watch, log = MemoryWatch(held(GB, 2 * GB, int(2.01 * GB), 3 * GB), {"forward": 4 * GB, "step": 5 * GB}), Log()
    watch.lap("forward")
    watch.report(log, 1)
    assert log.values == [("memory_gb/measured_forward", 1.0, 1), ("memory_gb/predicted_forward", 4.0, 1)]
    assert log.said == ["Memory, measured of predicted: forward 1.00 GB of 4.00 GB."]
    for done in (2, 3, 4):
        watch.lap("forward")
        watch.report(log, done)
    assert [(value, done) for tag, value, done in log.values if "measured" in tag] == [(1.0, 1), (2.0, 2), (3.0, 4)]
    assert len(log.said) == 1, "said once"


def test_more_than_predicted_is_one_warning():
    allowed = int(1.1 * GB) + UNPLANNED
    watch, log = MemoryWatch(held(allowed - 1, allowed + 2 * 10**6, 9 * GB), {"forward": GB, "step": GB}), Log()
    for lap, warnings in (("forward", 0), ("step", 1), ("forward", 1)):
        watch.lap(lap)
        watch.report(log, 1)
        told = [line for line in log.said if line.startswith("Warning: more memory than predicted: step 1.37 GB of 1.00 GB. ")]
        assert len(told) == warnings
    assert len(log.said) == 2


def test_a_step_is_timed_and_measured():
    memory = MemoryWatch(held(8, 1, 6), {"forward": 10})
    watch = StepWatch(memory)  # what was before the step belongs to none of its phases
    watch.lap("data")
    watch.lap("forward")
    times, sizes = watch.read()
    assert list(times) == ["data", "forward"] and min(times.values()) >= 0
    assert sizes["measured"] == {"forward": 6} and sizes["rss"] == 80


def test_a_line_of_the_log_and_its_scalars_hold_the_memory(tmp_path):
    watch = MemoryWatch(held(2 * GB), {"step": 3 * GB})
    watch.lap("step")
    line = record(0)
    line = type(line)(line.plan, line.outcome, line.snapshot, line.times, watch.read()).metrics()
    assert line["memory"] == {"rss": 20 * GB, "measured": {"step": 2 * GB}, "predicted": {"step": 3 * GB}}
    values = scalars(line, 0)
    assert values["memory_gb/rss"] == 20.0 and not any("step" in tag for tag in values if tag.startswith("memory"))
    with RunLog(tmp_path, 0, 0, 4, {}) as log:
        watch.report(log, 1)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("memory_gb/predicted_step")] == [3.0]


def test_resident_peaks_restart():
    gc.collect()
    meter = ResidentPeaks()
    if not meter.by_phase:
        pytest.skip("/proc/self/clear_refs may not be written here")
    block = np.ones(80_000_000, dtype=np.uint8)
    high = meter.read()
    assert 75_000_000 < high["peak"] < 120_000_000 and high["rss"] > high["peak"] + 10**7
    del block
    assert meter.read()["peak"] > 75_000_000, "a peak stays until it is restarted"
    meter.restart()
    assert meter.read()["peak"] < 40_000_000


def test_a_container_that_forbids_restarts(tmp_path):
    meter = ResidentPeaks(clear=tmp_path / "no such folder" / "clear_refs")
    assert not meter.by_phase
    meter.restart()
    assert meter.read()["rss"] == whole_peak() > meter.read()["peak"]


def test_a_card_counts_its_tensors(monkeypatch):
    asked = []
    peaks = {"allocated_bytes": {"all": {"peak": 5, "current": 3}}, "reserved_bytes": {"all": {"peak": 8, "current": 7}}}
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: peaks)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", asked.append)
    meter = CardPeaks(torch.device("cuda", 1))
    meter.restart()
    assert meter.read() == {"peak": 5, "reserved": 8} and asked == [torch.device("cuda", 1)]
    watch = MemoryWatch(meter, {"step": 9})
    watch.lap("step")
    assert watch.read() == {"rss": whole_peak(), "cuda": 5, "cuda_reserved": 8, "measured": {"step": 5}, "predicted": {"step": 9}}


def card(monkeypatch, free, total, reserved=0):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")


def test_what_other_processes_hold_of_a_card_is_not_there(monkeypatch):
    monkeypatch.setattr(device_memory, "context_bytes", lambda ranks: 7 * ranks)
    card(monkeypatch, free=90, total=100)
    monkeypatch.setattr(device_memory, "machine_memory", lambda: (100, 60))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert room_of(torch.device("cuda", 0), 1) == Room("Tesla V100", 100, 3, capability=(7, 0), host=15)
    assert card_room(torch.device("cuda", 0), 2).taken == 0, "less than our own context takes"
    card(monkeypatch, free=40, total=100, reserved=20)
    room = card_room(torch.device("cuda", 0), 1)
    assert (room.taken, room.bytes) == (33, 67) and room.gpu is not None and (room.gpu.bytes, room.gpu.capability) == (67, (7, 0))


def test_the_ranks_of_a_machine_share_what_is_available(monkeypatch):
    monkeypatch.setattr(device_memory, "machine_memory", lambda: (100, 60))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    room = room_of(torch.device("cpu"), 4)
    assert (room.total, room.taken, room.ranks, room.bytes, room.gpu) == (100, 40, 4, 15, None)
    monkeypatch.setenv("LOCAL_SIZE", "2")
    assert room_of(torch.device("cpu"), 4).bytes == 30
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert room_of(torch.device("cpu"), 4).bytes == 20
    assert Room("x", 10, 20).bytes == 0


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_a_container_has_no_more_than_its_limit(tmp_path, monkeypatch):
    own = tmp_path / "cgroup"
    own.write_text("0::/outer/inner\n")
    write(tmp_path / "outer", memory__max="4000\n", memory__current="1500\n", memory__stat="anon 9\ninactive_file 500\nfile 7\n")
    write(tmp_path / "outer" / "inner", memory__max="max\n", memory__current="1\n")
    assert list(cgroup_limits(tmp_path, own)) == [(4000, 1000)], "the folders around it count, files that can be dropped do not"
    monkeypatch.setattr(device_memory.psutil, "virtual_memory", lambda: SimpleNamespace(total=9000, available=3500))
    monkeypatch.setattr(device_memory, "cgroup_limits", lambda: [(4000, 1000)])
    assert machine_memory() == (4000, 3000)
    monkeypatch.setattr(device_memory, "cgroup_limits", lambda: [(20_000, 1000), (2000, 2100)])
    assert machine_memory() == (2000, 0)
    monkeypatch.setattr(device_memory, "cgroup_limits", lambda: [])
    assert machine_memory() == (9000, 3500)


def test_a_container_sees_its_own_group_at_the_root(tmp_path):
    own = tmp_path / "cgroup"
    own.write_text("0::/../docker/1a2b\n")
    write(tmp_path, memory__max="500\n", memory__current="100\n")
    assert (500, 100) in list(cgroup_limits(tmp_path, own))


def test_control_groups_of_version_1(tmp_path):
    own = tmp_path / "cgroup"
    own.write_text("9:name=systemd:/x\n5:memory:/job\n4:cpuset:/\n")
    limit, used = "memory__limit_in_bytes", "memory__usage_in_bytes"
    write(tmp_path / "memory", **{limit: "9223372036854771712\n", used: "5\n"})
    write(tmp_path / "memory" / "job", **{limit: "700\n", used: "300\n", "memory__stat": "total_inactive_file 50\n"})
    write(tmp_path / "x", **{limit: "1\n"})
    assert list(cgroup_limits(tmp_path, own)) == [(700, 250)]
    assert list(cgroup_limits(tmp_path, tmp_path / "absent")) == []
