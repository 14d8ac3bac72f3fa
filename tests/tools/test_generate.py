"""tools/generate.py: the four tasks, every format, every refusal."""

from __future__ import annotations

import json

import av
import numpy as np
import pytest
from PIL import Image

from rdtf_ds.data.clips.clip import DecodeLimits
from rdtf_ds.data.clips.decoding import decode_clip, probe_clip
from tests.small_models import SIDE, load_tool, make_pipeline, small_dfgn, text_parts

WHITE = (255, 255, 255)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_pipeline(text_parts(), small_dfgn(), steps=2).save_pretrained(folder)
    for name, colour in (("a", (200, 30, 30)), ("b", (20, 40, 220))):
        Image.new("RGB", (SIDE, SIDE), colour).save(folder / f"{name}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    return folder


@pytest.fixture
def generate(model, project_root, typed):
    """Calls the tool with the model and more arguments; returns exit code, standard output, standard error."""
    tool = load_tool(project_root, "generate")
    return lambda *arguments, model=model: typed(tool, "--model", model)(*arguments)


def frames_of(path, size=SIDE):
    return decode_clip(path, size, WHITE, DecodeLimits())


@pytest.mark.parametrize(
    ("given", "prompt", "kept"),
    [((), "a red star", ()), ((("a", 0),), "a red star", (0,)), ((("a", 0), ("b", 1)), "", (0, 1)), ((("a", 0), ("b", 3)), "", (0, 3))],
    ids=["text", "image and text", "prediction", "interpolation"],
)
def test_four_tasks(generate, model, tmp_path, given, prompt, kept):
    pictures = [argument for name, number in given for argument in ("--frame", f"{number}={model / name}.png")]
    code, out, err = generate("--prompt", prompt, *pictures, "--frames", 4, "--out", tmp_path / "x.gif", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["files"] == [str(tmp_path / "x.gif")] and report["frames"] == 4 and report["seeds"] == [0]
    clip = frames_of(tmp_path / "x.gif")
    assert clip.shape == (4, SIDE, SIDE, 3)
    for name, number in given:
        assert np.array_equal(clip[number], np.asarray(Image.open(model / f"{name}.png"))) and number in kept
    hidden = next(number for number in range(4) if number not in kept)
    assert len(np.unique(clip[hidden].reshape(-1, 3), axis=0)) > 5  # the model drew it: no flat or given picture


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".apng", ".mp4", ".webm"])
def test_formats_and_enlarging(generate, tmp_path, suffix):
    code, _, err = generate("--prompt", "a star", "--out", tmp_path / f"x{suffix}", "--frames", 3, "--scale", 3, "--duration_ms", 80)
    assert code == 0, err
    if suffix != ".webp":  # FFmpeg, which is not the package's own decoder, has none for animated WebP
        with av.open(tmp_path / f"x{suffix}") as video:
            sizes = [(frame.width, frame.height) for frame in video.decode(video=0)]
        assert sizes == [(3 * SIDE, 3 * SIDE)] * 3
    if suffix not in (".mp4", ".webm"):
        assert probe_clip(tmp_path / f"x{suffix}", DecodeLimits()).durations_ms == (80, 80, 80)
        frames = frames_of(tmp_path / f"x{suffix}", 3 * SIDE)
        assert len(frames) == 3
        assert np.array_equal(frames, frames[:, ::3, ::3].repeat(3, axis=1).repeat(3, axis=2))  # whole pixels


def test_clips_of_one_call_are_those_of_single_calls(generate, tmp_path):
    common = ("--prompt", "a star", "--frames", 3, "--steps", 1)
    assert generate(*common, "--count", 3, "--batch", 2, "--seed", 4, "--out", tmp_path / "x.png")[0] == 0
    assert generate(*common, "--seed", 6, "--out", tmp_path / "single.png")[0] == 0
    clips = [frames_of(tmp_path / f"x_{number}.png").astype(int) for number in range(3)]
    assert not (tmp_path / "x.png").exists() and np.abs(clips[0] - clips[1]).max() > 20
    assert np.abs(clips[2] - frames_of(tmp_path / "single.png")).max() <= 2


def test_sampling_options_reach_the_model(generate, tmp_path):
    common = ("--prompt", "a star", "--frames", 3)
    clips = {}
    for name, options in {"default": (), "eta": ("--eta", 0), "steps": ("--steps", 5), "text_scale": ("--text_scale", 0)}.items():
        assert generate(*common, *options, "--out", tmp_path / f"{name}.png")[0] == 0
        clips[name] = frames_of(tmp_path / f"{name}.png")
    assert all(not np.array_equal(clips["default"], clip) for name, clip in clips.items() if name != "default")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "nothing to go by"),
        (("--prompt", " "), "nothing to go by"),
        (("--prompt", "a", "--out", "x.avi"), ".gif .webp"),
        (("--frame", "8={a}"), "numbered 0 to 7"),
        (("--frame", "3={a}", "--frames", "3"), "numbered 0 to 2"),
        (("--prompt", "a", "--frames", "9"), "2 to 8"),
        (("--frame", "first={a}"), "N=PICTURE"),
        (("--frame", "{a}"), "N=PICTURE"),
        (("--frame", "0={a}", "--frame", "0={b}"), "given twice"),
        (("--frame", "0={folder}/absent.png"), "no such file"),
        (("--frame", "0={folder}/broken.png"), "cannot be read"),
        (("--prompt", "a", "--count", "0"), "--count is 0"),
        (("--prompt", "a", "--count", "1000000000"), "--count is 1000000000; give at most 100000"),
        (("--prompt", "a", "--scale", "0"), "--scale is 0"),
        (("--prompt", "a", "--scale", "257"), "--scale 257 makes clips of 4112 pixels a side; with this model give at most 256"),
        (("--prompt", "a", "--steps", "0"), "1 to 1000"),
        (("--prompt", "a", "--out", "{folder}/a.png/x.gif"), "a.png' is a file"),
    ],
)
def test_bad_input_is_one_paragraph_and_exit_code_2(generate, model, tmp_path, arguments, told):
    places = {"a": model / "a.png", "b": model / "b.png", "folder": model}
    arguments = [argument.format(**places) for argument in arguments]
    out = () if "--out" in arguments else ("--out", tmp_path / "x.gif")
    code, printed, err = generate(*arguments, *out)
    assert code == 2 and told in err and printed == ""
    assert not list(tmp_path.iterdir())


def test_a_missing_model_is_named(generate, tmp_path):
    code, _, err = generate("--prompt", "a", "--out", tmp_path / "x.gif", model=tmp_path / "absent")
    assert code == 2 and "export_fp16.py" in err and str(tmp_path / "absent") in err
