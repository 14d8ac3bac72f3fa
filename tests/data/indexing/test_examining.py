"""Several clips at once: features, progress, segments as they fill, decoders that die, disks that are full."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rdtf_ds.data.clips.clip import DecodeLimits, ExaminedClip, Place
from rdtf_ds.data.clips.decoding import examine_clip
from rdtf_ds.data.indexing import examining
from rdtf_ds.data.indexing.index_building import build_index
from rdtf_ds.data.indexing.index_segments import IndexSettings, read_segments
from rdtf_ds.errors import UserError
from tests.data.indexing.building import LIMITS, Decoder, Describer, clip, committed, many_clips, taken
from tests.faults.fork_server import ROOT


def test_features_of_a_model_are_made_in_this_process_one_clip_at_a_time(folder: Path, tmp_path: Path) -> None:
    describer = Describer()
    index = build_index(folder, LIMITS, tmp_path / "index", describer=describer, workers=2)
    assert describer.most == 1 and index.settings.features == "mean"
    expected = describer(examine_clip(folder / "a" / "z.webp", LIMITS, describe_size=4).frames)
    assert np.array_equal(index.frame_features(1), expected.astype(np.float32)) and index.frame_features(1).shape == (5, 3)


def test_progress_is_told_and_the_bar_comes_late(
    folder: Path, decoder: type[Decoder], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int]] = []
    build_index(folder, LIMITS, on_progress=lambda *numbers: told.append(numbers))
    assert told == [(number, 5) for number in range(1, 6)]
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(examining, "BAR_AFTER_S", 0.0)
    build_index(folder, LIMITS)
    shown = capsys.readouterr()
    assert "5/5" in shown.err and shown.out == ""


def test_each_window_of_a_video_is_a_sign_of_life(tmp_path: Path, decoder: type[Decoder]) -> None:
    clip(tmp_path / "data" / "a.gif", 10)
    clip(tmp_path / "data" / "b.png", 5)
    told: list[tuple[int, int]] = []
    build_index(tmp_path / "data", DecodeLimits(), video_clip_s=1.0, on_progress=lambda *numbers: told.append(numbers), workers=1)
    assert len(told) == 3 + 2 and told[:3] == [(0, 2)] * 3 and told[-1] == (2, 2), "three windows, two files"


def test_segments_are_committed_as_they_fill(tmp_path: Path, decoder: type[Decoder], monkeypatch: pytest.MonkeyPatch) -> None:
    root = many_clips(tmp_path / "data", 10)

    def segments(folder: Path) -> list[int]:
        build_index(root, DecodeLimits(), folder, workers=1)
        return sorted(Counter(read_segments(folder, IndexSettings(root, DecodeLimits()))["segment"].to_pylist()).values())

    assert segments(tmp_path / "one") == [10]
    monkeypatch.setattr(examining, "SEGMENT_CLIPS", 4)
    assert segments(tmp_path / "filled") == [2, 4, 4]
    monkeypatch.setattr(examining, "SEGMENT_S", -1.0)
    assert segments(tmp_path / "late") == [1] * 10


def test_what_was_examined_before_a_failure_is_kept(tmp_path: Path, decoder: type[Decoder], monkeypatch: pytest.MonkeyPatch) -> None:
    root, folder = many_clips(tmp_path / "data", 6), tmp_path / "index"
    decoder.faults["04.gif"] = RuntimeError("a mistake of ours, and no clip's")
    with pytest.raises(RuntimeError, match="no clip's"):
        build_index(root, DecodeLimits(), folder, workers=1)
    assert decoder.closed == [True] and threading.active_count() == len([t for t in threading.enumerate() if "examine" not in t.name])
    done = committed(root, folder)
    assert set(done) <= {f"{number:02d}.gif" for number in (0, 1, 2, 3, 5)} and len(done) >= 3
    decoder.faults.clear()
    taken(decoder)
    build_index(root, DecodeLimits(), folder)
    assert taken(decoder) == sorted({f"{number:02d}.gif" for number in range(6)} - set(done))


def test_a_disk_that_takes_nothing_or_gives_nothing_back(tmp_path: Path, decoder: type[Decoder], monkeypatch: pytest.MonkeyPatch) -> None:
    root = many_clips(tmp_path / "data", 3)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(examining, "write_segment", full)
    with pytest.raises(UserError, match=r"index .* cannot be written \(No space left on device\).*rdtf.data.index_dir"):
        build_index(root, DecodeLimits(), tmp_path / "index")
    monkeypatch.setattr(examining, "write_segment", lambda *_: 1)
    with pytest.raises(UserError, match="3 clips that were just examined cannot be read back"):
        build_index(root, DecodeLimits(), tmp_path / "index")


def test_the_index_does_not_depend_on_who_was_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers, and the order in which clips are done."""
    root = many_clips(tmp_path / "data", 12)
    monkeypatch.setattr(examining, "SEGMENT_CLIPS", 5)
    indexes = []
    for number, workers in enumerate((1, 2, 4)):

        class Slow(Decoder):
            def examine(self, place: Place, *more: Any, **options: Any) -> ExaminedClip:
                time.sleep(0.002 * ((int(place.path.stem) * 7 + number) % 5))  # noqa: B023  called in this round alone
                return super().examine(place, *more, **options)

        monkeypatch.setattr(examining, "DecoderPool", Slow)
        indexes.append(build_index(root, DecodeLimits(), tmp_path / str(number), workers=workers))
    assert indexes[0] == indexes[1] == indexes[2] and len({index.fingerprint for index in indexes}) == 1
    for clip_id in range(12):
        features = [index.frame_features(clip_id) for index in indexes]
        assert np.array_equal(features[0], features[1]) and np.array_equal(features[0], features[2])


def test_clips_that_harm_their_decoder_are_broken_for_that_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real pool, whose children do what the name of a clip says."""
    command = (sys.executable, str(ROOT / "tests" / "faults" / "hostile_decoder.py"))
    pool = examining.DecoderPool
    monkeypatch.setattr(examining, "DecoderPool", lambda size: pool(size, command=command))
    root = tmp_path / "data"
    for name in ("fine", "sleeps", "segfaults", "exits", "allocates_10_gb", "killed", "well"):
        clip(root / f"{name}.mp4", 4, len(name))
    index = build_index(root, DecodeLimits(timeout_s=2.0), tmp_path / "index", workers=2)
    assert [row.path for row in index.rows if row.status == "trainable"] == ["fine.mp4", "well.mp4"]
    reasons = {problem.path: problem.reason for problem in index.problems}
    assert "rdtf.data.decode_timeout_s" in reasons["sleeps.mp4"] and "SIGSEGV" in reasons["segfaults.mp4"]
    assert "exit code 3" in reasons["exits.mp4"] and "MiB" in reasons["allocates_10_gb.mp4"]
    transient = index.columns("path", "transient").to_pylist()
    assert {row["path"] for row in transient if row["transient"]} == {"sleeps.mp4", "killed.mp4"}
