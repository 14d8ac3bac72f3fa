"""The page in headless Chromium: it makes what it is asked for, says what is wrong, asks no one but its own server, and outlives errors."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from PIL import Image

from rdtf_ds.data.clips.metadata import read_metadata
from tests.small_models import SIDE
from tests.waiting import PATIENCE, until
from tests.web.visits import EVIL, TITLE, desk_of, ends_early


@pytest.fixture
def picture(tmp_path) -> Path:
    Image.new("RGB", (2 * SIDE, SIDE), (220, 30, 30)).save(tmp_path / "red.png")
    return tmp_path / "red.png"


def press(page) -> None:
    """Close earlier messages, in one go since they vanish by themselves too, and ask for the clip."""
    page.evaluate("document.querySelectorAll('.toast-close').forEach(button => button.click())")
    page.wait_for_function("!document.querySelector('.toast-body')")
    page.click("#make")


def made(page, tmp_path: Path) -> Path:
    """Wait for the clip; the GIF file that the page offers, downloaded."""
    page.wait_for_selector("#notes:has-text('Seed')")
    with page.expect_download() as download:
        page.locator("#file a[download]").first.click()
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    return path


def shown(page) -> bytes:
    """The bytes of the picture on the page, asked of the server once more."""
    return page.request.get(page.get_attribute("#clip img", "src")).body()


def message(page) -> str:
    page.wait_for_selector(".toast-body")
    return " ".join(page.locator(".toast-body").all_inner_texts())


def set_number(page, name: str, value: float) -> None:
    page.fill(f"#{name} input[type=number]", f"{value}")
    page.keyboard.press("Tab")


def open_sampling(page) -> None:
    """Open the settings of sampling; gradio puts the first values back some 40 ms later, sooner than anybody types."""
    page.click("#sampling button")
    page.evaluate("new Promise(done => setTimeout(() => requestIdleCallback(done), 300))")


def right_end_of_words(page, selector: str) -> float:
    """Of the words of an element, whose box may be wider, in pixels."""
    return page.evaluate(
        """selector => {
            const words = document.createTreeWalker(document.querySelector(selector), NodeFilter.SHOW_TEXT), range = document.createRange()
            while (words.nextNode()) if (words.currentNode.data.trim()) break
            range.selectNodeContents(words.currentNode)
            return range.getBoundingClientRect().right
        }""",
        selector,
    )


def choose(page, task: str) -> None:
    page.locator("#task label", has_text=re.compile(rf"^\s*{task}\s*$")).click()


def test_text_and_picture_make_a_gif(visit, site, picture, tmp_path):
    page = visit().page
    page.fill("#caption textarea", "a red star")
    page.set_input_files("#slot-0 input[type=file]", picture)
    page.wait_for_selector("#slot-0 img")
    choose(page, "Text and picture")
    page.fill("#seed input", "7")
    press(page)
    path = made(page, tmp_path)
    assert page.title() == TITLE and TITLE in page.inner_text("#title")
    with Image.open(path) as image:
        assert image.format == "GIF" and image.n_frames == 8 and image.size == (SIDE, SIDE)
        assert image.convert("RGB").getpixel((SIDE // 2, SIDE // 2)) == (220, 30, 30), "the given frame stands as it was given"
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255), "fitted on the background"
    said = read_metadata(path)
    assert said["prompt"] == "a red star" and said["seed"] == 7 and list(said["visible"]) == ["0"] and said["model"] == "0123456789abcdef"
    assert f"Frame 0 was fitted into {SIDE} × {SIDE} on the background: it was {2 * SIDE} × {SIDE} pixels." in page.inner_text("#notes")
    assert hashlib.sha256(shown(page)).digest() == hashlib.sha256(path.read_bytes()).digest(), "what is shown is what is offered"
    assert page.evaluate("document.querySelector('#clip img').naturalWidth") == SIDE


def test_settings_and_another_seed_reach_the_model(visit, tmp_path):
    page = visit().page
    page.fill("#caption textarea", "a blue circle")
    for name, value in (("num-frames", 5), ("frame-ms", 90)):
        set_number(page, name, value)
    open_sampling(page)
    for name, value in (("steps", 3), ("text-scale", 2.5), ("image-scale", 1.5)):
        set_number(page, name, value)
    page.click("#sampler input")
    page.locator("[role=option]", has_text="unipc").click()
    before = page.input_value("#seed input")
    page.click("#other-seed")
    page.wait_for_function(f"document.querySelector('#seed input').value != {before!r}")
    seed = int(page.input_value("#seed input"))
    assert seed >= 0
    assert page.input_value("#steps input[type=number]") == "3"
    press(page)
    said = read_metadata(made(page, tmp_path))
    expected = {"frames": 5, "steps": 3, "text_scale": 2.5, "image_scale": 1.5, "sampler": "unipc", "seed": seed, "durations_ms": [90] * 5}
    assert {key: said[key] for key in expected} == expected


def test_tasks_mark_their_slots(visit):
    page = visit().page
    labels = [page.locator(f"#slot-{number} label, #slot-{number} [data-testid=block-label]").first for number in range(8)]
    for task, marked in (("Prediction", [0, 1]), ("Interpolation", [0, 7]), ("Text and picture", [0]), ("Text", [])):
        choose(page, task)
        found = "[...document.querySelectorAll('#slots .slot')].flatMap((slot, n) => slot.innerText.includes('▸') ? [n] : [])"
        page.wait_for_function(f"JSON.stringify({found}) == '{marked}'.replaceAll(' ', '')")
        assert [number for number, label in enumerate(labels) if "▸" in label.inner_text()] == marked
    choose(page, "Interpolation")
    set_number(page, "num-frames", 5)
    page.wait_for_selector("#hint:has-text('0 and 4')")
    assert "▸ 4" in labels[4].inner_text() and "–" in labels[5].inner_text()


def test_wrong_input_is_a_message(visit, picture, tmp_path):
    page = visit().page
    press(page)
    assert "Text: there is no caption. Write one." in message(page)
    assert page.locator("#clip img").count() == 0
    page.set_input_files("#slot-0 input[type=file]", picture)
    page.wait_for_selector("#slot-0 img")
    page.fill("#caption textarea", EVIL)
    press(page)
    assert "Text: this task takes no pictures, and frame 0 has one." in message(page)
    choose(page, "Prediction")
    press(page)
    page.wait_for_selector(".toast-body:has-text('Prediction: this task takes the first 2 frames or more')")
    (tmp_path / "broken <b>.png").write_bytes(b"no picture")
    page.set_input_files("#slot-3 input[type=file]", tmp_path / "broken <b>.png")
    page.wait_for_selector("#slot-3 img", state="attached")
    page.fill("#caption textarea", "a star")
    choose(page, "Any frames")
    press(page)
    said = message(page)
    assert "Frame 3: the picture" in said and "cannot be read" in said and "/" not in said
    assert page.title() != "owned" and page.locator(".toast-body img").count() == 0


def test_an_error_of_the_model_is_told_and_the_next_clip_is_made(visit, site, tmp_path, monkeypatch, capfd):
    page = visit().page
    page.fill("#caption textarea", "a star")

    def fail(*arguments, **options):
        raise RuntimeError(f"CUDA out of memory {EVIL}")

    monkeypatch.setattr(site.studio.pipeline.unet, "forward", fail)
    press(page)
    said = message(page)
    assert "The model failed: RuntimeError: CUDA out of memory" in said and EVIL in said
    assert "in fail" in capfd.readouterr().err, "where it happened stands on the server's terminal"
    monkeypatch.undo()
    press(page)
    assert read_metadata(made(page, tmp_path))["prompt"] == "a star"
    assert page.title() != "owned"


def test_two_visitors_queue_and_get_their_own(visit, site, tmp_path, monkeypatch):
    first, second = visit().page, visit().page
    gate, inside = threading.Event(), []
    original = type(site.studio.pipeline).__call__

    def gated(self, prompt, *arguments, **options):
        inside.append(prompt)
        assert gate.wait(PATIENCE)
        return original(self, prompt, *arguments, **options)

    monkeypatch.setattr(type(site.studio.pipeline), "__call__", gated)
    for page, prompt, waiting in ((first, "one", 0), (second, "two", 1)):
        page.fill("#caption textarea", prompt)
        press(page)
        until(lambda: bool(inside) and len(site.page._queue) == waiting)  # noqa: B023
    time.sleep(0.5)
    assert inside == [["one"]], "the second one waits"
    gate.set()
    for number, (page, prompt) in enumerate(((first, "one"), (second, "two"))):
        (tmp_path / str(number)).mkdir()
        assert read_metadata(made(page, tmp_path / str(number)))["prompt"] == prompt
    assert inside == [["one"], ["two"]]


def test_a_clip_can_be_stopped(visit, site, steps, tmp_path, monkeypatch):
    page = visit().page
    page.fill("#caption textarea", "a star")
    open_sampling(page)
    set_number(page, "steps", 200)
    for stop in (lambda: page.click("#stop"), page.close):
        press(page)
        until(lambda: bool(steps))
        stop()
        assert ends_early(site, steps)
    monkeypatch.undo()
    other = visit().page
    other.fill("#caption textarea", "a circle")
    press(other)
    assert read_metadata(made(other, tmp_path))["prompt"] == "a circle"


def test_nothing_sticks_out_or_lies_over_its_neighbour(visit, picture):
    page = visit(360).page
    page.set_input_files("#slot-7 input[type=file]", picture)
    page.wait_for_selector("#slot-7 img")
    open_sampling(page)
    for width in (360, 1200):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        boxes = [page.locator(f"#slot-{number}").bounding_box() for number in range(8)]
        assert all(box["x"] >= 0 and box["x"] + box["width"] <= width and box["width"] > 60 for box in boxes)
        inside, slot = page.locator("#slot-7 img").bounding_box(), boxes[7]
        assert slot["x"] <= inside["x"] and inside["x"] + inside["width"] <= slot["x"] + slot["width"], "all of the picture is seen"
        assert page.locator("#slot-7 img").evaluate("image => getComputedStyle(image).objectFit") == "contain", "a small one is seen large"
        for name in ("num-frames", "frame-ms", "steps", "text-scale", "image-scale"):
            field = page.locator(f"#{name} input[type=number]").bounding_box()
            assert right_end_of_words(page, f"#{name} label") + 4 <= field["x"], f"{name}: room before its number, {width} px wide"


def test_it_serves_this_machine_alone_and_shares_nothing(site):
    assert urlsplit(site.address).hostname == "127.0.0.1" and site.page.share is False and site.page.share_url is None
    assert site.page.analytics_enabled is False and site.page.server_name == "127.0.0.1"


def test_a_page_whose_connection_broke_makes_clips_again(visit, site, tmp_path):
    page = visit().page
    page.fill("#caption textarea", "a red star")
    with page.expect_request("**/queue/join*") as joined:
        press(page)
    made(page, tmp_path)
    desk_of(site).leave(SimpleNamespace(session_hash=joined.value.post_data_json["session_hash"]))  # as at the end of its heartbeat
    page.fill("#seed input", "5")
    press(page)
    page.wait_for_selector("#notes:has-text('Seed 5')")
