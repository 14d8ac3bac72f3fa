"""Started with 2, 1, 3 and again 2 ranks, a run just goes on: the same state, the same samples, the same plans from the same losses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rdtf_ds.config import RDTFSection
from rdtf_ds.data.indexing.index_building import build_index
from rdtf_ds.data.step_plan import PlanQueue, StepPlanner
from rdtf_ds.diffusion.masks import level
from rdtf_ds.exit_codes import DONE
from rdtf_ds.training.assembly import build_curriculum
from rdtf_ds.training.data_assembly import decode_limits
from tests.faults.runs import STEPS, TRIALS, commit_of, resumed_after
from tests.faults.saboteur import FAULT
from tests.integration.launches import read_metrics

GLOBAL_BATCH = 12
RELATIVE = 1e-3
RANKS = (2, 1, 3, 2)
SETTINGS = (f"train_batch_size={GLOBAL_BATCH}", "train_micro_batch_size_per_gpu=1", "rdtf.checkpoint.keep=100")
# As v100.json ships it. The trial's own scale sits where gradients just overflow in fp16, and there the order in which ranks are summed
# decides whether a step is skipped.
LOSS_SCALE = {"fp32": (), "fp16": ("fp16.initial_scale_power=16", "fp16.loss_scale_window=1000")}


def joined(checkpoint: Path) -> dict[str, torch.Tensor | int]:
    """Masters, moments and means of all ranks put together again: what another number of ranks must have to the bit."""
    shards = [torch.load(path, weights_only=False)["optimizer_state_dict"] for path in sorted(checkpoint.glob("zero_pp_rank_*"))]
    means = [load_file(path) for path in sorted(checkpoint.glob("ema_rank*"))]
    whole: dict[str, torch.Tensor | int] = {}
    for group, settings in enumerate(shards[0]["base_optimizer_state"]["param_groups"]):
        name = settings["name"]
        whole[f"{name}/masters"] = torch.cat([shard["single_partition_of_fp32_groups"][group].detach() for shard in shards])
        whole[f"{name}/means"] = torch.cat([mean[name] for mean in means])
        states = [shard["base_optimizer_state"]["state"][group] for shard in shards]
        whole[f"{name}/steps"] = states[0]["step"]
        quantised = [state.get("__bnb_optimizer_quant_state__", state) for state in states]
        for key in quantised[0].keys() - {"step", "__bnb_optimizer_quant_state__"}:
            parts = [state[key] for state in quantised]
            whole[f"{name}/{key}"] = parts[0] if key.startswith("qmap") else torch.cat(parts)
        assert all(bool(whole[f"{name}/state{moment}"].any()) for moment in (1, 2)), f"the moments of {name} are zero"
    return whole | {f"loss scale/{key}": value for key, value in vars(shards[0]["loss_scaler"]).items() if isinstance(value, int | float)}


def different(one: Path, other: Path) -> list[str]:
    ours, theirs = joined(one), joined(other)
    assert ours.keys() == theirs.keys() and any(key.endswith("absmax1") for key in ours)

    def same(a, b):
        return a.dtype == b.dtype and torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    return [key for key in sorted(ours) if not same(ours[key], theirs[key])]


def replayed(folder: Path, clips: Path) -> list[tuple]:
    """k, tasks, levels and samples of every step, planned anew from the losses a run logged: ranks have no part in it."""
    rdtf = RDTFSection.model_validate_json(json.dumps(json.loads((folder / "config.json").read_text())["rdtf"]))
    index = build_index(clips, decode_limits(rdtf))
    curriculum = build_curriculum(rdtf)
    planner = StepPlanner(rdtf.seed, GLOBAL_BATCH, np.asarray(index.trainable), index.frame_counts, curriculum, frames=rdtf.data.frames)
    queue, plans = PlanQueue(planner, rdtf.curriculum.delay), []
    for line in read_metrics(folder):
        plan = queue.plan(line["step"])
        plans.append(planned(dataclasses.asdict(plan) | {"levels": [level(sample.mask) for sample in plan.samples]}))
        queue.push(curriculum.observe(queue.state, None if line["skipped"] else line["loss"], line["sample_losses"], line["timesteps"]))
    return plans


def planned(plan: dict) -> tuple:
    samples = plan["samples"]
    return plan["k"], [sample["task"].value for sample in samples], plan["levels"], [sample["clip_id"] for sample in samples]


def resized_run(trial: str, ranks: tuple[int, ...], stops: tuple[int, ...], fork_server, clips: Path, folder: Path) -> float:
    """Runs with another number of ranks up to each stop, and without a change; returns the largest relative difference of a loss."""
    resized, alone = folder / "resized", folder / "alone"
    settings = (*SETTINGS, *LOSS_SCALE[trial])
    for count, stop in zip(ranks, stops, strict=True):
        arguments = TRIALS[trial].arguments(clips, resized, *settings, steps=stop)
        launched = fork_server.launch(arguments, count, resized / "logs", {FAULT: "dump"})
        assert launched.wait() == DONE, launched.said[-3000:]
        went_on_from = resumed_after(launched.said)
        assert went_on_from == (None if stop == stops[0] else stops[stops.index(stop) - 1])
        if went_on_from is not None:
            dumped = resized / "resumed" / f"step{went_on_from:08d}-ranks{count}"
            assert len(list(dumped.glob("zero_pp_rank_*"))) == count
            assert different(dumped, commit_of(resized, went_on_from)) == []
    straight = fork_server.launch(TRIALS[trial].arguments(clips, alone, *settings, steps=stops[-1]), ranks[0], alone / "logs")
    assert straight.wait() == DONE, straight.said[-3000:]
    ours, theirs = read_metrics(resized), read_metrics(alone)
    assert [line["sample_ids"] for line in ours] == [line["sample_ids"] for line in theirs]
    assert [(line["k"], line["tasks"], line["levels"], line["sample_ids"]) for line in ours] == replayed(resized, clips)
    assert len({line["k"] for line in ours}) > 2
    return max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(ours, theirs, strict=True))


def test_a_short_run_is_resized(fork_server, clips, tmp_path):
    assert resized_run("fp16", RANKS, (4, 6, 8, 10), fork_server, clips, tmp_path) <= RELATIVE


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_a_run_of_40_steps_is_resized(fork_server, clips, tmp_path, fault_table):
    furthest = {
        trial: resized_run(trial, RANKS, (STEPS // 4, STEPS // 2, 3 * STEPS // 4, STEPS), fork_server, clips, tmp_path / trial)
        for trial in TRIALS
    }
    fault_table(
        "resize 2→1→3→2 while a run of 40 steps goes on, moments not zero",
        f"state bit-equal after each; sample ids and replayed plans identical; loss within {RELATIVE:g} relative of the run never resized",
        "0 bits differ, samples and plans identical; loss within " + ", ".join(f"{gap:.1e} ({trial})" for trial, gap in furthest.items()),
    )
    assert max(furthest.values()) <= RELATIVE
