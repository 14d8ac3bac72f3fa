from __future__ import annotations

import json
from dataclasses import replace

import pytest

from rdtf_ds.memory import report as module
from rdtf_ds.memory.gpus import GPU
from rdtf_ds.memory.planner import Group, MemoryPlan, Phase, Setup, Sources
from rdtf_ds.memory.report import (
    CATEGORIES,
    Limit,
    categories_of,
    heading,
    line_of_card,
    lines_of,
    provisos,
    remedy,
    report_of,
    tensors_by_phase,
    told,
    unit_of,
    verdict,
)

SETUP = Setup(
    ranks=2, global_batch=8, micro_batch=2, compute_bytes=2, group_size=500, ema="gpu", checkpointing="blocks", autoencoder_slice=8,
    frames=8, reduce_bucket=1000, overlap_comm=False, validates=False,
)  # fmt: skip
NOTHING = Sources(lambda size: (Group((300, 200), 12, 8), Group((7,), 0, 32)), None, None, None, None, {})  # type: ignore[arg-type]
FORWARD = Phase("forward", {"zeal": 1 * 10**9, "activations": 2 * 10**9, "weights": 3 * 10**9, "CUDA context": 5 * 10**8})
STEP = Phase("step", {"weights": 3 * 10**9, "masters": 4 * 10**9, "allocator slack": 10**8})


@pytest.fixture(autouse=True)
def nothing_helps(monkeypatch):
    monkeypatch.setattr(module, "smallest_changes_on_cpu", lambda setup, sources, available: None)


def made(gpu=None, **more):
    return MemoryPlan(SETUP, (FORWARD, STEP), gpu, **more)


def report(room=10 * 10**9, **more):
    return report_of(made(**more), NOTHING, (), Limit("a machine", room))


def test_the_report_adds_up():
    told_of = report()
    assert json.loads(json.dumps(told_of)) == told_of
    assert (told_of["parameters"], told_of["groups"], told_of["gpus"], told_of["accumulation"]) == (507, 2, 2, 2)
    assert (told_of["peak_phase"], told_of["peak_bytes"]) == ("step", 7_100_000_000)
    assert (told_of["gpu"], told_of["gpu_bytes"], told_of["margin_bytes"], told_of["fits"]) == ("a machine", 10**10, 29 * 10**8, True)
    assert told_of["margin"] == pytest.approx(0.29)
    assert report(room=7_100_000_000)["fits"] and not report(room=7_099_999_999)["fits"]
    assert report(room=0)["margin"] == -1


def test_categories_stand_in_one_order_and_unknown_ones_last():
    assert categories_of(report()) == ["weights", "masters", "activations", "allocator slack", "CUDA context", "zeal"]
    assert set(CATEGORIES) > {"weights", "encoders"}


def test_what_a_measurement_of_tensors_should_find():
    assert tensors_by_phase(report()) == {"forward": 6 * 10**9, "step": 7 * 10**9}


def test_lines_hold_every_number_and_the_verdict():
    lines = lines_of(report())
    assert heading(report()) in lines[0] and "2 x a machine" in lines[0] and "GB of each rank" in lines[0]
    assert lines[2].split() == ["forward", "step"]
    cells = {line[:16].strip(): line[16:].split() for line in lines[3:10]}
    assert cells["weights"] == ["3.00", "3.00"] and cells["masters"] == ["0.00", "4.00"] and cells["total"] == ["6.50", "7.10"]
    assert "Peak: step, 7.10 GB of 10.00 GB: fits, free 2.90 GB (29%)." in lines
    assert not any("Largest" in line or "CPU memory" in line or "costs each step" in line for line in lines)
    small = lines_of(report_of(MemoryPlan(SETUP, (Phase("step", {"weights": 1_500_000}),), None), NOTHING, (), Limit("x", 10**9)))
    assert "MB of each rank" in small[0] and small[3].split() == ["weights", "1.50"] and "1.00 GB: fits" in small[-1]


def test_what_was_moved_is_told_with_what_it_costs():
    lines = "\n".join(lines_of(report(host={"moments": 2 * 10**9, "masters": 10**9}, seconds={"EMA on the CPU": 0.25})))
    assert "CPU memory of each rank beside that: 3.00 GB (masters 1.00 GB, moments 2.00 GB)." in lines
    assert "EMA on the CPU 0.25 s" in lines


def test_decoders_of_videos_are_told_and_no_phase_counts_them():
    decoding = replace(SETUP, video_decoders=4)
    told_of = report_of(MemoryPlan(decoding, (FORWARD, STEP), None), NOTHING, (), Limit("a machine", 10**10))
    assert told_of["video_decoders"] == {"processes": 4, "bytes_each": 82_000_000, "large_bytes_each": 472_000_000}
    (line,) = (line for line in lines_of(told_of) if "decoder" in line)
    assert "WebM or MP4" in line and "4 decoders, 328 MB; 82 MB each, up to 472 MB" in line and line.endswith("measured.")
    assert not any("decoder" in line for line in lines_of(report())) and told_of["phases"] == report()["phases"]


def test_what_does_not_fit_says_by_how_much_and_what_would_help():
    short = report(room=5 * 10**9)
    assert verdict(short) == "Peak: step, 7.10 GB of 5.00 GB: DOES NOT FIT, short of 2.10 GB (42%)."
    assert short["margin_bytes"] == -2_100_000_000
    assert remedy(short) == "No set of the changes known here makes it fit." and remedy(short) in lines_of(short)
    short["changes"] = {"set": ["a=1", "b=2"], "peak_bytes": 1, "margin_bytes": 5 * 10**8, "seconds": {"lever": 1.5}}
    assert remedy(short) == "It would fit with a=1 and b=2: 500 MB free, for lever 1.50 s a step."
    assert "short of 2.10 GB. It would fit with a=1 and b=2" in line_of_card(short)
    short["changes"]["seconds"] = {}
    assert remedy(short) == "It would fit with a=1 and b=2: 500 MB free."


def test_changes_are_sought_in_what_all_ranks_share(monkeypatch):
    asked = []

    def one_rank(setup, sources, available):
        asked.append(available)
        return ("1 rank(s)",), MemoryPlan(replace(setup, ranks=1), (Phase("step", {"weights": 9 * 10**9}),), None)

    monkeypatch.setattr(module, "smallest_changes_on_cpu", one_rank)
    changes = report(room=5 * 10**9)["changes"]
    assert asked == [10**10] and report()["changes"] is None
    assert changes == {"set": ["1 rank(s)"], "peak_bytes": 9 * 10**9, "margin_bytes": 10**9, "seconds": {}}


def test_the_line_of_a_card_that_fits():
    line = line_of_card(report() | {"largest_micro_batch": 4})
    assert " ".join(line.split()) == "a machine 10.00 GB, peak 7.10 GB in step fits, free 2.90 GB (29%); micro-batch to 4"


def test_a_card_is_its_own_limit():
    card = report_of(made(GPU("card", 8 * 10**9, (7, 0))), NOTHING, ("hub/x",), what_if=False)
    assert (card["gpu"], card["margin_bytes"], card["largest_micro_batch"]) == ("card", 900_000_000, None)
    assert provisos(card) == ["Not on this machine, so taken for Table 6's: hub/x."]
    with pytest.raises(AssertionError, match="limit"):
        report_of(made(), NOTHING, ())


def test_units():
    assert [told(size) for size in (10**9, 10**9 - 10**6, 34_080_000_000, 0)] == ["1.00 GB", "999 MB", "34.08 GB", "0 MB"]
    assert unit_of({"peak_bytes": 10**9}) == ("GB", 1e9) and unit_of({"peak_bytes": 10**9 - 1}) == ("MB", 1e6)
