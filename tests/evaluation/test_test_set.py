"""Which real clips are taken, from folders whose clips carry their number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rdtf_ds.data.clips.clip import DecodeLimits
from rdtf_ds.data.clips.writing import write_clip
from rdtf_ds.data.indexing.index import ClipIndex
from rdtf_ds.data.indexing.index_building import build_index
from rdtf_ds.errors import UserError
from rdtf_ds.evaluation.test_set import choose_clips, real_frames
from tests.data.folders import SIDE, numbered_clips

WHITE = (255, 255, 255)


def index_of(root: Path, held_out: float = 0.0) -> ClipIndex:
    return build_index(root, DecodeLimits(), root.parent / "index", workers=1, validation_fraction=held_out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 clips of 8 to 11 frames with captions of their own; 0 and 1 are too short, 2 and 3 have no caption."""
    root = tmp_path_factory.mktemp("set") / "clips"
    for number in range(40):
        frames = np.zeros((8 + number % 4 if number > 1 else (3, 7)[number], SIDE, SIDE, 3), np.uint8)
        frames[..., 0] = 10 * np.arange(len(frames))[:, None, None]
        frames[..., 1] = 5 * number
        write_clip(frames, root / f"{number}.png")
        (root / f"{number}.txt").write_text(f" clip {number}\n" if number not in (2, 3) else " \n")
    return root


@pytest.fixture(scope="module")
def index(folder: Path) -> ClipIndex:
    return index_of(folder)


@pytest.fixture(scope="module")
def split(folder: Path) -> ClipIndex:
    index = index_of(folder, held_out=0.4)
    assert 5 <= len(index.held_out) <= 25 and len(index.trainable)
    return index


def test_short_ones_and_those_without_caption_are_left_out_and_counted(index: ClipIndex) -> None:
    chosen = choose_clips(index, "all", 8, 500, seed=0)
    assert {clip.path for clip in chosen.clips} == {f"{number}.png" for number in range(4, 40)}
    assert (chosen.of, chosen.too_short, chosen.without_caption, chosen.held_out, chosen.captioned) == (36, 2, 2, False, True)
    assert all(clip.caption == f"clip {clip.path.removesuffix('.png')}" for clip in chosen.clips)
    assert choose_clips(index, "all", 7, 500, seed=0).too_short == 1
    for clip in chosen.clips:
        assert index.path(clip.clip_id) == clip.path and index.content(clip.clip_id) == clip.content


def test_the_seed_draws_and_fewer_are_the_first(index: ClipIndex) -> None:
    whole, again, other = (choose_clips(index, "all", 8, 500, seed) for seed in (0, 0, 1))
    assert whole == again
    assert [clip.path for clip in whole.clips] != [clip.path for clip in other.clips] != sorted(clip.path for clip in other.clips)
    few = choose_clips(index, "all", 8, 7, seed=0)
    assert [(clip.path, clip.seed) for clip in few.clips] == [(clip.path, clip.seed) for clip in whole.clips[:7]] and few.of == 36
    assert len({whole.fingerprint, other.fingerprint, few.fingerprint}) == 3 and len(whole.fingerprint) == 16
    assert [clip.name for clip in few.clips] == list("0123456") and [clip.name for clip in whole.clips[:2]] == ["00", "01"]
    assert whole == choose_clips(index, "all", 8, 36, seed=0) == choose_clips(index, "all", 8, 5000, seed=0), "files hang on the set alone"


def test_the_fingerprint_hangs_on_captions_and_frames(folder: Path, tmp_path: Path) -> None:
    numbered_clips(tmp_path / "clips", [8, 9])
    first = choose_clips(index_of(tmp_path / "clips"), "all", 8, 5, seed=0).fingerprint
    assert choose_clips(index_of(tmp_path / "clips"), "all", 7, 5, seed=0).fingerprint != first
    (tmp_path / "clips" / "0.txt").write_text("another")
    assert choose_clips(index_of(tmp_path / "clips"), "all", 8, 5, seed=0).fingerprint != first


def test_seeds_are_the_clips_own(index: ClipIndex) -> None:
    one, other = ({clip.path: clip.seed for clip in choose_clips(index, "all", 8, 500, seed).clips} for seed in (0, 1))
    assert len(set(one.values())) == len(one) and all(one[path] != other[path] for path in one)
    short = {clip.path: clip.seed for clip in choose_clips(index, "all", 9, 500, seed=0).clips}
    assert 0 < len(short) < len(one) and all(one[path] == seed for path, seed in short.items())


def test_held_out_ones_where_there_are_any(index: ClipIndex, split: ClipIndex) -> None:
    held_out = {split.path(clip_id) for clip_id in split.held_out.tolist()}
    for kind in ("auto", "held_out"):
        chosen = choose_clips(split, kind, 3, 500, seed=0)  # type: ignore[arg-type]
        assert chosen.held_out and {clip.path for clip in chosen.clips} <= held_out and len(chosen.clips) >= len(held_out) - 2
    every = choose_clips(split, "all", 8, 500, seed=0)
    assert not every.held_out and len(every.clips) == 36
    assert not choose_clips(index, "auto", 8, 500, seed=0).held_out
    with pytest.raises(UserError, match=r"--split held_out: no clip of .* is held out.*--config.*--split all"):
        choose_clips(index, "held_out", 8, 500, seed=0)


def test_no_clip_long_enough(index: ClipIndex, split: ClipIndex) -> None:
    with pytest.raises(UserError, match=r"none of the 40 clips in .* has 12 frames\. Ask for fewer: --frames"):
        choose_clips(index, "auto", 12, 500, seed=0)
    with pytest.raises(UserError, match=rf"none of the {len(split.held_out)} clips held out in .* has 12 frames"):
        choose_clips(split, "auto", 12, 500, seed=0)


def test_without_any_caption_all_are_taken(tmp_path: Path) -> None:
    numbered_clips(tmp_path / "clips", [8, 9, 3], caption="")
    chosen = choose_clips(index_of(tmp_path / "clips"), "auto", 8, 500, seed=0)
    assert len(chosen.clips) == 2 and not chosen.captioned and chosen.without_caption == 0 and chosen.too_short == 1


def test_its_frames_are_evenly_spaced(index: ClipIndex) -> None:
    by_path = {clip.path: clip for clip in choose_clips(index, "all", 8, 500, seed=0).clips}
    frames = real_frames(index, by_path["7.png"], SIDE, WHITE)  # 11 frames; frame f has red 10·f
    assert frames.shape == (8, SIDE, SIDE, 3) and frames[:, 0, 0, 1].tolist() == [35] * 8
    shown = [0, 1, 3, 4, 6, 7, 9, 10]  # 0, 10/7, 20/7 …, rounded
    assert list(by_path["7.png"].shown) == shown and frames[:, 0, 0, 0].tolist() == [10 * frame for frame in shown]
    assert real_frames(index, by_path["7.png"], 8, WHITE).shape == (8, 8, 8, 3)


def test_a_clip_that_has_changed_is_told(tmp_path: Path) -> None:
    numbered_clips(tmp_path / "clips", [8, 9])
    index = index_of(tmp_path / "clips")
    clip = choose_clips(index, "all", 8, 1, seed=0).clips[0]
    write_clip(np.zeros((9, SIDE, SIDE, 3), np.uint8), tmp_path / "clips" / clip.path)
    with pytest.raises(UserError, match=f"the clip '{clip.path}' was fine when it was indexed and cannot be read now: "):
        real_frames(index, clip, SIDE, WHITE)
