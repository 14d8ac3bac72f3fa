"""The settings of an evaluation's folder: whom they bind, and files that cannot be written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rdtf_ds.errors import UserError
from rdtf_ds.evaluation.clip_making import REAL
from rdtf_ds.evaluation.evaluating import SETTINGS, settle

FIRST: dict[str, Any] = {"steps": 25, "visible": {"i2v": "1000", "prediction": "1110"}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a run that failed before it made a clip."""
    settle(tmp_path, FIRST)
    for name in (REAL, "i2v", "prediction", "index"):
        (tmp_path / name).mkdir()
    return tmp_path


def kept(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / SETTINGS).read_text())
    return found


def clip(folder: Path, where: str) -> None:
    (folder / where / "0.png").write_bytes(b"")


def test_settings_that_no_clip_was_made_with_bind_nobody(folder: Path) -> None:
    assert kept(folder) == FIRST
    other = {"steps": 50, "visible": {"i2v": "0010"}}
    settle(folder, other)
    assert kept(folder) == other
    (folder / SETTINGS).write_text("torn")
    settle(folder, FIRST)
    assert kept(folder) == FIRST


@pytest.mark.parametrize("where", [REAL, "i2v", "interpolation", "prediction"])
def test_with_clips_they_bind(folder: Path, where: str) -> None:
    (folder / where).mkdir(exist_ok=True)
    clip(folder, where)
    settle(folder, FIRST)
    with pytest.raises(UserError, match=r"other settings is there \(steps: 25 there, 50 asked for\)\. Name another folder"):
        settle(folder, FIRST | {"steps": 50})
    assert kept(folder) == FIRST
    (folder / SETTINGS).write_text("[]")
    with pytest.raises(UserError, match=r"settings\.json' cannot be read .*Name another folder by --out, or remove this one"):
        settle(folder, FIRST)


def test_a_task_is_bound_by_its_own_clips_alone(folder: Path) -> None:
    clip(folder, "i2v")
    settle(folder, FIRST | {"visible": {"prediction": "1100"}})
    assert kept(folder)["visible"] == {"i2v": "1000", "prediction": "1100"}
    settle(folder, FIRST | {"visible": {"interpolation": "0101"}})
    assert kept(folder)["visible"] == {"i2v": "1000", "interpolation": "0101"}, "prediction never had clips"
    with pytest.raises(UserError, match="visible: i2v 1000 there, i2v 0010 asked for"):
        settle(folder, FIRST | {"visible": {"i2v": "0010", "interpolation": "0101"}})


def test_clips_of_unknown_settings_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "holiday").mkdir()
    clip(tmp_path, "holiday")
    with pytest.raises(UserError, match=r"clips are there, but no settings\.json"):
        settle(tmp_path, FIRST)
    assert not (tmp_path / SETTINGS).exists()


def test_settings_that_cannot_be_written_are_told(tmp_path: Path) -> None:
    (tmp_path / SETTINGS).mkdir()
    with pytest.raises(UserError, match=r"settings\.json' cannot be written: Is a directory\. .*start again"):
        settle(tmp_path, FIRST)
