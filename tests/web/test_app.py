"""The page in headless Chromium: it makes what it is asked for, says what is wrong, asks no one but its own server, and outlives errors."""

from __future__ import annotations

import hashlib
import json
import os
import re
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
from tests.waiting import PATIENCE, until

app = pytest.importorskip("rdtf_ds.web.app", reason="gradio (the extra `ui`) is not installed")
EVIL = "<img src=x onerror=\"document.title = 'owned'\">"
STAR = ("a star", "Any frames", 3, 100, 0, 1, "ddim", 1, 1, *[None] * 8)
"""A clip of one step, as the page sends it."""
STEPS = 5  # its place there


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[SimpleNamespace]:
    """A page of a small model that is really served, and its studio."""
    from rdtf_ds.web.studio import Studio

    studio = Studio(make_pipeline(text_parts(), small_dfgn()), tmp_path_factory.mktemp("clips"), {"model": "0123456789abcdef"})
    page = app.build(studio, f"stickers {EVIL}")
    yield SimpleNamespace(address=app.serve(page), studio=studio, page=page)
    page.close(verbose=False)


@pytest.fixture(scope="module")
def context(browser) -> Iterator[object]:
    """One for all visitors: what the page loads is kept there, and each load of the page is a visitor of its own to gradio."""
    context = browser.new_context()
    yield context
    context.close()


@pytest.fixture
def visit(context, site):
    """A function that opens the page for one more visitor: ``page``, and the hosts and faults of all its doings."""
    visits = []

    def open_page(width: int = 1200) -> SimpleNamespace:
        page = context.new_page()
        page.set_viewport_size({"width": width, "height": 800})
        page.set_default_timeout(1000 * PATIENCE)
        seen = SimpleNamespace(page=page, hosts=set(), faults=[])
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
        seen.page.close()
        assert hosts == set(), "the page asked somebody else than its server"
        assert seen.faults == []


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


def test_settings_and_another_seed_reach_the_model(visit, tmp_path):
    page = visit().page
    page.fill("#caption textarea", "a blue circle")
    for name, value in (("num-frames", 5), ("frame-ms", 90)):
        set_number(page, name, value)
    page.click("#sampling button")
    for name, value in (("steps", 3), ("text-scale", 2.5), ("image-scale", 1.5)):
        set_number(page, name, value)
    page.click("#sampler input")
    page.locator("[role=option]", has_text="unipc").click()
    before = page.input_value("#seed input")
    page.click("#other-seed")
    page.wait_for_function(f"document.querySelector('#seed input').value != {before!r}")
    seed = int(page.input_value("#seed input"))
    assert seed >= 0
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


@pytest.fixture
def steps(site, monkeypatch) -> list[float]:
    """When each step began, of which every one takes 0.2 s and more."""
    begun: list[float] = []
    original = site.studio.pipeline.unet.forward

    def slow(*arguments, **options):
        begun.append(time.monotonic())
        time.sleep(0.2)
        return original(*arguments, **options)

    monkeypatch.setattr(site.studio.pipeline.unet, "forward", slow)
    return begun


def ends_early(site, steps: list[float]) -> bool:
    """Waits for the end of a clip of 200 steps that has begun."""
    with site.studio._busy:
        count = len(steps)
    steps.clear()
    return 0 < count < 150


def test_a_clip_can_be_stopped(visit, site, steps, tmp_path, monkeypatch):
    page = visit().page
    page.fill("#caption textarea", "a star")
    page.click("#sampling button")
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
    page.click("#sampling button")
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


DIRECT = build_opener(ProxyHandler({}))


def join(address: str, page, values, session: str) -> None:
    """Ask for a clip by hand."""
    (make,) = (event for event in page.fns.values() if getattr(event.fn, "__name__", "") == "make")
    body = json.dumps({"data": list(values), "fn_index": make._id, "session_hash": session}).encode()
    DIRECT.open(Request(f"{address}gradio_api/queue/join", body, {"Content-Type": "application/json"}), timeout=PATIENCE).read()


def listen(address: str, session: str):
    """The stream of what is told of it."""
    return DIRECT.open(f"{address}gradio_api/queue/data?session_hash={session}", timeout=PATIENCE)


def ask(site, change: dict[int, object], session: str) -> str:
    """What the server says at the end to a request made by hand: values as the page sends, but for ``change``, by their place."""
    values = list(STAR)
    for at, value in change.items():
        values[at] = value
    join(site.address, site.page, values, session)
    for line in listen(site.address, session):
        if line.startswith(b"data:") and (said := json.loads(line[5:])).get("msg") == "process_completed":
            return json.dumps(said["output"])
    raise AssertionError("no answer")


LONG = (*STAR[:STEPS], 200, *STAR[STEPS + 1 :])


def test_a_clip_ends_with_the_connection_that_asked_for_it(site, steps):
    join(site.address, site.page, LONG, "gone")
    with listen(site.address, "gone"):
        until(lambda: bool(steps))
    assert ends_early(site, steps)


def test_a_clip_ends_with_the_server(site, steps):
    page = app.build(site.studio, "another server")
    address = app.serve(page)
    join(address, page, LONG, "asked")
    until(lambda: bool(steps))
    page.close(verbose=False)
    assert ends_early(site, steps)


def test_no_step_is_made_for_who_left_while_others_had_their_turn(site, steps):
    join(site.address, site.page, LONG, "first")
    first = listen(site.address, "first")
    until(lambda: bool(steps))
    with DIRECT.open(f"{site.address}gradio_api/heartbeat/second", timeout=PATIENCE) as here:  # as the page does while it is open
        here.readline()
        join(site.address, site.page, LONG, "second")
    desk = next(event.fn.__self__ for event in site.page.fns.values() if getattr(event.fn, "__name__", "") == "leave")
    until(lambda: "second" in desk._left)
    first.close()
    assert ends_early(site, steps)
    until(lambda: len(site.page._queue) == 0 and not any(site.page._queue.active_jobs))
    assert steps == []


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
    values = list(STAR)
    assert job_of(site.studio, *values).frames == 3
    for at, value in change.items():
        values[at] = value
    with pytest.raises(UserError, match=re.escape(words)):
        job_of(site.studio, *values)


def test_odd_requests_get_a_message_and_the_server_goes_on(site):
    for number, change in enumerate(({5: 10**9}, {6: {"a": 1}}, {2: "8"})):
        assert re.search("Steps is|Sampler is|Frames is", ask(site, change, f"values{number}"))
    assert "sticker.gif" in ask(site, {}, "values")
