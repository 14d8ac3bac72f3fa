"""Captions: the files they come from, and how words are hidden."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdtf_ds.data.clips.clip import ClipError
from rdtf_ds.data.sources.captions import ROWS, hide_words, read_caption_file, read_rows
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


METADATA = (
    {"file_name": "./sub//a.gif", "text": " a “quoted” cat "},
    {"file_name": "b.webp", "text": "two, words", "group": "g"},
    {"file_name": "c.png", "text": ""},
    {"file_name": "猫.gif", "group": " 7 "},
)
EXPECTED = [("sub/a.gif", "a “quoted” cat", None), ("b.webp", "two, words", "g"), ("c.png", "", None), ("猫.gif", None, "7")]


def rows(file: Path, demand_text: bool = True) -> list[tuple[object, ...]]:
    table = read_rows(file, demand_text=demand_text)
    assert table.schema == ROWS
    return [tuple(row.values()) for row in table.to_pylist()]


def test_rows_of_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "m.JSONL"
    lines = [json.dumps({**row, "extra": [1]}, ensure_ascii=False) for row in METADATA]
    file.write_text("\ufeff" + "\r\n\n".join(lines) + "\n\n", encoding="utf-8")
    assert rows(file) == [(*row, 2 * number + 1) for number, row in enumerate(EXPECTED)]


def test_a_line_separator_in_a_text_ends_no_line(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"file_name": "a.gif", "text": "x\u2028\x85y"}\n', encoding="utf-8")
    assert rows(tmp_path / "m.jsonl") == [("a.gif", "x\u2028\x85y", None, 1)]
    (tmp_path / "m.csv").write_text('file_name,text\na.gif,x\u2028\x85y\n"b.gif","two\nlines"\nc.gif,z\n', encoding="utf-8")
    assert rows(tmp_path / "m.csv") == [("a.gif", "x\u2028\x85y", None, 2), ("b.gif", "two\nlines", None, 4), ("c.gif", "z", None, 5)]


def test_rows_of_csv(tmp_path: Path) -> None:
    file = tmp_path / "m.csv"
    with open(file, "w", encoding="utf-8-sig", newline="") as text:
        writer = csv.DictWriter(text, ["file_name", "extra", "text", "group"], restval="")
        writer.writeheader()
        writer.writerows(METADATA)
    assert rows(file) == [*((*row, number) for number, row in enumerate(EXPECTED[:3], start=2)), ("猫.gif", "", "7", 5)]


def test_what_a_row_must_have(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"file_name": "a.gif", "text": null}\n{"file_name": "b.gif", "group": 3}')
    assert rows(tmp_path / "m.jsonl", demand_text=False) == [("a.gif", None, None, 1), ("b.gif", None, "3", 2)]
    with pytest.raises(UserError, match=r"m.jsonl:1 needs file_name and text, both strings; it has \['file_name', 'text'\]"):
        rows(tmp_path / "m.jsonl")
    (tmp_path / "m.csv").write_text("name,text\na.gif,x\n")
    with pytest.raises(UserError, match=r"m.csv:2 needs file_name, a string; it has \['name', 'text'\]"):
        rows(tmp_path / "m.csv", demand_text=False)
    (tmp_path / "m.csv").write_text("file_name,text,group\na.gif\nb.gif,x,y,, \n")  # too short, and too long by cells without anything
    assert rows(tmp_path / "m.csv", demand_text=False) == [("a.gif", None, None, 2), ("b.gif", "x", "y", 3)]


def test_a_bare_comma_in_a_csv_does_not_cut_a_caption(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("file_name,text\na.gif,a red dot\nb.gif,a red dot, a blue one\n")
    with pytest.raises(UserError, match=r"m.csv:3 has more cells than the 2 columns of its first line. Quote texts that hold commas"):
        rows(tmp_path / "m.csv")
    (tmp_path / "m.csv").write_text('file_name,text\na.gif,a red dot\nb.gif,"a red dot, a blue one"\n')
    assert rows(tmp_path / "m.csv")[1] == ("b.gif", "a red dot, a blue one", None, 3)


@pytest.mark.parametrize(
    ("cell", "fault"),
    [
        ('"a red dot', "unexpected end of data"),  # to the end of the file
        ('"a red dot\nb.gif,"x"', "',' expected after '\"'"),  # to the next quote
        ('"a red" dot', "',' expected after '\"'"),
    ],
)
def test_a_quote_that_is_not_closed_does_not_swallow_the_rows_behind_it(tmp_path: Path, cell: str, fault: str) -> None:
    (tmp_path / "m.csv").write_text(f"file_name,text\n0.gif,x\na.gif,{cell}\nc.gif,a blue dot\n")
    with pytest.raises(UserError, match=f"m.csv:3 is not CSV: {fault}.*write a quote inside of one twice"):
        rows(tmp_path / "m.csv", demand_text=False)
    (tmp_path / "m.csv").write_text('file_name,text\na.gif,a "red" dot\nb.gif,"a ""red"" dot"\n')
    assert [row[1] for row in rows(tmp_path / "m.csv")] == ['a "red" dot'] * 2


@pytest.mark.parametrize("name", ["caption", "Text", " text", "captions"])
def test_a_caption_under_another_name_is_not_left_out_in_silence(tmp_path: Path, name: str) -> None:
    (tmp_path / "m.csv").write_text(f"file_name,{name}\na.gif,\nb.gif,x\n")
    lines = ({"file_name": "a.gif", name: None}, {"file_name": "b.gif", name: ["x"]})
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for file, line in (("m.csv", 3), ("m.jsonl", 2)):
        with pytest.raises(UserError, match=f"{file}:{line} has '{name}' and no 'text', which is what is read. Call it 'text'."):
            rows(tmp_path / file, demand_text=False)
    (tmp_path / "m.jsonl").write_text(json.dumps({"file_name": "a.gif", "text": "x", name: "y", "Group": ""}))
    assert rows(tmp_path / "m.jsonl") == [("a.gif", "x", None, 1)], "what is read is there"
    (tmp_path / "m.jsonl").write_text(json.dumps({"file_name": "a.gif", "text": "x", "GROUP": "y"}))
    with pytest.raises(UserError, match="m.jsonl:1 has 'GROUP' and no 'group'"):
        rows(tmp_path / "m.jsonl")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"file_name": "a.gif"', "m.jsonl:2 is not JSON"),
        ("[" * 100_000, "m.jsonl:2 is not JSON"),
        ('["a.gif", "x"]', "m.jsonl:2 is not an object"),
        ('{"file_name": "a.gif"}', "m.jsonl:2 needs file_name and text"),
        ('{"file_name": "", "text": "x"}', "m.jsonl:2 needs file_name and text"),
        ('{"file_name": 3, "text": "x"}', "both strings"),
        ('{"file_name": "a.gif", "text": 3}', "m.jsonl:2: text is 3, not a string"),
        ('{"file_name": "a.gif", "text": "x", "group": [1]}', r"m.jsonl:2: group is \[1\], not a string"),
        ('{"file_name": "a.gif", "text": "x", "group": true}', "m.jsonl:2: group is true, not a string"),
        ('{"file_name": "a.gif", "text": "\\udc00"}', "m.jsonl:2: text holds half of a surrogate pair"),
        ('{"file_name": "../a.gif", "text": "x"}', "m.jsonl:2: file_name '../a.gif' leaves its folder. Name clips relative to 'm.jsonl'"),
        ('{"file_name": "/etc/passwd", "text": "x"}', "leaves its folder"),
        ('{"file_name": "a\\u0000.gif", "text": "x"}', "leaves its folder"),
        ('{"file_name": "\\ud800.gif", "text": "x"}', "leaves its folder"),
        (" " * 2**20 + "{}", "m.jsonl:2 is longer than 1048576 characters"),
    ],
)
def test_malformed_metadata_names_the_line(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "m.jsonl").write_text('{"file_name": "a.gif", "text": "x"}\n' + line)
    with pytest.raises(UserError, match=words):
        rows(tmp_path / "m.jsonl")


def test_metadata_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_bytes(b"file_name,text\na.gif,\xff\xfe\n")
    with pytest.raises(UserError, match="UTF-8"):
        rows(tmp_path / "m.csv")
    (tmp_path / "m.csv").write_bytes(b"file_name,text\na.gif," + b"x" * 200_000)
    with pytest.raises(UserError, match=r"m.csv:2 is not CSV.*Quote"):
        rows(tmp_path / "m.csv")


def test_metadata_that_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.csv")
    (tmp_path / "link.csv").symlink_to("/etc/passwd")
    for name, word in (("fifo", "FIFO"), ("link", "symbolic link"), ("absent", "No such file")):
        with pytest.raises(UserError, match=f"{name}.csv.*{word}"):
            rows(tmp_path / f"{name}.csv")


def test_caption_files(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    (tmp_path / "a.txt").write_bytes("\ufeff a cat, é \r\n".encode())
    assert read_caption_file(tmp_path / "a.txt") == "a cat, é"
    (tmp_path / "long.txt").write_bytes(b" " * 2**20)
    assert read_caption_file(tmp_path / "long.txt") == ""
    (tmp_path / "long.txt").write_bytes(b" " * (2**20 + 1))
    (tmp_path / "bytes.txt").write_bytes(b"\xff")
    (tmp_path / "link.txt").symlink_to("a.txt")
    os.mkfifo(tmp_path / "fifo.txt")
    words = {"long": "is longer than 1048576 bytes", "bytes": "is not UTF-8 text", "link": "symbolic link", "fifo": "FIFO"}
    for name, word in words.items():
        with pytest.raises(ClipError, match=word):
            read_caption_file(tmp_path / f"{name}.txt")
    assert set(os.listdir("/proc/self/fd")) == before
