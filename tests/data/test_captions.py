"""Captions: where they come from, and how words are hidden."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdtf_ds.data.captions import hide_words, read_captions
from rdtf_ds.errors import UserError

CAPTIONS = st.text(alphabet=st.sampled_from("ab é#,-  \n\t猫红が。、！カ한글Ａ𠀀"), max_size=30)


def hide(caption: str, probability: float, seed: int = 0) -> str:
    return hide_words(caption, probability, np.random.default_rng(seed))


@pytest.mark.parametrize(
    ("caption", "hidden"),
    [
        ("a red cat", "# # #"),
        ("  a\tred \n cat ", "  #\t# \n # "),
        ("don't stop, cat!", "# # #"),
        ("红色的猫", "####"),
        ("红色cat跑。好！", "####。#！"),
        ("ねこ、ネコー", "##、###"),
        ("고양이 둘", "### #"),
        ("𠀀々", "##"),
        ("ＡＢＣ　猫", "#　#"),
        ("", ""),
    ],
)
def test_all_words_hidden(caption: str, hidden: str) -> None:
    assert hide(caption, 1.0) == hidden
    assert hide(caption, 0.0) == caption


@given(caption=CAPTIONS, low=st.floats(0, 1), high=st.floats(0, 1), seed=st.integers(0, 1000))
def test_more_is_hidden_at_a_higher_probability_and_draws_stay_in_step(caption: str, low: float, high: float, seed: int) -> None:
    low, high = sorted((low, high))
    first, second = np.random.default_rng(seed), np.random.default_rng(seed)
    less, more = hide_words(caption, low, first), hide_words(caption, high, second)
    assert first.random() == second.random()  # the same number of draws
    if "#" not in caption:
        assert less.count("#") <= more.count("#") <= hide(caption, 1.0).count("#")
    assert [c for c in less if c.isspace() or c in "。、！"] == [c for c in caption if c.isspace() or c in "。、！"]


def test_each_word_is_hidden_on_its_own_with_the_given_probability() -> None:
    hidden = np.array([[word == "#" for word in hide("w " * 20, 0.3, seed).split()] for seed in range(500)])
    assert abs(hidden.mean() - 0.3) < 0.02  # 10 000 draws: 4 standard deviations
    assert np.abs(hidden.mean(axis=0) - 0.3).max() < 0.1
    assert len({tuple(row) for row in hidden}) > 400


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_impossible_probability(probability: float) -> None:
    with pytest.raises(ValueError, match="0..1"):
        hide("a", probability)


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def test_metadata_and_sidecars_in_folders(tmp_path: Path) -> None:
    touch(tmp_path, "a.gif", "b.webp", "sub/c.png", "sub/d.mp4", "sub/e.gif")
    rows = [{"file_name": "a.gif", "text": " a “quoted” cat "}, {"file_name": "sub/c.png", "text": "see"}]
    (tmp_path / "metadata.jsonl").write_text("\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    (tmp_path / "sub" / "metadata.csv").write_text('file_name,text,extra\r\nd.mp4,"two, words",1\r\n')
    (tmp_path / "sub" / "e.txt").write_text("side\n")
    (tmp_path / "a.txt").write_text("not this one")
    (tmp_path / "readme.txt").write_text("no clip of mine")
    assert read_captions(tmp_path) == {"a.gif": "a “quoted” cat", "sub/c.png": "see", "sub/d.mp4": "two, words", "sub/e.gif": "side"}


def test_absent_files_are_counted_and_the_first_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.gif")
    lines = [json.dumps({"file_name": f"{name}.gif", "text": "x"}) for name in "abcdefgh"]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError) as caught:
        read_captions(tmp_path)
    message = str(caught.value)
    assert "7 files" in message and "'b.gif'" in message and "'f.gif'" in message and "2 more" in message and "'g.gif'" not in message
    assert "metadata.jsonl:2" in message


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"file_name": "a.gif"', "metadata.jsonl:2 is not JSON"),
        ('["a.gif", "x"]', "is not an object"),
        ('{"file_name": "a.gif"}', "needs file_name and text"),
        ('{"file_name": 3, "text": "x"}', "both strings"),
        ('{"file_name": "../a.gif", "text": "x"}', "leaves its folder"),
        ('{"file_name": "/etc/passwd", "text": "x"}', "leaves its folder"),
        ('{"file_name": "a.gif", "text": "other"}', "different captions"),
    ],
)
def test_malformed_metadata_names_the_line(tmp_path: Path, line: str, words: str) -> None:
    touch(tmp_path, "a.gif")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.gif", "text": "x"}\n' + line)
    with pytest.raises(UserError, match=words):
        read_captions(tmp_path)


def test_metadata_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_bytes(b"file_name,text\na.gif,\xff\xfe\n")
    with pytest.raises(UserError, match="UTF-8"):
        read_captions(tmp_path)
