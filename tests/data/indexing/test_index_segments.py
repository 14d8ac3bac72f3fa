"""Segments: committed whole or not at all, numbered on, never changed; what is damaged is told and examined anew."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rdtf_ds.data.clips.clip import DecodeLimits
from rdtf_ds.data.indexing.index_segments import (
    EXAMINED,
    FOUND,
    IndexSettings,
    found_table,
    read_features,
    read_segments,
    rows_folder,
    write_segment,
)
from tests.data.made_index import broken, features_of, found, settings_of

CLIPS = [found("a.gif", 4), found("b.gif", 9), broken("c.gif", "truncated"), found("d.gif", 3)]


def write(folder: Path, settings: IndexSettings, clips: list[dict] = CLIPS) -> int:
    return write_segment(folder, settings, clips, [features_of(clip, number, settings) for number, clip in enumerate(clips)])


def test_what_was_written_is_read_with_its_segment(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    assert read_segments(tmp_path, settings).num_rows == 0
    assert [write(tmp_path, settings), write(tmp_path, settings, CLIPS[:2])] == [1, 2]
    rows = read_segments(tmp_path, settings)
    assert rows.column_names == [*EXAMINED.names, "segment"] and rows["segment"].to_pylist() == [1, 1, 1, 1, 2, 2]
    assert rows.select(FOUND.names).slice(0, 4).to_pylist() == CLIPS
    assert rows["kept"].to_pylist() == [4, 5, 0, 3, 4, 5]
    assert rows["features_start"].to_pylist() == [0, 4, 9, 9, 0, 4]
    assert sorted(path.name for path in rows_folder(tmp_path, settings).iterdir()) == [
        "000001.arrow", "000001.bin", "000002.arrow", "000002.bin",
    ]  # fmt: skip


def test_features_come_back_and_damage_is_noticed(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    number = write(tmp_path, settings)
    for at, row in enumerate(read_segments(tmp_path, settings).to_pylist()):
        where = (number, row["features_start"], row["kept"], row["features_crc"])
        features = read_features(tmp_path, settings, *where)
        assert features.dtype == np.uint8 and features.shape == (row["kept"], 192)
        assert features[:, 0].tolist() == features[:, -1].tolist() == [10 * at + frame for frame in range(row["kept"])]
    path = rows_folder(tmp_path, settings) / "000001.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="checksum differs"):
        read_features(tmp_path, settings, *where)
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="575 bytes of 576"):
        read_features(tmp_path, settings, *where)


def test_features_of_a_model_are_kept_as_they_are(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, features="clip:x", dim=3, dtype="float16")
    features = np.linspace(-2, 2, 12).reshape(4, 3).astype(np.float16)
    number = write_segment(tmp_path, settings, CLIPS[:1], [features])
    row = read_segments(tmp_path, settings).to_pylist()[0]
    assert np.array_equal(read_features(tmp_path, settings, number, 0, 4, row["features_crc"]), features)
    assert np.array_equal(read_features(tmp_path, settings, number, 0, 4, row["features_crc"]).shape, (4, 3))
    for wrong in (features.astype(np.float32), features[:, :2], features[0]):
        with pytest.raises(ValueError, match="features must be float16"):
            write_segment(tmp_path, settings, CLIPS[:1], [wrong])
    assert read_segments(tmp_path, settings).num_rows == 1


def test_a_row_must_be_whole(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    row = {name: value for name, value in CLIPS[0].items() if name != "reason"}
    with pytest.raises(ValueError, match="'reason' has 1 nulls"):
        write(tmp_path, settings, [row])


@pytest.mark.parametrize("killed_at", [0, 1])
def test_a_segment_cut_short_is_not_there_and_nothing_of_it_is_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    """Killed before the first or before the second of its two files got its name."""
    settings, rename, done = settings_of(tmp_path), os.replace, []

    def killed(source: Path, target: Path) -> None:
        if len(done) == killed_at:
            raise KeyboardInterrupt
        done.append(target)
        rename(source, target)

    write(tmp_path, settings)
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, settings, CLIPS[:2])
    monkeypatch.undo()
    assert [path.suffix for path in done] == [".bin"][:killed_at]
    assert read_segments(tmp_path, settings)["segment"].to_pylist() == [1, 1, 1, 1]
    assert write(tmp_path, settings, CLIPS[:1]) == 2 + killed_at
    assert read_segments(tmp_path, settings)["segment"].to_pylist() == [1, 1, 1, 1, 2 + killed_at]


def test_features_of_removed_rows_are_left_to_who_still_reads_them(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    write(tmp_path, settings), write(tmp_path, settings, CLIPS[:2])
    (rows_folder(tmp_path, settings) / "000002.arrow").unlink()
    left = (rows_folder(tmp_path, settings) / "000002.bin").read_bytes()
    assert write(tmp_path, settings, CLIPS[:1]) == 3
    assert (rows_folder(tmp_path, settings) / "000002.bin").read_bytes() == left


@pytest.mark.parametrize("change", [{"durations_ms": [1, 2**31]}, {"size": 2**63}, {"reason": "\udcff"}, {"width": "wide"}])
def test_what_no_column_holds_is_a_value_error(change: dict) -> None:
    found_table(CLIPS)
    with pytest.raises(ValueError, match="the index cannot hold"):
        found_table([*CLIPS, {**CLIPS[0], **change}])


@pytest.mark.parametrize("fault", ["truncated rows", "no features", "short features", "no Arrow file", "other text"])
def test_a_damaged_segment_is_left_out_told_and_not_written_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    settings = settings_of(tmp_path)
    write(tmp_path, settings), write(tmp_path, settings, CLIPS[:1])
    rows, features = (rows_folder(tmp_path, settings) / name for name in ("000002.arrow", "000002.bin"))
    if fault == "truncated rows":
        rows.write_bytes(rows.read_bytes()[:-20])
    elif fault == "no features":
        features.unlink()
    elif fault == "short features":
        features.write_bytes(features.read_bytes()[:-1])
    elif fault == "no Arrow file":
        rows.write_bytes(b"no Arrow file at all")
    else:
        rows.write_bytes(rows.read_bytes().replace(b"a.gif", b"a.gi\xff"))
    left = rows.read_bytes()
    with caplog.at_level(logging.WARNING):
        assert read_segments(tmp_path, settings)["segment"].to_pylist() == [1, 1, 1, 1]
    assert "000002.arrow" in caplog.text and "examined anew" in caplog.text
    assert write(tmp_path, settings, CLIPS[:1]) == 3 and rows.read_bytes() == left


def test_settings_name_what_depends_on_them(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    of_rows = [
        {"limits": DecodeLimits(max_frames=6)}, {"background": (0, 0, 0)}, {"features": "clip:x"}, {"dim": 3}, {"dtype": "float16"},
        {"video_clip_s": 2.0}, {"root": tmp_path / "other"},
    ]  # fmt: skip
    of_whole = [{"validation_fraction": 0.1}, {"group_pattern": "x"}, {"drop_duplicates": False}, {"manifest": "a.csv"}]
    rows, whole = settings.row_identity, settings.identity
    assert len({rows} | {replace(settings, **change).row_identity for change in of_rows}) == 8
    assert {replace(settings, **change).row_identity for change in of_whole} == {rows}
    assert len({whole} | {replace(settings, **change).identity for change in of_rows + of_whole}) == 12
    assert replace(settings, limits=DecodeLimits(max_frames=5, timeout_s=99)).identity == whole, "how long one waits changes no row"
    assert IndexSettings.from_json(settings.to_json()) == replace(settings, root=settings.root.resolve())
