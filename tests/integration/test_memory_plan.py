"""What a real launch says of its memory: the plan at its start, what was measured beside it, and a run that cannot fit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.integration.launches import PATIENCE, ROOT, environment, free_port, kill_family

PHASES = {"initialise", "forward", "backward", "step", "save"}


def test_measured_stands_beside_predicted(straight_run: Path, scalars_of: Callable[[Path], dict[str, list[int]]]) -> None:
    table = (straight_run / "memory_plan.txt").read_text()
    assert "predicted" in table.lower() and "activations" in table and "Peak: " in table
    lines = [json.loads(line)["memory"] for line in (straight_run / "metrics.jsonl").read_text().splitlines()]
    assert PHASES - {"save"} <= lines[0]["measured"].keys() and PHASES <= lines[-1]["measured"].keys() <= lines[-1]["predicted"].keys()
    # Tensors of megabytes in a process of hundreds: what can be said of any machine is that it is not off by the size of the process.
    for phase, size in lines[-1]["measured"].items():
        assert 0 < size < lines[-1]["predicted"][phase] + 300e6 and lines[-1]["rss"] > size + 100e6
    assert all(line["rss"] <= lines[-1]["rss"] for line in lines), "the peak of the process never falls"
    tags = scalars_of(straight_run)
    assert {f"memory_gb/{kind}_{phase}" for kind in ("measured", "predicted") for phase in PHASES} <= tags.keys()


def test_a_run_that_cannot_fit_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    """A network of some 10^11 parameters: only what has no data can be made of it."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]
    script = [str(ROOT / "rdtf_ds" / "train.py"), "--deepspeed_config", str(ROOT / "ds_configs" / "tiny_cpu.json")]
    options = ["--output_dir", str(tmp_path / "run"), "--set", "rdtf.model.block_out_channels=[32768,32768]"]
    options += ["--set", "rdtf.model.attention_levels=[false,false]"]
    process = subprocess.Popen(
        [*launcher, *script, *options], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        told, _ = process.communicate(timeout=PATIENCE)
    finally:
        kill_family(process)
    assert process.returncode != 0
    words = " ".join(told.split())
    assert words.count("Error: This run does not fit into memory: ") == 1, told[-3000:]
    assert "rank(s) in this machine's memory" in words and "--ignore_memory_plan starts it all the same." in words
    assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / "stickers").exists()
