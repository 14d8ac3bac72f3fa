"""cache.json: what is kept of it, and which differences between a cache and a run are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rdtf_ds.data.cache_header import HEADER, CacheError, CacheHeader, make_command, read_header, write_header


def identity(**changes: Any) -> dict[str, Any]:
    return {
        "rdtf.encoders.clip": {"source": "tiny", "weights": None},
        "rdtf.data.image_size": 32,
        "rdtf.data.background": [255, 255, 255],
    } | changes


HEAD = CacheHeader(identity(), 8, 48, 4, 16, 24)


def test_a_header_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write_header(tmp_path, HEAD)
    assert read_header(tmp_path) == HEAD
    assert read_header(tmp_path).differences(identity()) == []


def test_every_key_that_differs_is_told_with_both_values() -> None:
    told = HEAD.differences(identity(**{"rdtf.data.image_size": 64, "rdtf.data.background": [0, 0, 0], "precision": "fp16"}))
    assert told == [
        'precision is "fp16" here, but the cache was made with null',
        "rdtf.data.background is [0, 0, 0] here, but the cache was made with [255, 255, 255]",
        "rdtf.data.image_size is 64 here, but the cache was made with 32",
    ]


@pytest.mark.parametrize(
    ("cached", "own", "same"),
    [
        (("a", "1f"), ("a", "1f"), True),
        (("a", "1f"), ("b", "1f"), True),  # a copy elsewhere
        (("a", "1f"), ("a", "2f"), False),  # the folder's weights were replaced
        (("a", "1f"), ("a", None), True),  # no weights on this machine: the name has to do
        (("a", None), ("b", "1f"), False),
        (("a", None), ("a", None), True),
        (("a", "1f", "7e"), ("b", "1f", "7e"), True),
        (("a", "1f", "7e"), ("a", "1f", "8e"), False),  # another vocabulary
        (("a", "1f", "7e"), ("a", "1f", None), True),
        (("a", None, "7e"), ("a", None, "8e"), False),
        (("a", None, "7e"), ("b", None, "7e"), False),
    ],
)
def test_encoders_are_told_apart_by_their_weights_else_by_name(cached: Any, own: Any, same: bool) -> None:
    key = "rdtf.encoders.clip"
    header = CacheHeader(identity(**{key: dict(zip(("source", "weights", "tokenizer"), cached, strict=False))}), 8, 48, 4, 16, 24)
    told = header.differences(identity(**{key: dict(zip(("source", "weights", "tokenizer"), own, strict=False))}))
    assert (told == []) == same
    if not same:
        assert told[0].startswith(f'{key} is "{own[0]}"') and f'"{cached[0]}"' in told[0]
        assert all(hashed in told[0] for hashed in (*cached[1:], *own[1:]) if hashed)


def test_what_is_no_cache_is_said_with_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="is no feature cache") as caught:
        read_header(tmp_path)
    assert f"tools/cache_dataset.py --deepspeed_config CONFIG [--set ...] --data_dir DIR --out {tmp_path}" in str(caught.value)
    assert make_command("c", "d").endswith("--data_dir d --out c")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 2}', '{"format": 2, "other": 2}'])
def test_a_damaged_header_is_a_users_error(tmp_path: Path, text: str) -> None:
    (tmp_path / HEADER).write_text(text)
    with pytest.raises(CacheError, match="cannot be read"):
        read_header(tmp_path)


def test_another_format_is_refused_with_the_command_for_a_new_one(tmp_path: Path) -> None:
    write_header(tmp_path, HEAD)
    stored = json.loads((tmp_path / HEADER).read_text())
    assert stored["format"] == 2
    (tmp_path / HEADER).write_text(json.dumps(stored | {"format": 1}))
    with pytest.raises(CacheError, match="is of format 1, .* reads 2. Make a cache in another folder: python tools/cache"):
        read_header(tmp_path)
