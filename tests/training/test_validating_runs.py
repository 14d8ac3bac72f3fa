"""Real runs on 2 ranks that validate: what they learn, what they say, and what a failing rank or a kill costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training.two_ranks import LOST, STEPS

pytestmark = pytest.mark.timeout(900)
MEASURED = ("times", "samples_per_second", "memory")


@pytest.fixture(scope="module")
def runs(project_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("validation")
    command = [sys.executable, "-m", "tests.training.two_ranks", "validation", str(folder)]
    ended = subprocess.run(command, cwd=project_root, capture_output=True, text=True, timeout=800)
    assert ended.returncode == 0, ended.stderr[-5000:]
    (folder / "said").write_text(ended.stderr)
    return folder


def lines(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def learned(folder: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines(folder, "metrics.jsonl")]


@pytest.mark.parametrize("name", ["with", "failing", "killed"])
def test_validation_changes_nothing_of_training(runs, name):
    assert len(learned(runs / "without")) == STEPS and learned(runs / name) == learned(runs / "without")
    for rank in range(2):
        expected, found = (torch.load(runs / f"{run}_{rank}.pt", weights_only=False) for run in ("without", name))
        assert all(torch.equal(a, b) for a, b in zip(expected[0], found[0], strict=True)), "masters"
        assert all(torch.equal(expected[1][key], found[1][key]) for key in expected[1]), "mean weights"
    assert not (runs / "without" / "samples").exists() and lines(runs / "without", "validation.jsonl") == []


def test_losses_of_held_out_clips_move_with_the_mean_weights(runs):
    validations = lines(runs / "with", "validation.jsonl")
    assert [line["step"] for line in validations] == [2, 4, 6] and all(line["held_out"] for line in validations)
    losses = [line["losses"]["loss"] for line in validations]
    assert len(set(losses)) == 3 and losses[-1] < losses[0], "an untrained network learns at once to say less"
    assert {"loss_IPT", "loss_PDT", "loss_GRT", "loss_t0100", "loss_t0900"} < validations[0]["losses"].keys()
    assert all(line["clips"] == ["00_text", "01_image", "02_prediction"] for line in validations)
    assert sorted(path.name for path in (runs / "with" / "samples" / "step00000006").glob("*.gif")) == [
        "00_text.gif", "01_image.gif", "02_prediction.gif",
    ]  # fmt: skip
    seconds = sum(line["seconds"] for line in validations)
    assert validations[-1]["share"] == pytest.approx(seconds / (seconds + validations[-1]["trained_s"]))


def test_a_rank_that_fails_costs_its_part_and_no_more(runs):
    validations = lines(runs / "failing", "validation.jsonl")
    assert [line["step"] for line in validations] == [2, 4, 6], "no rank hangs"
    assert all(line["losses"] is None and line["clips"] == ["00_text", "02_prediction"] for line in validations)
    said = (runs / "said").read_text()
    assert "Warning: after step 2 no held-out loss: rank 1: RuntimeError: this rank cannot" in said
    assert "Warning: after step 6 no validation clip 01_image: RuntimeError: this rank cannot" in said


def test_a_kill_amid_a_validation_loses_nothing(runs):
    whole, killed = lines(runs / "with", "validation.jsonl"), lines(runs / "killed", "validation.jsonl")
    kept = ("step", "losses", "clips", "next_clip", "failures", "put_off")
    assert [{key: line[key] for key in kept} for line in killed] == [{key: line[key] for key in kept} for line in whole]
    for name in ("00_text.gif", "01_image.gif"):
        ours, theirs = ((runs / run / "samples" / f"step{LOST:08d}" / name).read_bytes() for run in ("with", "killed"))
        assert ours == theirs


def test_one_rank_measures_what_two_did(runs):
    alone = {line["step"]: line["losses"] for line in lines(runs / "alone", "validation.jsonl")}
    both = {line["step"]: line["losses"] for line in lines(runs / "with", "validation.jsonl")}
    assert alone[LOST] == both[LOST], "the same weights, to the bit"
    assert alone[STEPS].keys() == both[STEPS].keys()
