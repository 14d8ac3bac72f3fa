"""A run over real stickers and a folder of odd and broken files: it finishes, and says exactly what it could not read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from PIL import Image

from tests.faults.test_bad_input import FAST, ROOT, environment


def reads_with_pillow(path: Path) -> bool:
    """Whether Pillow gets through every frame."""
    try:
        with Image.open(path) as image:
            for number in range(getattr(image, "n_frames", 1)):
                image.seek(number)
                image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False
    return True


def test_the_run_finishes_and_lists_what_cannot_be_read(real_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, str(ROOT / "rdtf_ds" / "train.py"), "--deepspeed_config", str(ROOT / "ds_configs" / "tiny_cpu.json")]
    command += ["--data_dir", str(real_data), "--output_dir", str(out), "--max_steps", "2", *FAST]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2

    listed = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert all(entry["reason"] for entry in listed)
    candidates = [path for path in real_data.rglob("*") if path.suffix in (".gif", ".png", ".apng", ".webp")]
    # Pillow counts a frame that leaves the canvas as canvas; players, and we, cut it off.
    clipped = {"decompression_bomb_extents.gif"}
    unreadable = {str(path.relative_to(real_data)) for path in candidates if path.name not in clipped and not reads_with_pillow(path)}
    assert {entry["path"] for entry in listed} == unreadable
    assert f"{len(listed)} broken" in done.stderr
