"""Two ranks, real processes: the same run twice, and a run killed and started again."""

from __future__ import annotations

import json
import re

import pytest
import torch

from tests.integration.launches import INTERVAL, KILL_AFTER, STEPS, final_weights, last_checkpoint, read_metrics

pytestmark = pytest.mark.timeout(3600)  # three launches each, in the first test that asks for them

MEASURED = ("times", "samples_per_second", "memory")


def what_was_learned(metrics):
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in metrics]


def test_a_kill_and_a_resume_change_nothing(straight_run, killed_run):
    assert KILL_AFTER <= killed_run.lines_when_killed < STEPS
    resumed_after = int(re.findall(r"Resumed after (\d+) steps", killed_run.said_on_resume)[0])
    assert resumed_after in range(INTERVAL, STEPS, INTERVAL)
    assert resumed_after < killed_run.lines_when_killed, "killed between checkpoints: steps were run a second time"
    assert what_was_learned(read_metrics(killed_run.folder)) == what_was_learned(read_metrics(straight_run))
    for kind in ("master", "ema"):
        straight, killed = final_weights(straight_run, kind), final_weights(killed_run.folder, kind)
        assert straight.keys() == killed.keys()
        assert [name for name in straight if not torch.equal(straight[name], killed[name])] == []


def test_the_curriculum_moved(straight_run):
    metrics = read_metrics(straight_run)
    assert len({line["target_level"] for line in metrics}) >= 3
    assert len({line["k"] for line in metrics}) >= 3
    assert any(line["pid"]["total"] != 0 for line in metrics)
    assert len({line["loss"] for line in metrics}) == STEPS


def test_every_step_is_logged_once(killed_run, scalars_of):
    assert [line["step"] for line in read_metrics(killed_run.folder)] == list(range(STEPS))
    steps = scalars_of(killed_run.folder)
    for tag in ("loss/mean", "curriculum/k", "curriculum/target_level", "curriculum/probability_GRT", "optimizer/learning_rate"):
        assert steps[tag] == list(range(STEPS)), tag


def test_a_checkpoint_holds_the_curriculum_beside_the_shards(straight_run):
    folder = last_checkpoint(straight_run)
    state, manifest = json.loads((folder / "curriculum.json").read_text()), json.loads((folder / "MANIFEST.json").read_text())
    applied = sum(not line["skipped"] for line in read_metrics(straight_run))
    assert state["attempted_steps"] == manifest["step"] == STEPS
    assert state["applied_steps"] == manifest["applied_steps"] == applied == state["plans"]["states"][-1]["applied_steps"]
    assert len(state["plans"]["states"]) == state["plans"]["delay"] + 1
    assert manifest["world_size"] == 2 and manifest["groups"]
    assert manifest["files"].keys() >= {"ema_rank0001.safetensors", "curriculum.json"}
    names = ["step00000010-0003", "step00000015-0004", "step00000016-0005"]  # the first commit was before the first step
    assert sorted(path.name for path in folder.parent.iterdir()) == ["latest", *names, "zero_to_fp32.py"]


def test_all_ranks_share_the_batch(straight_run, launch):
    """Two ranks must not train on the same samples: every step's clips are distinct and all are drawn before one returns."""
    metrics = read_metrics(straight_run)
    batch = len(metrics[0]["sample_ids"])
    seen = [clip for line in metrics for clip in line["sample_ids"]]
    assert all(len(line["tasks"]) == len(line["levels"]) == len(line["sample_losses"]) == batch for line in metrics)
    assert len(set(seen[:40])) == 40
    assert all(len(set(line["sample_losses"])) == batch for line in metrics)
