"""The page, without a browser: it needs nothing else, and nothing of the user's files becomes markup."""

from __future__ import annotations

import base64
import hashlib
import io
import re

import numpy as np
from PIL import Image

from rdtf_ds.evaluation.page import ClipView, Strip, frame_sheet, render
from tests.evaluation.test_tables import report
from tests.inspection.test_page import EVIL, Page

SHEET = "data:image/webp;base64,UklGRg=="


def view(caption: str = "a star", path: str = "a.gif", sheet: str = SHEET) -> ClipView:
    marks = (True, *[False] * 7)
    return ClipView(caption, path, (Strip("real", "real", (), sheet), Strip("i2v", "Picture and text to clip", marks, sheet)))


def test_what_files_say_never_becomes_markup() -> None:
    text = render(report(model=EVIL, data=EVIL, missing={"CLIP": EVIL}, variants={"FVD": EVIL}), [view(EVIL, EVIL)])
    page, meek = Page(text), Page(render(report(missing={"CLIP": "meek"}), [view()]))
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in meek.elements]
    assert page.count("script") == 1 and not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert sum(EVIL in part for part in page.texts) >= 6, "it is all there to be read"


def test_it_needs_nothing_else() -> None:
    text = render(report(), [view()])
    assert not any(name in ("src", "href", "srcset", "action") for _, attributes in Page(text).elements for name in attributes)
    assert re.findall(r"url\((?!data:)", text) == [] and "@import" not in text and "http://" not in text and "https://" not in text


def test_its_policy_allows_its_script_alone() -> None:
    page = Page(render(report(), [view()]))
    policy = next(attributes["content"] for _, attributes in page.elements if attributes.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and "default-src 'none'" in policy
    (allowed,) = re.findall(r"'sha256-([^']+)'", policy)
    assert allowed == base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()


def test_tables_are_those_of_the_report() -> None:
    page = Page(render(report(), []))
    assert page.count("article") == 2 and page.count("table") == 2
    assert {"FVD, N = 2 ↓", "1234.6", "442.18", "20.0 ±\u00a01.2", "—", "CLIP is not measured: it lacks `a|file`"} <= set(page.texts)
    assert "it lacks `a|file`" in Page(render(report(missing={}), [])).texts, "below its table, where that alone lacks it"
    assert page.texts.count("0.600") == 2 and page.count("button") == 0, "no clips, no controls"


def test_given_frames_are_marked() -> None:
    page = Page(render(report(), [view(), view("a moon")]))
    marks = [attributes for tag, attributes in page.elements if tag == "span" and attributes.get("class") == "given"]
    assert len(marks) == 2 and all(mark["title"] == "frame 0 was given" for mark in marks)
    assert "Real beside made, 2 of 2 clips" in page.texts and page.count("article") == 4
    tasks = [attributes["data-task"] for tag, attributes in page.elements if tag == "button" and "data-task" in attributes]
    assert tasks == ["", "i2v", "interpolation"]


def test_each_strip_has_its_own_sheet() -> None:
    text = render(report(), [view(sheet=SHEET), view(sheet=SHEET + "AA==")])
    for number, sheet in ((0, SHEET), (1, SHEET + "AA==")):
        for where in ("real", "i2v"):
            assert f"#clip-{number} .of-{where} .frames {{ background-image: url({sheet}); }}" in text


def test_a_sheet_is_all_frames_in_a_row() -> None:
    frames = np.zeros((4, 32, 32, 3), np.uint8)
    frames[..., 1] = np.array([0, 80, 160, 240])[:, None, None]
    kind, _, data = frame_sheet(frames).partition(",")
    assert kind == "data:image/webp;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    assert pixels.shape == (96, 4 * 96, 3), "tiny frames are enlarged"
    assert np.abs(pixels[48, 48::96, 1] - [0, 80, 160, 240]).max() <= 8
    with Image.open(io.BytesIO(base64.b64decode(frame_sheet(np.zeros((2, 500, 500, 3), np.uint8)).partition(",")[2]))) as large:
        assert large.size == (320, 160)


def test_the_same_report_is_the_same_page() -> None:
    assert render(report(), [view()]) == render(report(timing={"other": 1}), [view()])
