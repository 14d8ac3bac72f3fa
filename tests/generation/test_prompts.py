"""Files of prompts: what each kind can say, and every line that will not do, by its number."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdtf_ds.errors import UserError
from rdtf_ds.generation.grids import grid, parse_axes
from rdtf_ds.generation.jobs import Job
from rdtf_ds.generation.prompts import read_prompts, slug


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_text_is_a_prompt_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", "\ufeff# stickers\na red Star, slides!\n\n  星が左へ \r\n#no\n")
    jobs, told = read_prompts(path, {"seed": 3, "steps": 5})
    first = Job("0000_a-red-star-slides", "a red Star, slides!", seed=3, steps=5)
    assert jobs == [first, Job("0001_星が左へ", "星が左へ", seed=3, steps=5)]
    assert told == {"0000_a-red-star-slides": "p.txt, line 2", "0001_星が左へ": "p.txt, line 4"}


def test_json_lines_say_everything(tmp_path: Path) -> None:
    lines = (
        '{"prompt": "a\\nb", "name": "x", "seed": 4, "frames": 3, "steps": 2, "sampler": "unipc", "text_scale": 2, '
        '"durations_ms": [10, 20, 30]}\n'
        '\n{"pictures": {"0": "a.png", "7": "sub/b.png"}, "image_scale": 1.5, "eta": 0, "prompt": null}\n'
    )
    first, second = read_prompts(write(tmp_path, "p.jsonl", lines), {"seed": 1, "text_scale": 9.0}).jobs
    assert first == Job("x", "a\nb", {}, 4, 3, 2, "unipc", None, 2, None, [10, 20, 30])
    pictures = {0: tmp_path / "a.png", 7: tmp_path / "sub" / "b.png"}
    assert second == Job("0001_clip", None, pictures, 1, None, None, None, 0, 9.0, 1.5, None)


def test_csv_has_the_same_columns(tmp_path: Path) -> None:
    text = 'prompt,pictures,seed,durations_ms,name\n"a, b",0=a.png;7=b.png,4,"10,20",007\n"two\nlines",,,50,\n'
    first, second = read_prompts(write(tmp_path, "p.csv", text)).jobs
    assert first == Job("007", "a, b", {0: tmp_path / "a.png", 7: tmp_path / "b.png"}, 4, durations_ms=[10, 20])
    assert second == Job("0001_two-lines", "two\nlines", durations_ms=50)


def test_pictures_of_the_command_serve_lines_without_their_own(tmp_path: Path) -> None:
    path = write(tmp_path, "p.jsonl", '{"prompt": "a"}\n{"prompt": "b", "pictures": {"1": "b.png"}}\n')
    first, second = read_prompts(path, {"pictures": {0: Path("c.png")}}).jobs
    assert first.pictures == {0: Path("c.png")} and second.pictures == {1: tmp_path / "b.png"}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "no JSON"),
        ('["a"]', "not an object"),
        ('{"promt": "a"}', "is 'prompt' meant"),
        ('{"zzz": 1}', "known are name"),
        ('{"seed": "1"}', "seed is \"1\"; give a whole number"),
        ('{"seed": true}', "seed is true"),
        ('{"prompt": 3}', "give a caption"),
        ('{"steps": 2.5}', "steps is 2.5"),
        ('{"eta": "x"}', "eta is"),
        ('{"pictures": {"first": "a.png"}}', "files by frame number"),
        ('{"pictures": ["a.png"]}', "files by frame number"),
        ('{"pictures": {"0": "../a.png"}}', "outside of the folder"),
        ('{"pictures": {"0": "/etc/a.png"}}', "outside of the folder"),
        ('{"pictures": {"0": "link/a.png"}}', "outside of the folder"),
        ('{"durations_ms": [1.5]}', "durations_ms"),
        ('{"prompt": "a\\ud800"}', "half of a surrogate pair"),
        ('{"prompt": "a", "name": "\\udfff"}', "half of a surrogate pair"),
        ('{"pictures": {"0": "\\ud800.png"}}', "half of a surrogate pair"),
        ('{"pictures": {"0": "a\\u0000.png"}}', "is no name of a file"),
        ('{"pictures": {"0": "circle/a.png"}}', "is no name of a file"),
        ("[" * 100_000, "no JSON"),
        ('{"seed": ' + "[" * 100_000, "no JSON"),
        ('{"pictures": {"%s": "a.png"}}' % ("1" * 5000), "files by frame number"),
        ('{"image_scale": 1%s}' % ("0" * 400), "give a number"),
        ('{"image_scale": 1%s}' % ("0" * 5000), "no JSON"),
        ('{"eta": 1e999}', "give a number from 0 to 1"),
        ('{"pictures": {"0": "a.png", "00": "b.png"}}', "a frame stands there twice"),
        ('{"pictures": {"0": "a.png", "0": "b.png"}}', "'0' stands there twice"),
        ('{"prompt": "a", "seed": 1, "prompt": "b"}', "'prompt' stands there twice"),
        ('{"text_scale": 1}', "it has its own text_scale, but --grid varies it"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, told: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path)
    (tmp_path / "in" / "circle").symlink_to("circle")
    path = write(tmp_path / "in", "p.jsonl", f'{{"prompt": "good"}}\n\n{line}\n')
    with pytest.raises(UserError) as caught:
        read_prompts(path, settled={"text_scale": "--grid varies it"})
    assert str(caught.value).startswith("p.jsonl, line 3: ") and told in str(caught.value)


def test_blank_cells_beyond_the_columns_are_no_cells(tmp_path: Path) -> None:
    """Spreadsheets fill up every line, and the first one, to the widest they ever saw."""
    for text in ("prompt,,\na star,,\n", "prompt\na star,, \n"):
        assert [job.prompt for job in read_prompts(write(tmp_path, "p.csv", text)).jobs] == ["a star"]


def test_all_wrong_lines_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "p.csv", 'prompt,seed,name\na,1,x\nb,one,y\nc,2,x\n"d",3,z,9\n')
    with pytest.raises(UserError) as caught:
        read_prompts(path)
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 things are wrong:"
    assert [line.split(":")[0].strip() for line in lines[1:]] == [f"p.csv, line {number}" for number in (3, 4, 5)]
    assert "the name 'x' is that of line 2 too" in lines[2] and "more cells than the 3 columns" in lines[3]


@pytest.mark.parametrize(
    ("column", "cell", "told"),
    [
        ("pictures", "0=a.png;0=b.png", "'0' stands there twice"),
        ("pictures", "0=a.png;00=b.png", "a frame stands there twice"),
        ("pictures", "0=a\0.png", "is no name of a file"),
        ("pictures", "1" * 5000 + "=a.png", "files by frame number"),
        ("seed", "[" * 100_000, "give a whole number"),
        ("seed", "1" * 5000, "give a whole number"),
        ("text_scale", "1" * 400, "give a number"),
    ],
)
def test_a_wrong_cell_is_named_and_the_next_lines_are_read(tmp_path: Path, column: str, cell: str, told: str) -> None:
    path = write(tmp_path, "p.csv", f"prompt,{column}\na,\nb,{cell}\nc,one\n")
    with pytest.raises(UserError) as caught:
        read_prompts(path)
    _, third, fourth = str(caught.value).splitlines()
    assert third.startswith("  p.csv, line 3: ") and told in third and fourth.startswith("  p.csv, line 4: ")


def test_a_column_stands_there_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="p.csv, line 1: the column 'prompt' stands there twice"):
        read_prompts(write(tmp_path, "p.csv", "prompt,seed, prompt\na,1,b\n"))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ends in .txt, .jsonl, .csv"):
        read_prompts(tmp_path / "p.json")
    with pytest.raises(UserError, match="No such file"):
        read_prompts(tmp_path / "p.txt")
    with pytest.raises(UserError, match="hold no prompt"):
        read_prompts(write(tmp_path, "p.txt", "# nothing\n\n"))
    (tmp_path / "q.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        read_prompts(tmp_path / "q.txt")


@given(st.text() | st.none())
def test_a_slug_is_part_of_a_name(prompt: str | None) -> None:
    made = slug(prompt)
    assert 1 <= len(made) <= 40 and not set(made) & set('/\\:*?"<>|._ \n\t') and made == made.strip("-")


# --- grids


def test_a_grid_is_every_combination_the_last_axis_fastest() -> None:
    axes = parse_axes(["text_scale=1,7.5", "sampler=ddim, dpm++"])
    assert axes == {"text_scale": [1.0, 7.5], "sampler": ["ddim", "dpm++"]}
    made = grid([Job("a", "star", steps=3)], [0, 5], axes)
    names = ["a_s0_text1_ddim", "a_s0_text1_dpm++", "a_s0_text7.5_ddim", "a_s0_text7.5_dpm++", "a_s5_text1_ddim"]
    assert [job.name for job in made[:5]] == names
    assert len(made) == len({job.name for job in made}) == 8
    assert made[7] == Job("a_s5_text7.5_dpm++", "star", seed=5, steps=3, text_scale=7.5, sampler="dpm++")


def test_one_seed_or_none_leaves_names_alone() -> None:
    jobs = [Job("a", "star", seed=7)]
    assert grid(jobs, [], {}) == jobs
    assert grid(jobs, [4], {}) == [Job("a", "star", seed=4)]
    assert [job.name for job in grid(jobs, [], {"steps": [2], "frames": [3, 4]})] == ["a_steps2_frames3", "a_steps2_frames4"]


@pytest.mark.parametrize(
    ("text", "told"),
    [("scale=1", "NAME one of text_scale"), ("steps=", "NAME=VALUE"), ("steps", "NAME=VALUE"), ("steps=a", "25,50"), ("steps=2.5", "25,50"),
     ("text_scale=1,x", "1,4,7.5"), ("steps=2,2", "stands there twice")],
)  # fmt: skip
def test_axes_that_cannot_be_read(text: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        parse_axes([text])


def test_all_axes_are_told_at_once_and_none_varies_twice() -> None:
    with pytest.raises(UserError, match="2 things are wrong"):
        parse_axes(["x=1", "y=2"])
    with pytest.raises(UserError, match="steps is varied twice"):
        parse_axes(["steps=1", "steps=2"])
    with pytest.raises(UserError, match="name one twice"):
        grid([Job("a")], [1, 1], {})
