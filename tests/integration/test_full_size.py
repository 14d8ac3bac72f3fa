"""The model at its full 0.96 billion parameters takes real optimizer steps within 24 GB: minutes, so a soak test."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_full_model_takes_three_steps_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "rdtf_ds" / "train.py"), "--deepspeed_config", str(ROOT / "ds_configs" / "full_cpu.json")]
    command += ["--output_dir", str(tmp_path / "run"), "--max_steps", "3"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "DS_ACCELERATOR": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    parameters = re.search(r"DFGN with ([\d,]+) parameters", done.stderr)
    assert parameters is not None and int(parameters[1].replace(",", "")) == 955_305_956
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [0, 1, 2] and not any(step["skipped"] for step in steps)
    assert all(math.isfinite(step["loss"]) and step["grad_norm"] > 0 for step in steps)
    # The run's own figure: it restarts the kernel's peak at every phase, and what the kernel tells its parent is that of the last ones.
    peak = max(step["memory"]["rss"] for step in steps)
    measured, predicted = (max(steps[-1]["memory"][kind].values()) for kind in ("measured", "predicted"))
    assert measured == pytest.approx(predicted, rel=0.05), "the plan of this run"
    times = ["; ".join(f"{phase} {seconds:.1f} s" for phase, seconds in step["times"].items()) for step in steps]
    print(f"\npeak resident memory {peak / 1e9:.1f} GB; {' | '.join(times)}")
    assert peak <= 12.5e9, "three steps of the full model without EMA"
