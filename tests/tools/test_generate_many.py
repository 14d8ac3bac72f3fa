"""tools/generate.py with many clips: files of prompts, grids, sheets, metadata; killed in the middle, it goes on to the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rdtf_ds import __version__
from rdtf_ds.data.clips.clip import DecodeLimits
from rdtf_ds.data.clips.decoding import probe_clip
from rdtf_ds.data.clips.metadata import read_metadata
from rdtf_ds.exported_model import model_hash
from tests.small_models import SIDE, load_tool, make_pipeline, small_dfgn, text_parts


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_pipeline(text_parts(), small_dfgn(), steps=2).save_pretrained(folder)
    return folder


@pytest.fixture
def generate(project_root, typed):
    """Calls the tool; returns exit code, standard output, standard error."""
    return typed(load_tool(project_root, "generate"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_file_of_prompts_with_pictures_and_seeds(generate, model, tmp_path):
    Image.new("RGB", (SIDE, SIDE), (200, 30, 30)).save(tmp_path / "red.png")
    lines = ['{"prompt": "a star"}', '{"prompt": "星\\n😀", "seed": 9, "name": "own", "pictures": {"0": "red.png"}}']
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    common = ("--model", model, "--prompts", tmp_path / "p.jsonl", "--out_dir", tmp_path / "out", "--frames", 3, "--seed", 4)
    code, out, err = generate(*common, "--suffix", ".webp", "--sheet", "--json")
    assert code == 0, err
    report = json.loads(out)
    names = ["0000_a-star.webp", "own.webp"]
    assert report["files"] == [str(tmp_path / "out" / name) for name in names] and report["seeds"] == [4, 9]
    assert report["made"] == 2 and report["kept"] == 0 and report["prompt"] == ["a star", "星\n😀"] and report["frames"] == 3
    assert sorted(contents(tmp_path / "out")) == [*names[:1], "contact_sheet.png", "contact_sheet.webp", *names[1:]]
    found = read_metadata(tmp_path / "out" / "own.webp")
    assert found["prompt"] == "星\n😀" and list(found["visible"]) == ["0"]
    assert (found["model"], found["dtype"], found["rdtf_ds"]) == (model_hash(model), "float32", __version__)
    before = contents(tmp_path / "out")
    code, out, _ = generate(*common, "--suffix", ".webp", "--sheet")
    assert code == 0 and "2 of them were there already" in out and contents(tmp_path / "out") == before


def test_show_prints_what_a_file_says(generate, model, tmp_path):
    common = ("--model", model, "--frames", 2, "--sampler", "dpm++", "--duration_ms", "50,70", "--text_scale", 2)
    assert generate(*common, "--prompt", "a ★", "--out", tmp_path / "x.gif")[0] == 0
    code, out, _ = generate("--show", tmp_path / "x.gif")
    assert code == 0 and '"prompt": "a ★"' in out
    shown = json.loads(out)
    assert shown == read_metadata(tmp_path / "x.gif")
    assert (shown["sampler"], shown["eta"], shown["durations_ms"], shown["text_scale"]) == ("dpm++", None, [50, 70], 2.0)
    assert probe_clip(tmp_path / "x.gif", DecodeLimits()).durations_ms == (50, 70)
    Image.new("L", (4, 4)).save(tmp_path / "other.gif")
    code, out, err = generate("--show", tmp_path / "other.gif")
    assert code == 2 and "says nothing of how it was made" in err and out == ""


def test_a_grid_has_a_clip_for_each_combination_and_sheets(generate, model, tmp_path):
    common = ("--model", model, "--prompt", "a star", "--frames", 2, "--out_dir", tmp_path, "--seeds", "0,7")
    code, out, err = generate(*common, "--grid", "text_scale=0,4", "--grid", "steps=1,2", "--json")
    assert code == 0, err
    names = [f"a-star_s{seed}_text{scale}_steps{steps}.gif" for seed in (0, 7) for scale in (0, 4) for steps in (1, 2)]
    report = json.loads(out)
    assert [Path(file).name for file in report["files"]] == names and report["seeds"] == [0] * 4 + [7] * 4
    found = [read_metadata(tmp_path / name) for name in names]
    assert [(one["text_scale"], one["steps"]) for one in found] == [(0.0, 1), (0.0, 2), (4.0, 1), (4.0, 2)] * 2
    assert Image.open(tmp_path / "contact_sheet.png").size == (200 + 2 * 98, 8 * 98)
    assert Image.open(tmp_path / "contact_sheet.webp").size == (4 * 102 + 6, 2 * 147 + 6)  # a row a seed, a column a combination


def test_the_old_flags_number_clips_and_write_over(generate, model, tmp_path):
    common = ("--model", model, "--prompt", "a star", "--frames", 2, "--out", tmp_path / "x.png")
    assert generate(*common, "--count", 2, "--seed", 5)[0] == 0
    assert [read_metadata(tmp_path / f"x_{number}.png")["seed"] for number in range(2)] == [5, 6]
    assert generate(*common)[0] == 0 and generate(*common, "--steps", 1, "--sheet")[0] == 0
    assert read_metadata(tmp_path / "x.png")["steps"] == 1 and (tmp_path / "x_sheet.webp").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), ["--out FILE", "nothing to go by"]),
        (("--prompt", "a", "--out", "{tmp}/x.gif", "--out_dir", "{tmp}"), ["one of the two"]),
        (("--prompt", "a", "--prompts", "p.txt", "--out", "{tmp}/x.gif"), ["both given", "--prompts makes many"]),
        (("--prompt", "a", "--grid", "steps=1", "--out", "{tmp}/x.gif"), ["--grid makes many"]),
        (("--prompt", "a", "--out_dir", "{tmp}", "--seeds", "1", "--count", "2"), ["in place of --seed and --count"]),
        (
            ("--prompt", "a", "--out_dir", "{tmp}", "--seeds", "1,b", "--duration_ms", "x", "--frame", "a.png"),
            ["--seeds 1,b", "--duration_ms x", "N=PICTURE"],
        ),
        (("--out_dir", "{tmp}", "--frame", "1" * 5000 + "=a.png"), ["N=PICTURE"]),
        (("--prompt", "a", "--out_dir", "{tmp}", "--seeds", "1,1"), ["name one twice"]),
        (("--prompt", "a", "--out_dir", "{tmp}", "--grid", "steps=1,2", "--steps", "3"), ["leave one of them out"]),
        (("--prompt", "a", "--out_dir", "{tmp}", "--grid", "steps=0,2000"), ["steps0'", "steps2000'", "1 to 1000"]),
        (("--prompt", "a", "--out_dir", "{tmp}", "--sampler", "unipc", "--eta", "1"), ["has none"]),
        (("--prompts", "{tmp}/absent.txt", "--out_dir", "{tmp}"), ["absent.txt' cannot be read"]),
        (("--prompt", "a", "--out_dir", "{tmp}", "--offload"), ["--offload"]),
        (("--frame", "0={tmp}/small.png", "--out_dir", "{tmp}"), ["8 x 8 pixels", "--fit"]),
    ],
)  # fmt: skip
def test_mistakes_are_told_together_before_the_model_is_loaded(generate, model, tmp_path, monkeypatch, arguments, told):
    monkeypatch.setattr("rdtf_ds.pipeline.RDTFPipeline.from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    code, out, err = generate("--model", model, *(argument.format(tmp=tmp_path) for argument in arguments))
    assert code == 2 and out == "" and all(one in err for one in told), err
    assert [path.name for path in tmp_path.iterdir()] == ["small.png"]


def test_no_clip_takes_the_name_of_the_sheets(generate, model, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "name": "Contact_sheet"}\n')
    code, out, err = generate("--model", model, "--prompts", tmp_path / "p.jsonl", "--out_dir", tmp_path / "out", "--suffix", ".png")
    assert code == 2 and out == "" and "p.jsonl, line 2: the name 'Contact_sheet' is that of the sheets" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("full", ["a-star_s1.png", "contact_sheet.png", "contact_sheet.webp"])
def test_a_full_disk_keeps_what_was_made(generate, model, tmp_path, monkeypatch, full):
    def write_bytes(self, data):
        with self.open("wb") as file:
            file.write(data[:10] if full in self.name else data)
        if full in self.name:
            raise OSError(28, "No space left on device")

    common = ("--model", model, "--prompt", "a star", "--frames", 2, "--out_dir", tmp_path, "--seeds", "0,1", "--suffix", ".png", "--sheet")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_bytes)
        code, out, err = generate(*common)
    assert code == 2 and out == "" and err.splitlines()[-1].startswith(("'", "the sheets '")) and "No space left on device. " in err
    written = ["a-star_s0.png", "a-star_s1.png", "contact_sheet.png", "contact_sheet.webp"]
    assert sorted(contents(tmp_path)) == written[: written.index(full)]
    assert generate(*common)[0] == 0 and sorted(contents(tmp_path)) == written


def test_a_line_of_the_file_is_named(generate, model, tmp_path):
    (tmp_path / "p.csv").write_text("prompt,steps,pictures\na,0,\nb,1,0=absent.png\nc,1,\n")
    code, _, err = generate("--model", model, "--prompts", tmp_path / "p.csv", "--out_dir", tmp_path / "out")
    assert code == 2 and "p.csv, line 2: num_inference_steps is 0" in err and "p.csv, line 3: the picture" in err and "line 4" not in err


def test_fit_takes_pictures_that_do_not_fit(generate, model, tmp_path):
    Image.new("RGBA", (8, 4), (200, 30, 30, 255)).save(tmp_path / "small.png")
    code, _, err = generate("--model", model, "--frame", f"1={tmp_path}/small.png", "--fit", "--frames", 2, "--out", tmp_path / "x.png")
    assert code == 0, err
    with Image.open(tmp_path / "x.png") as image:
        image.seek(1)
        frame = np.array(image.convert("RGB"))
    assert (frame[:3] == 255).all() and (frame[5:11] == (200, 30, 30)).all()


def test_clips_of_other_settings_are_refused_unless_overwritten(generate, model, tmp_path):
    common = ("--model", model, "--prompt", "a star", "--frames", 2, "--out_dir", tmp_path)
    assert generate(*common)[0] == 0
    code, _, err = generate(*common, "--steps", 1)
    assert code == 2 and "steps 2, now 1" in err and "--overwrite" in err
    assert generate(*common, "--steps", 1, "--overwrite")[0] == 0
    assert read_metadata(tmp_path / "a-star.gif")["steps"] == 1


def test_ctrl_c_says_how_to_go_on(generate, model, tmp_path, monkeypatch):
    from rdtf_ds.pipeline import RDTFPipeline

    whole, calls = RDTFPipeline.__call__, []

    def interrupted(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(self, *arguments, **options)

    monkeypatch.setattr(RDTFPipeline, "__call__", interrupted)
    common = ("--model", model, "--prompt", "a star", "--frames", 2, "--out_dir", tmp_path, "--count", 4)
    code, out, err = generate(*common)
    assert code == 130 and out == "" and "2 of 4 clips are there. The same command goes on" in err
    assert len(list(tmp_path.iterdir())) == 2 and generate(*common)[0] == 0 and len(list(tmp_path.iterdir())) == 4


def test_killed_in_the_middle_it_goes_on_to_the_same_bytes(generate, model, tmp_path, project_root):
    (tmp_path / "p.txt").write_text("".join(f"star {number}\n" for number in range(16)))
    options = ["--model", model, "--prompts", tmp_path / "p.txt", "--batch", 2, "--steps", 12, "--frames", 3, "--suffix", ".png"]
    command = [sys.executable, str(project_root / "tools" / "generate.py"), *map(str, options), "--out_dir", str(tmp_path / "cut")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "cut").glob("*.png"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was done before it could be killed"
    there = len(list((tmp_path / "cut").glob("*.png")))
    assert 3 <= there < 16
    code, out, err = generate(*options, "--out_dir", tmp_path / "cut", "--json")
    assert code == 0 and json.loads(out)["kept"] == there and json.loads(out)["made"] == 16 - there, err
    assert generate(*options, "--out_dir", tmp_path / "whole")[0] == 0
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole") and len(contents(tmp_path / "whole")) == 16
