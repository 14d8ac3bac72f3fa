"""What a person sees in TensorBoard: the page is opened in headless Chromium, and the picture it shows is a GIF that moves."""

from __future__ import annotations

import html
import io
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from rdtf_ds.data.clips.writing import write_clip
from rdtf_ds.training.telemetry import RunLog
from tests.browsers import CHROMIUM

TAG = "samples/0 a red star rises"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a TensorBoard that shows a log written by RunLog."""
    folder = tmp_path_factory.mktemp("run")
    clip = np.zeros((5, 32, 32, 3), np.uint8)
    for number in range(5):
        clip[number, 4 * number : 4 * number + 8, 8:24] = (230, 40, 40)
    write_clip(clip, folder / "clip.gif")
    with RunLog(folder, rank=0, first_step=0, max_steps=10, config={"rdtf": {"seed": 7}}) as log:
        log.gif(TAG, folder / "clip.gif", 5, (32, 32))
    with SummaryWriter(str(folder / "tensorboard")) as board:
        for step in range(10):
            board.add_scalar("loss/mean", 1 / (1 + step), step)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", str(port), "--host", "127.0.0.1"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                if json.loads(fetch(f"{address}/data/plugin/scalars/tags")):
                    break
            except OSError:
                pass
            assert server.poll() is None, "TensorBoard did not start"
            time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait(20)


def fetch(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=20) as answer:
        return bytes(answer.read())


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_page_shows_scalars_and_the_gif(page: str, tmp_path: Path) -> None:
    dom = browse(page + "/#timeseries", tmp_path, "--dump-dom").decode()
    assert 'title="loss/mean"' in dom, "no card of the loss"
    assert f'title="{TAG}"' in dom, "no card of the sample"
    source = re.search(r'<img[^>]*alt="Image at step 4" src="([^"]+)"', dom)
    assert source is not None, "the card shows no picture"
    with Image.open(io.BytesIO(fetch(f"{page}/{html.unescape(source[1])}"))) as picture:
        assert (picture.format, picture.size, getattr(picture, "n_frames", 1)) == ("GIF", (32, 32), 5)


def browse(address: str, folder: Path, *options: str) -> bytes:
    """Standard output of headless Chromium on ``address``, given time to draw."""
    quiet = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update --disable-sync"
    command = [str(CHROMIUM), *quiet.split(), f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1400"]
    command += ["--virtual-time-budget=20000", *options, address]
    return subprocess.run(command, capture_output=True, timeout=180, check=True).stdout
