"""An exported model in an environment made for using models: the CPU lock without DeepSpeed and bitsandbytes, installed by pip."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rdtf_ds.export.exporting import export
from rdtf_ds.pipeline import RDTFPipeline
from tests.small_models import small_dfgn, write_run

TRAINING_ONLY = ("deepspeed", "bitsandbytes")
USE = """
import importlib.util, sys
import numpy
assert not any(importlib.util.find_spec(name) for name in ("deepspeed", "bitsandbytes"))
from rdtf_ds.data.clips.writing import write_clip
from rdtf_ds.pipeline import RDTFPipeline
pipeline = RDTFPipeline.from_pretrained(sys.argv[1])
clip = pipeline("a red star", seeds=[3]).frames
write_clip(clip[0], sys.argv[2] + ".gif")
numpy.save(sys.argv[2] + ".npy", clip)
"""


def pip(environment: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [environment / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "--retries", "1", "--timeout", "20", *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=1500)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_model_makes_clips_where_neither_is_installed(tmp_path, project_root):
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True, timeout=300)
    lock = (project_root / "requirements" / "cpu.txt").read_text().splitlines()
    pinned = [line for line in lock if line and not line.startswith("#") and line.partition("==")[0] not in TRAINING_ONLY]
    probe = next(line for line in pinned if line.startswith("einops=="))
    if pip(environment, "install", "--no-deps", probe).returncode != 0:
        pytest.skip(f"no package index can be reached from here: pip could not install {probe}")
    (tmp_path / "pinned.txt").write_text("\n".join(pinned) + "\n")
    installed = pip(environment, "install", "-r", tmp_path / "pinned.txt")  # with what torch's wheel of this index wants besides
    assert installed.returncode == 0, installed.stderr[-3000:]
    source = tmp_path / "source"  # setuptools leaves its traces where it builds
    source.mkdir()
    shutil.copytree(project_root / "rdtf_ds", source / "rdtf_ds", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(project_root / name, source / name)
    installed = pip(environment, "install", "--no-deps", source)
    assert installed.returncode == 0, installed.stderr[-3000:]

    write_run(tmp_path / "run", small_dfgn(text_width=64), world_size=1)
    export(tmp_path / "run", tmp_path / "model", "master")
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(environment / "bin" / "python"), "-I", "-c", USE, str(tmp_path / "model"), str(tmp_path / "clip")]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    pipeline = RDTFPipeline.from_pretrained(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    here = pipeline("a red star", seeds=[3]).frames
    there = np.load(tmp_path / "clip.npy")
    assert here.shape == there.shape and np.abs(here.astype(int) - there.astype(int)).max() <= 1
    assert (tmp_path / "clip.gif").read_bytes().startswith(b"GIF8")
