"""What a checkpoint costs: seconds, against a step's; memory while resuming, against training's.

On a model of some size, or it is all overhead.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rdtf_ds.exit_codes import DONE
from tests.faults.fork_server import ROOT
from tests.faults.runs import commits, step_of
from tests.faults.saboteur import FAULT

WIDTHS = "[128,256,512,512]"
SETTINGS = (f"rdtf.model.block_out_channels={WIDTHS}", "rdtf.data.image_size=128", "rdtf.ema.enabled=true", "rdtf.checkpoint.interval=1")


def run(folder: Path, steps: int) -> dict[str, float]:
    """Peak memory before the first step and in all, in bytes; a fresh process, for a peak never goes down."""
    sets = [word for setting in SETTINGS for word in ("--set", setting)]
    script, config = str(ROOT / "tests" / "faults" / "saboteur.py"), str(ROOT / "ds_configs" / "full_cpu.json")
    command = [sys.executable, script, "--deepspeed_config", config, "--output_dir", str(folder), "--max_steps", str(steps), *sets]
    environment = {**os.environ, FAULT: "measure", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == DONE, done.stderr[-3000:]
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    start = float((folder / "peak_at_start_rank0000").read_text())
    return {"start": start, "all": last["memory"]["rss"], "step": sum(last["times"].values())}


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_what_a_checkpoint_costs(tmp_path, fault_table):
    fresh = run(tmp_path, 2)
    resumed = run(tmp_path, 3)
    assert step_of(commits(tmp_path)[0]) == 3
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    seconds = [event.value for event in events.Scalars("checkpoint/seconds")]
    size = events.Scalars("checkpoint/bytes")[-1].value
    saving = sorted(seconds)[len(seconds) // 2]
    fault_table(
        f"save time; peak memory of a resume against training's ({WIDTHS} channels, bf16, 8-bit, EMA, 1 rank)",
        "reported; resume peak ≤ training peak",
        f"{size / 1e9:.2f} GB in {saving:.1f} s (median of {len(seconds)}), all of it a stall: {saving / fresh['step']:.0%} of a step "
        f"of {fresh['step']:.1f} s; peak up to the first step {resumed['start'] / 1e9:.2f} GB when resuming, "
        f"{fresh['start'] / 1e9:.2f} GB when starting, {fresh['all'] / 1e9:.2f} GB in training",
    )
    assert resumed["start"] <= fresh["all"]
