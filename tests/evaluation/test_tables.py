"""What is told of an evaluation: its JSON, its Markdown, and that nothing but the time differs from run to run."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from rdtf_ds.evaluation.measures import Figure
from rdtf_ds.evaluation.protocol import make_tasks
from rdtf_ds.evaluation.tables import Report, Table, explanations, facts, given, markdown, name_of, shown
from rdtf_ds.evaluation.test_set import RealClip, RealClips

EVIL = "</script><b>`|x|` *y*"
SETTINGS: dict[str, Any] = {
    "model": "0123456789abcdef", "test set": "f" * 16, "split": "all", "seed": 3, "frames": 8, "image size": 16,
    "given frames": "given frames stand as given", "sampler": "ddim", "steps": 25, "eta": 0.5, "text_scale": 7.5, "image_scale": 2.0,
    "device": "cpu", "dtype": "float32", "threads": 2, "batch": 4, "visible": {"i2v": "10000000"},
}  # fmt: skip


def real_clips(count: int = 2, caption: str = "a star", **changes: Any) -> RealClips:
    clips = tuple(RealClip(str(number), number, f"{number}.png", caption, "c", tuple(range(8)), number) for number in range(count))
    counts = {"of": 9, "too_short": 0, "without_caption": 0}
    return RealClips(**{"clips": clips, "held_out": False, **counts, "fingerprint": "f" * 16, **changes})


def report(**changes: Any) -> Report:
    i2v, interpolation = make_tasks(["i2v", "interpolation"], 8)
    tables = [
        Table(i2v, [
            Figure("FVD", "FVD, N = 2", 1234.56, paper=442.18),
            Figure("FVD", "FVD, 1 against 1 others", 20.0, 10.0, spread=(1.25, 0.5)),
            Figure("VQA", "VQA", 0.51234, 0.6, 0.502),
            Figure("CLIP", "CLIP", None, paper=0.376, note="it lacks `a|file`"),
        ]),
        Table(interpolation, [Figure("VQA", "VQA", 0.25, 0.6, 0.536)]),
    ]  # fmt: skip
    parts = {
        "model": "model", "data": "stickers", "clips": real_clips(), "settings": SETTINGS, "tables": tables,
        "variants": {"FVD": "I3D of somewhere"}, "missing": {"CLIP": "it lacks `a|file`"}, "timing": {"seconds making": 3.1},
    }  # fmt: skip
    return Report(**(parts | changes))


def test_rows_have_this_model_the_real_clips_and_the_paper() -> None:
    lines = markdown(report()).splitlines()
    assert "| | this model | real clips | paper's RDTF |" in lines and "## Picture and text to clip (Table 1)" in lines
    assert "| FVD, N = 2 ↓ | 1234.6 | — | 442.18 |" in lines
    assert "| FVD, 1 against 1 others ↓ | 20.0 ±\u00a01.2 | 10.0 ±\u00a00.5 | — |" in lines
    assert "| VQA ↑ | 0.512 | 0.600 | 0.502 |" in lines and "| VQA ↑ | 0.250 | 0.600 | 0.536 |" in lines
    assert "| CLIP ↑ | — | — | 0.376 |" in lines
    assert lines.index("## Interpolation (Table 2, left)") > lines.index("| CLIP ↑ | — | — | 0.376 |")


def test_a_missing_measure_says_what_it_lacks_once() -> None:
    text = markdown(report())
    assert text.count("it lacks \\`a\\|file\\`") == 1 and "- CLIP is not measured: it lacks" in text.partition("## ")[0]
    assert "- FVD: I3D of somewhere" in text.partition("## What the figures are made of")[2]


def test_what_one_table_lacks_is_told_below_it() -> None:
    text = markdown(report(missing={}))
    assert text.count("- it lacks \\`a\\|file\\`") == 1 and "it lacks" in text.partition("## Picture")[2].partition("## Interpolation")[0]


def test_every_table_says_what_was_given() -> None:
    told = report(settings=SETTINGS | {"given frames": "as told"})
    i2v, other = make_tasks(["i2v", "prediction"], 8)
    assert given(i2v, told) == "Given: frame 0 of 8 (10000000) and the caption; as told."
    assert given(other, told) == "Given: frames 0, 1, 2, 3, 4 of 8 (11111000) and the caption; as told."
    assert markdown(report()).count("; given frames stand as given.") == 2


def test_clips_without_captions_are_not_said_to_have_given_one() -> None:
    silent = report(clips=real_clips(caption=""))
    assert given(silent.tables[0].task, silent) == "Given: frame 0 of 8 (10000000), no caption; given frames stand as given."
    assert "and the caption;" not in markdown(silent)


def test_facts_say_which_clips_and_settings() -> None:
    told = "\n".join(facts(report()))
    assert "model, 0123456789abcdef" in told and "2 of 9 in stickers, not held out: the model may have been trained on them; seed 3" in told
    assert "8 frames of 16 px; ddim, 25 steps, η 0.5, guidance text 7.5, image 2; cpu, float32, 2 threads, batches of 4" in told
    assert "Left out" not in told
    other = report(clips=real_clips(held_out=True, too_short=3, without_caption=4), settings={**SETTINGS, "eta": None, "sampler": "unipc"})
    told = "\n".join(facts(other))
    assert "2 of 9 in stickers, held out from training" in told and "Left out: 3 too short, 4 without a caption" in told
    assert "unipc, 25 steps, guidance" in told
    assert "float32, 1 thread, batches" in "\n".join(facts(report(settings={**SETTINGS, "threads": 1})))


def test_what_is_told_of_others_is_no_markup() -> None:
    text = markdown(report(model=EVIL, data=EVIL, variants={"FVD": EVIL}))
    assert "\\`\\|x\\|\\` \\*y\\*" in text and "<b>" not in text.replace("\\<b\\>", "")


def test_json_holds_every_number() -> None:
    made = report()
    found = json.loads(made.json_text())
    assert found == json.loads(json.dumps(made.to_json())) and found["test_set"]["clips"] == 2 and found["settings"] == SETTINGS
    assert [table["task"] for table in found["tables"]] == ["i2v", "interpolation"] and found["tables"][0]["visible"] == [0]
    first, halves, _, lacking = found["tables"][0]["figures"]
    assert (first["model"], first["real"], first["paper"], first["lower_is_better"]) == (1234.56, None, 442.18, True)
    assert halves["spread"] == [1.25, 0.5] and lacking["note"] == "it lacks `a|file`" and not lacking["lower_is_better"]
    assert found["variants"] == {"FVD": "I3D of somewhere"} and found["missing"] == {"CLIP": "it lacks `a|file`"}


def test_the_time_is_in_timing_alone() -> None:
    one, other = report(), report(timing={"seconds making": 99.0})
    assert markdown(one) == markdown(other) and list(facts(one)) == list(facts(other))
    assert one.to_json() | {"timing": {}} == other.to_json() | {"timing": {}} and one.to_json() != other.to_json()


@pytest.mark.parametrize(("measure", "sign"), [("FVD", "↓"), ("VQA", "↑"), ("CLIP", "↑")])
def test_signs_say_which_way_is_better(measure: str, sign: str) -> None:
    assert name_of(Figure(measure, "it", 1.0)) == f"it {sign}"


def test_cells() -> None:
    figure = Figure("VQA", "VQA", 0.12345, None, 0.5)
    assert [shown(figure, column) for column in ("model", "real", "paper")] == ["0.123", "—", "0.500"]
    assert shown(replace(figure, measure="FVD", model=-0.04), "model") == "0.0"
    assert "taken to be the share among all captions" in list(explanations(report()))[-1]
