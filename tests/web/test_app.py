"""The page in headless Chromium: it makes what it is asked for, says what is wrong, asks no one but its own server, and outlives errors."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

import pytest
from PIL import Image

from rdtf_ds.data.clips.metadata import read_metadata
from rdtf_ds.errors import UserError
from rdtf_ds.web.form import job_of
from tests.small_models import SIDE, make_pipeline, small_dfgn, text_parts

app = pytest.importorskip("rdtf_ds.web.app", reason="gradio (the extra `ui`) is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "<img src=x onerror=\"document.title = 'owned'\">"
DONE = 30_000  # milliseconds that a clip may take on a busy machine


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[SimpleNamespace]:
    """A page of a small model that is really served, and its studio."""
    from rdtf_ds.web.studio import Studio

    studio = Studio(make_pipeline(text_parts(), small_dfgn()), tmp_path_factory.mktemp("clips"), {"model": "0123456789abcdef"})
    page = app.build(studio, f"stickers {EVIL}")
    yield SimpleNamespace(address=app.serve(page), studio=studio, page=page)
    page.close(verbose=False)


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, site):
    """A function that opens the page for one more visitor: ``page``, and the hosts and faults of all its doings."""
    visits = []

    def open_page(width: int = 1200) -> SimpleNamespace:
        context = browser.new_context(viewport={"width": width, "height": 800})
        page = context.new_page()
        page.set_default_timeout(DONE)
        seen = SimpleNamespace(page=page, hosts=set(), faults=[], context=context)
        page.on("request", lambda request: seen.hosts.add(urlsplit(request.url).netloc))
        page.on("websocket", lambda socket: seen.hosts.add(urlsplit(socket.url).netloc))
        page.on("pageerror", lambda error: seen.faults.append(str(error)))
        page.goto(site.address)
        page.wait_for_selector("#make")
        visits.append(seen)
        return seen

    yield open_page
    for seen in visits:
        hosts = seen.hosts - {"", urlsplit(site.address).netloc}  # data: and blob: have no host
        seen.context.close()
        assert hosts == set(), "the page asked somebody else than its server"
        assert seen.faults == []


@pytest.fixture
def picture(tmp_path) -> Path:
    Image.new("RGB", (2 * SIDE, SIDE), (220, 30, 30)).save(tmp_path / "red.png")
    return tmp_path / "red.png"


def press(page) -> None:
    while page.locator(".toast-close").count():  # an earlier message
        page.locator(".toast-close").first.click()
        page.wait_for_timeout(300)
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
    assert page.title() == f"stickers {EVIL}" and EVIL in page.inner_text("#title")
    with Image.open(path) as image:
        assert image.format == "GIF" and image.n_frames == 8 and image.size == (SIDE, SIDE)
        assert image.convert("RGB").getpixel((SIDE // 2, SIDE // 2)) == (220, 30, 30), "the given frame stands as it was given"
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255), "fitted on the background"
    said = read_metadata(path)
    assert said["prompt"] == "a red star" and said["seed"] == 7 and list(said["visible"]) == ["0"] and said["model"] == "0123456789abcdef"
    assert f"Frame 0 was fitted into {SIDE} × {SIDE} on the background: it was {2 * SIDE} × {SIDE} pixels." in page.inner_text("#notes")
    assert hashlib.sha256(shown(page)).digest() == hashlib.sha256(path.read_bytes()).digest(), "what is shown is what is offered"
    assert page.evaluate("document.querySelector('#clip img').naturalWidth") == SIDE


def test_settings_reach_the_model(visit, site, tmp_path):
    page = visit().page
    page.fill("#caption textarea", "a blue circle")
    for name, value in (("num-frames", 5), ("frame-ms", 90)):
        set_number(page, name, value)
    page.click("#sampling button")
    for name, value in (("steps", 3), ("text-scale", 2.5), ("image-scale", 1.5)):
        set_number(page, name, value)
    page.click("#sampler input")
    page.locator("[role=option]", has_text="unipc").click()
    page.fill("#seed input", "11")
    press(page)
    said = read_metadata(made(page, tmp_path))
    expected = {"frames": 5, "steps": 3, "text_scale": 2.5, "image_scale": 1.5, "sampler": "unipc", "seed": 11, "durations_ms": [90] * 5}
    assert {key: said[key] for key in expected} == expected


def test_another_seed_is_another_clip(visit, tmp_path):
    page = visit().page
    before = page.input_value("#seed input")
    page.click("#other-seed")
    page.wait_for_function(f"document.querySelector('#seed input').value != {before!r}")
    assert int(page.input_value("#seed input")) >= 0


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
    page.reload()
    page.set_input_files("#slot-0 input[type=file]", picture)
    page.wait_for_selector("#slot-0 img")
    page.fill("#caption textarea", EVIL)
    press(page)
    assert "Text: this task takes no pictures, and frame 0 has one." in message(page)
    choose(page, "Prediction")
    press(page)
    page.wait_for_selector(".toast-body:has-text('Prediction: this task takes the first 2 frames or more')")
    page.reload()
    (tmp_path / "broken <b>.png").write_bytes(b"no picture")
    page.set_input_files("#slot-3 input[type=file]", tmp_path / "broken <b>.png")
    page.fill("#caption textarea", "a star")
    choose(page, "Any frames")
    page.wait_for_timeout(500)
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
        assert gate.wait(60)
        return original(self, prompt, *arguments, **options)

    monkeypatch.setattr(type(site.studio.pipeline), "__call__", gated)
    for page, prompt in ((first, "one"), (second, "two")):
        page.fill("#caption textarea", prompt)
        press(page)
        page.wait_for_timeout(1500)
    assert inside == [["one"]], "the second one waits"
    gate.set()
    for number, (page, prompt) in enumerate(((first, "one"), (second, "two"))):
        (tmp_path / str(number)).mkdir()
        assert read_metadata(made(page, tmp_path / str(number)))["prompt"] == prompt
    assert inside == [["one"], ["two"]]


@pytest.mark.parametrize("how", ["button", "closed tab"])
def test_a_clip_can_be_stopped(visit, site, tmp_path, monkeypatch, how):
    page = visit().page
    begun, steps = threading.Event(), []
    original = site.studio.pipeline.unet.forward

    def slow(*arguments, **options):
        begun.set()
        steps.append(len(steps))
        time.sleep(0.2)
        return original(*arguments, **options)

    monkeypatch.setattr(site.studio.pipeline.unet, "forward", slow)
    page.fill("#caption textarea", "a star")
    page.click("#sampling button")
    set_number(page, "steps", 200)
    press(page)
    assert begun.wait(60)
    if how == "button":
        page.click("#stop")
    else:
        page.close()
    with site.studio._busy:  # free once the clip has ended
        assert 0 < len(steps) < 150
    monkeypatch.undo()
    other = visit().page
    other.fill("#caption textarea", "a circle")
    press(other)
    assert read_metadata(made(other, tmp_path))["prompt"] == "a circle"


@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_sticks_out_sideways(visit, width, picture):
    page = visit(width).page
    page.set_input_files("#slot-7 input[type=file]", picture)
    page.wait_for_selector("#slot-7 img")
    page.click("#sampling button")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [page.locator(f"#slot-{number}").bounding_box() for number in range(8)]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= width and box["width"] > 60 for box in boxes)


def test_it_serves_this_machine_alone_and_shares_nothing(site):
    assert urlsplit(site.address).hostname == "127.0.0.1" and site.page.share is False and site.page.share_url is None
    assert site.page.analytics_enabled is False and site.page.server_name == "127.0.0.1"


def ask(site, change: dict[int, object], session: str) -> str:
    """What the server says at the end to a request made by hand: values as the page sends, but for ``change``, by their place."""
    (make,) = (event for event in site.page.fns.values() if getattr(event.fn, "__name__", "") == "make")
    values = ["a star", "Any frames", 3, 100, 0, 1, "ddim", 1, 1, *[None] * 8]
    for at, value in change.items():
        values[at] = value
    address = f"{site.address.rstrip('/')}/gradio_api/queue"
    body = json.dumps({"data": values, "fn_index": make._id, "session_hash": session}).encode()
    direct = build_opener(ProxyHandler({}))
    direct.open(Request(f"{address}/join", body, {"Content-Type": "application/json"}), timeout=30).read()
    for line in direct.open(f"{address}/data?session_hash={session}", timeout=30):
        if line.startswith(b"data:") and (said := json.loads(line[5:])).get("msg") == "process_completed":
            return json.dumps(said["output"])
    raise AssertionError("no answer")


def test_only_uploads_are_opened(site, tmp_path):
    """A request made by hand that names another picture of the server gets no clip, nor is told whether the picture is there."""
    uploads = site.studio.uploads
    (uploads / "a").mkdir(parents=True, exist_ok=True)
    mine, secret = uploads / "a" / "mine.png", tmp_path / "secret.png"
    for picture in (mine, secret):
        Image.new("RGB", (SIDE, SIDE), (1, 2, 3)).save(picture)
    (uploads / "link.png").symlink_to(secret)
    (uploads / "folder").symlink_to(tmp_path)
    outside = [secret, tmp_path / "absent.png", f"{uploads}/../../{tmp_path.name}/secret.png", os.path.relpath(secret, uploads), uploads]
    outside += [f"{uploads}/a/{os.path.relpath(secret, uploads / 'a')}", uploads / "link.png", uploads / "folder" / "secret.png"]
    marked = {"meta": {"_type": "gradio.FileData"}}
    address = {"path": "http://127.0.0.1:9/a.png"}
    before, told = sorted(site.studio.folder.glob("*/*.gif")), set()
    for number, path in enumerate(outside):
        for mark in ({}, marked):
            said = ask(site, {9: {"path": str(path)} | mark}, f"outside{number}{len(mark)}")
            assert "was not uploaded" in said, path
            told.add(said.replace(os.path.abspath(path), "PATH"))
    for number, upload in enumerate(({"path": "a\0b"}, address, address | marked)):
        assert "was not uploaded here" in ask(site, {9: upload}, f"odd{number}")
    assert sorted(site.studio.folder.glob("*/*.gif")) == before
    assert len(told) == 2, "ours, and gradio's own of what is outside"
    assert not [path for path in uploads.rglob("secret.png") if not path.is_relative_to(uploads / "folder")], "nothing was copied in"
    assert "sticker.gif" in ask(site, {9: {"path": str(mine)} | marked}, "inside")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({0: None}, "Caption is None"),
        ({0: ["a"]}, "Caption is ['a']"),
        ({0: "a" * 2001}, "Caption has 2001 characters. Write 2000 at most."),
        ({1: "Everything"}, "Task is 'Everything'. Choose one of Text, "),
        ({1: {}}, "Task is {}"),
        ({2: 9}, "Frames is 9. Write a number from 2 to 8."),
        ({2: "3"}, "Frames is '3'"),
        ({2: True}, "Frames is True"),
        ({2: 3.5}, "Frames is 3.5. Write a whole number from 2 to 8."),
        ({3: 1e300}, "Milliseconds a frame is 1e+300"),
        ({4: None}, "Seed is empty"),
        ({4: -1}, "Seed is -1"),
        ({4: 2**53}, "Seed is 9007199254740992"),
        ({5: 10**9}, "Steps is 1000000000. Write a number from 1 to "),
        ({5: float("nan")}, "Steps is nan"),
        ({6: ["ddim"]}, "Sampler is ['ddim']. Choose one of ddim, "),
        ({7: float("inf")}, "Guidance by the caption is inf"),
        ({8: "1"}, "Guidance by the pictures is '1'"),
        ({9: "/etc/hostname"}, "Frame 0: its picture was not uploaded here"),
        ({10: {"meta": {"_type": "gradio.FileData"}}}, "Frame 1: its picture was not uploaded here"),
    ],
)
def test_values_that_no_field_allows_are_refused(site, change, words):
    """By job_of itself, as gradio checks none of them."""
    values = ["a star", "Any frames", 3, 100, 0, 1, "ddim", 1, 1, *[None] * 8]
    assert job_of(site.studio, *values).frames == 3
    for at, value in change.items():
        values[at] = value
    with pytest.raises(UserError, match=re.escape(words)):
        job_of(site.studio, *values)


def test_odd_requests_get_a_message_and_the_server_goes_on(site):
    for number, change in enumerate(({5: 10**9}, {6: {"a": 1}}, {2: "8"})):
        assert re.search("Steps is|Sampler is|Frames is", ask(site, change, f"values{number}"))
    assert "sticker.gif" in ask(site, {}, "values")
