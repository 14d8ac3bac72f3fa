"""`make demo` keeps its promises: minutes of training, so a soak test."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


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
    losses = re.search(r"^loss on held-out stickers: ([\d.]+) after \d+ steps, ([\d.]+) after 1200", said, re.MULTILINE)
    assert share is not None and 0 < float(share[1]) <= 5 and losses is not None and float(losses[2]) < float(losses[1])
    assert len(list((out / "run" / "samples" / "step00001200").glob("*.gif"))) >= 2, "a round of clips"
    assert len(list((out / "gifs").glob("*.gif"))) >= 48 and (out / "contact_sheet.png").stat().st_size > 10_000
