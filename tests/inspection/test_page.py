"""The page, without a browser: it needs nothing else, nothing of the user's files becomes markup, and all masks are in it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from rdtf_ds.diffusion.masks import Task, level, mask_family
from rdtf_ds.inspection.page import for_script, in_bytes, masks, median, render
from rdtf_ds.inspection.variety import Variety
from rdtf_ds.inspection.views import ClipView, Draw
from tests.inspection.test_survey import BROKEN, look

EVIL = "</script><script>alert(1)</script><img src=x onerror='alert(2)'>\"quoted\" & 'so'"
DRAW = Draw((0, 0, 1, 2), (1, 2, 3))


class Page(HTMLParser):
    """Elements by name, and the text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside.append(tag)

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        kind = self.inside[-1] if self.inside else ""
        (self.scripts if kind == "script" else self.texts).append(data)

    def count(self, tag):
        return sum(name == tag for name, _ in self.elements)


def page_of(survey, clips=(), seed=0):
    survey.counts |= {name: 0 for name in ("trainable", "held_out", "static", "duplicates", "broken", "without_caption")} | survey.counts
    text = render(survey, clips, seed)
    return text, Page(text)


def test_counts_of_words_that_may_be_too_low_are_told():
    survey = look({})
    assert "more" not in page_of(survey)[0].split("Most frequent words")[1].split("</figure>")[0]
    survey.words_short = 1234
    assert "each may have come 1,234 times more" in page_of(survey)[0]


def clip(**changes):
    address = "data:image/webp;base64,UklGRg=="
    return ClipView(
        **{"path": "a.gif", "caption": "a star", "facts": "gif", "frames": 4, "draws": {3: [DRAW]}, "animation": address, "sheet": address}
        | changes
    )


def test_what_files_say_never_becomes_markup():
    rows = [{"path": EVIL, "caption": EVIL}, {"path": EVIL, "caption": "", "content": "aa"}, {"content": "aa", "caption": EVIL}]
    survey = look(*rows, {**BROKEN, "path": EVIL, "reason": EVIL})
    survey.root = survey.summary = EVIL
    text, page = page_of(survey, [clip(path=EVIL, caption=EVIL, facts=EVIL), clip(path=EVIL, problem=EVIL)])
    assert page.count("script") == 2 and page.count("img") == 1 and page.count("article") == 2
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert sum(EVIL in part for part in page.texts) >= 8, "it is all there to be read"
    meek = [{**row, "path": "p", "caption": row["caption"] and "meek " * len(EVIL.split())} for row in rows]
    _, other = page_of(look(*meek, {**BROKEN, "path": "p", "reason": "r"}), [clip(), clip(problem="p")])
    ours, theirs = ([tag for tag, _ in found.elements if tag not in ("span", "b")] for found in (page, other))  # one for each word
    assert ours == theirs


def test_it_needs_nothing_else():
    text, page = page_of(look({}), [clip()])
    places = ("src", "href", "srcset", "action", "data")
    addresses = [value for _, attributes in page.elements for name, value in attributes.items() if name in places]
    assert addresses and all(value.startswith("data:") for value in addresses)
    assert re.findall(r"url\((?!data:)", text) == [] and "@import" not in text and "http://" not in text and "https://" not in text


def test_its_policy_allows_its_script_alone():
    text, page = page_of(look({}), [clip()])
    policy = next(attributes["content"] for _, attributes in page.elements if attributes.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    (allowed,) = re.findall(r"'sha256-([^']+)'", policy)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts]
    assert allowed in digests


def test_clips_and_masks_are_in_it():
    _, page = page_of(look({}), [clip(problem="gone"), clip()], seed=3)
    data = json.loads(next(script for script in page.scripts if script.startswith("{")))
    assert data["clips"] == [
        {"card": "clip-1", "frames": 4, "columns": 1, "rows": 1, "draws": {"3": [{"clusters": "0012", "frames": [1, 2, 3]}]}}
    ]
    assert data["masks"]["5"] == masks()[5]
    assert "gone" in page.texts and page.count("img") == 1


@pytest.mark.parametrize("k", range(3, 9))
@pytest.mark.parametrize("task", Task)
def test_masks_are_those_of_training(k, task):
    shown = masks()[k][task.value]
    assert [tuple(mark == "1" for mark in mask) for mask in shown] == list(mask_family(task, k))
    assert [mask.count("0") for mask in shown] == [level(mask) for mask in mask_family(task, k)]


def test_data_cannot_end_its_script():
    data = {"a": "</script><!--", "b": "x & y > z"}
    assert json.loads(for_script(data)) == data and not set("<>&") & set(for_script(data))


def test_a_folder_of_broken_files_has_a_page():
    survey = look(*({**BROKEN, "reason": "empty file"} for _ in range(60)))
    survey.counts["broken"] = 60
    text, page = page_of(survey)
    assert "and 10 more" in text and page.texts.count("nothing to show") == 6 and page.count("article") == 0
    assert "What training does" not in text, "no clips, no controls"


@pytest.mark.parametrize(("value", "told"), [(512, "512 B"), (1024, "1 KiB"), (2**19, "512 KiB"), (2**21, "2 MiB"), (2**30, "1 GiB")])
def test_sizes_of_files(value, told):
    assert in_bytes(value) == told


def test_bars_say_what_they_count():
    text, _ = page_of(look({"num_frames": 4}, {"num_frames": 4}, {"num_frames": 9, "size": 3000}))
    assert "<title>4 frames: 2 clips</title>" in text and "<title>9 frames: 1 clip</title>" in text
    assert "<title>2,048 to 4,096 bytes: 1 clip</title>" in text and "<title>64 × 32: 3 clips</title>" in text
    assert "4 to 9, median 4" in text and "0% with transparency" in text


def test_counts_and_variety_are_told():
    survey = look({}, {})
    survey.counts |= {"trainable": 1234567}
    survey.variety, survey.variety_clips = [Variety(3, 2, 1.5, 1.0, 2), Variety(4, 0, 0.0, 0.0, 0)], 2
    text, page = page_of(survey)
    assert {"1,234,567", "1.500", "–"} <= set(page.texts) and "2 of 1,234,567 looked at" in text


@pytest.mark.parametrize(("counts", "expected"), [({3: 1}, 3), ({3: 1, 5: 1}, 4), ({1: 2, 4: 1, 9: 2}, 4), ({1: 1, 2: 1, 3: 2}, 2.5)])
def test_median_of_counts(counts, expected):
    assert median(counts) == expected
