"""The loader's benchmark at its smallest: both loaders get the same clips, what is compared is what is said. Times are not asserted."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from rdtf_ds.benchmarks import loader, plain_loader
from rdtf_ds.benchmarks.plain_loader import PlainStickers, on_white
from rdtf_ds.benchmarks.timing import Timing
from rdtf_ds.data.clips.clip import DecodeLimits
from rdtf_ds.data.clips.writing import write_clip
from rdtf_ds.data.indexing.index_building import build_index
from rdtf_ds.errors import UserError


class KMeans:
    """As scikit-learn's, for frames that are sorted by what they show: equal parts."""

    def __init__(self, n_clusters: int) -> None:
        self.k = n_clusters

    def fit(self, features: np.ndarray) -> KMeans:
        parts = np.array_split(features[np.argsort(features.sum(axis=1))], self.k)
        self.centres = np.stack([part.mean(axis=0) for part in parts])
        return self

    def transform(self, features: np.ndarray) -> np.ndarray:
        return np.linalg.norm(features[:, None] - self.centres, axis=2)


def imread(path: Path, **_: Any) -> np.ndarray:
    with Image.open(path) as image:
        return np.stack([np.asarray(frame.convert("RGBA")) for frame in ImageSequence.Iterator(image)])


def resize(frames: torch.Tensor, size: list[int], antialias: bool) -> torch.Tensor:
    assert antialias
    resized = torch.nn.functional.interpolate(frames.float(), size, mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for libraries that only the benchmark's users install; the benchmark's own code is what is tested."""
    stand_ins = SimpleNamespace(imread=imread), SimpleNamespace(KMeans=KMeans), SimpleNamespace(resize=resize)
    monkeypatch.setattr(plain_loader, "load_peers", lambda: stand_ins)
    monkeypatch.setattr(loader, "load_peers", lambda: stand_ins)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "SIZE", 32)
    monkeypatch.setattr(loader, "FRAMES", 12)
    monkeypatch.setattr(loader, "CLIP_DIM", 8)
    monkeypatch.setattr(loader, "T5_DIM", 8)


def report(*arguments: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    loader.add_arguments(parser)
    return loader.run(parser.parse_args(["--clips", "3", "--samples", "2", "--repetitions", "1", *arguments]))


def row(made: dict[str, Any], name: str, compared_with: str | None) -> dict[str, Any]:
    (found,) = (row for row in made["rows"] if (row["name"], row["compared_with"]) == (name, compared_with))
    return found


def test_every_row_stands_beside_its_peer_and_bar(peers: None, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RDTF_REAL_DATA", raising=False)
    cpus = os.sched_getaffinity(0)
    made = report()
    assert os.sched_getaffinity(0) == cpus
    ours = row(made, "samples from WebP", "plain loader")
    assert ours["bar"] == 4 and ours["at_least"]
    assert ours["ratio"] == pytest.approx(ours["value"] / row(made, "plain loader", None)["value"])
    beside_bar = row(made, "samples from WebP", "the bar of 20 a second")
    assert beside_bar["value"] == ours["value"] and beside_bar["holds"] == (ours["value"] >= 20)
    cached = row(made, "samples from the latent cache", "the bar of 500 a second")
    assert cached["ratio"] == pytest.approx(cached["value"] / 500) and cached["bar"] == 1
    varieties = [row for row in made["rows"] if row["name"].startswith("variety of")]
    assert len(varieties) == 6 and all(row["bar"] is None for row in varieties), "generated clips have no bar"
    assert any("3 generated clips of 12 frames and 32 px" in note for note in made["notes"])


def test_the_cache_alone_needs_no_peers(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RDTF_REAL_DATA", raising=False)
    made = report("--cached")
    assert [row["name"] for row in made["rows"]] == [loader._CACHED_SAMPLES, loader._FULL_TEXT]
    assert [row["bar"] for row in made["rows"]] == [1, None]


def test_what_a_clip_costs_once_is_shared_by_its_samples() -> None:
    timings = {
        "samples from WebP": Timing((2.0, 2.0)), "plain loader": Timing((16.0, 16.0)),
        "decode every frame": Timing((3.0, 3.0)), "decode every frame, imageio": Timing((6.0, 6.0)),
    }  # fmt: skip
    rows = {(row.name, row.compared_with): row for row in loader._decoded_rows(timings, samples=40, clips=30, index_s=0.2)}
    assert rows["samples from WebP", "plain loader"].value == 20 and rows["samples from WebP", "plain loader"].ratio == 8
    assert rows["plain loader", None].value == 2.5
    assert rows["index a clip, once", "a sample"].value == 200 and rows["index a clip, once", "a sample"].ratio == 4
    shared = rows["samples from WebP, indexing shared by 10 of each clip", "plain loader"]
    assert shared.value == pytest.approx(1 / (0.05 + 0.02)) and shared.ratio == pytest.approx(shared.value / 2.5)
    assert rows["decode every frame", "decode every frame, imageio"].value == 100
    assert rows["decode every frame", "decode every frame, imageio"].ratio == 0.5


def test_real_clips_of_the_right_shape_are_taken_with_their_captions(small: None, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shapes = {"a": (12, 32), "b": (11, 32), "c": (12, 16), "d": (12, 32), "e": (12, 32)}
    for shade, (name, (frames, side)) in enumerate(shapes.items()):
        drawn = np.full((frames, side, side, 4), 40 * shade, np.uint8) + np.arange(frames, dtype=np.uint8)[:, None, None, None]
        write_clip(drawn, source / f"{name}.webp", 40)
        (source / f"{name}.txt").write_text(f"clip {name}")
    loader.take_clips(source, tmp_path / "taken", 2)
    taken = {path.name: path.read_bytes() for path in sorted((tmp_path / "taken").glob("*.webp"))}
    assert list(taken.values()) == [(source / f"{name}.webp").read_bytes() for name in "ae"]
    assert [(tmp_path / "taken" / f"00{n}.txt").read_text() for n in (0, 1)] == ["clip a", "clip e"]
    for name in "ade":
        (source / f"{name}.webp").unlink()
    with pytest.raises(UserError, match="no animated WebP of 12 frames, 32×32"):
        loader.take_clips(source, tmp_path / "none", 2)


def test_generated_clips_have_the_shape_of_real_ones(small: None, tmp_path: Path) -> None:
    loader.generate(tmp_path / "clips", 3)
    index = build_index(tmp_path / "clips", DecodeLimits(), tmp_path / "index")
    assert {(row.format, row.num_frames, row.width, row.height, row.has_alpha) for row in index.rows} == {("webp", 12, 32, 32, True)}
    assert len({row.content for row in index.rows}) == 3 and all(row.caption for row in index.rows)


@pytest.mark.parametrize("all_tokens", [False, True])
def test_the_cache_holds_what_a_run_asks_of_it(small: None, tmp_path: Path, all_tokens: bool) -> None:
    loader.generate(tmp_path / "clips", 2)
    index = build_index(tmp_path / "clips", DecodeLimits(), tmp_path / "index")
    cached = loader.fill_cache(index, tmp_path / "cache", all_tokens)
    batch = loader._dataset(index, cached)[(next(loader.plans_of(index)),)]
    assert batch.frames is None and batch.features is not None
    assert batch.features.latents.shape[1:] == (4, len(batch.frame_mask[0]), 32, 32) and batch.features.latents.dtype == torch.float16
    used = (batch.features.t5 != 0).any(dim=2).sum()
    assert batch.features.clip.shape == batch.features.t5.shape == (1, 77, 8)
    assert used == 77 if all_tokens else 3 <= used == 2 * len(index.rows[0].caption.split()) + 1


def test_the_plain_loader_makes_what_it_says(peers: None, tmp_path: Path) -> None:
    drawn = np.zeros((9, 20, 20, 4), np.uint8)
    drawn[..., 0], drawn[..., 3] = np.arange(9)[:, None, None] * 20, 255
    write_clip(drawn, tmp_path / "clip.webp", 40)
    plain = PlainStickers([(tmp_path / "clip.webp", "red")], 16, (4, 2, 2))
    frames, given, caption, timestep, noise = plain.sample(0, 3)
    assert frames.shape == (3, 3, 16, 16) and frames.dtype == torch.uint8
    shades = frames[0].float().mean(dim=(1, 2))
    assert (shades.diff() > 40).all(), "one of each third, in order of time"
    assert given.shape == (3,) and given.dtype == torch.bool and caption == "red" and 0 <= timestep < 1000 and noise.shape == (4, 3, 2, 2)
    assert len(plain) == 1 and 3 <= plain[0][0].shape[1] <= 8


def test_transparency_shows_white() -> None:
    pixels = torch.tensor([[0, 0, 0, 0], [10, 20, 30, 255], [0, 100, 255, 128]], dtype=torch.uint8).view(3, 4, 1, 1)
    assert on_white(pixels).view(3, 3).tolist() == [[255, 255, 255], [10, 20, 30], [127, 177, 255]]


def test_absent_peers_are_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imageio.v3", None)
    with pytest.raises(UserError, match=r"rdtf-ds\[bench\].*--cached"):
        plain_loader.load_peers()
    with pytest.raises(UserError, match="at least 1"):
        report("--samples", "0")
