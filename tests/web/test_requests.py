"""The page's server asked by hand: what no field allows, files nobody uploaded, and askers who leave before the clip is made."""

from __future__ import annotations

import json
import os
import re
from urllib.request import ProxyHandler, Request, build_opener

import pytest
from PIL import Image

from rdtf_ds.errors import UserError
from rdtf_ds.web.form import job_of
from tests.small_models import SIDE
from tests.waiting import PATIENCE, until
from tests.web.visits import desk_of, ends_early

app = pytest.importorskip("rdtf_ds.web.app", reason="gradio (the extra `ui`) is not installed")
STAR = ("a star", "Any frames", 3, 100, 0, 1, "ddim", 1, 1, *[None] * 8)
"""A clip of one step, as the page sends it."""
STEPS = 5  # its place there
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
    until(lambda: "second" in desk_of(site)._left)
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
