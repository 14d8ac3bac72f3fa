"""`make demo` keeps its promises: minutes of training, so a soak test."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return __import__("demo")


class Pipeline:
    """Remembers what it was asked for; each clip is grey in the shade of its seed."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], int]] = []

    def __call__(self, captions: list[str], *, num_frames: int, seeds: int) -> Any:
        self.calls.append((captions, seeds))
        return SimpleNamespace(frames=[np.full((num_frames, 4, 4, 3), seeds % 256, np.uint8) for _ in captions])


def test_other_noise_draws_the_same_prompts(demo: ModuleType, tmp_path: Path) -> None:
    asked, calls = {}, {}
    for noise_seed in (0, 1000):
        pipeline = Pipeline()
        asked[noise_seed] = demo.draw_text_clips(pipeline, tmp_path / str(noise_seed), demo.prompts(0), noise_seed)
        calls[noise_seed] = pipeline.calls
    assert [sticker for sticker, _ in asked[0]] == [sticker for sticker, _ in asked[1000]]
    assert len(asked[0]) == demo.CLIPS and all(path.is_file() for _, path in asked[0])
    assert [captions for captions, _ in calls[0]] == [captions for captions, _ in calls[1000]]
    seeds = [seed for noise_seed in calls for _, seed in calls[noise_seed]]
    assert len(set(seeds)) == len(seeds) == 2 * demo.CLIPS // demo.BATCH, "every batch has noise of its own"


def percent(text: str, name: str) -> int:
    found = re.search(rf"^{re.escape(name)}: (\d+) %", text, re.MULTILINE)
    assert found is not None, f"the demo does not print '{name}'"
    return int(found[1])


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_clips_from_text_alone_show_what_was_asked(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    command = [sys.executable, str(ROOT / "tools" / "demo.py"), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout
    print(said)
    assert percent(said, "colour match") >= 70 and percent(said, "colour match on held-out pairs") >= 70
    assert percent(said, "colour match with prompts shuffled") <= 30, "1 of 6 colours is chance"
    assert percent(said, "motion match") >= 50
    assert percent(said, "change between frames against training clips") >= 50
    share = re.search(r"^validation while training: ([\d.]+)% of the time", said, re.MULTILINE)
    losses = re.search(r"^loss on held-out stickers: ([\d.]+) after \d+ steps, ([\d.]+) after 1500", said, re.MULTILINE)
    assert share is not None and 0 < float(share[1]) <= 5 and losses is not None and float(losses[2]) < float(losses[1])
    assert len(list((out / "run" / "samples" / "step00001500").glob("*.gif"))) >= 2, "a round of clips"
    assert len(list((out / "gifs").glob("*.gif"))) >= 48 and (out / "contact_sheet.png").stat().st_size > 10_000
