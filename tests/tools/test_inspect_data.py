"""tools/inspect_data.py as people type it, and its page in a browser that clicks through it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rdtf_ds.data.clips.writing import write_clip
from rdtf_ds.data.synthetic import write_stickers
from rdtf_ds.diffusion.masks import Task, mask_family
from tests.browsers import opened_on_a_phone
from tests.small_models import load_tool

EVIL = "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"
EVIL_NAME = "it's \"quoted\" <b>&amp; bold.gif"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stickers of all formats, a long clip with a wicked caption and name, a copy, a still picture and three kinds of broken files."""
    folder = tmp_path_factory.mktemp("data") / "stickers"
    write_stickers(folder, 12, seed=3, size=48, suffixes=(".gif", ".webp", ".png", ".mp4"))
    ball = np.zeros((40, 32, 32, 3), np.uint8)
    for number in range(40):
        ball[number, number * 3 // 5 : number * 3 // 5 + 8, 12:20] = (230, 40, 6 * number)
    write_clip(ball, folder / EVIL_NAME, 50)
    write_clip(ball[:1], folder / "still.png")
    write_clip(ball[:3], folder / "shortest.gif")
    (folder / "shortest copy.gif").write_bytes((folder / "shortest.gif").read_bytes())
    (folder / "empty.gif").write_bytes(b"")
    (folder / "text <i>.webp").write_bytes(b"no picture")
    (folder / "cut.png").write_bytes((folder / "still.png").read_bytes()[:40])
    with open(folder / "metadata.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"file_name": EVIL_NAME, "text": EVIL}) + "\n")
    return folder


@pytest.fixture(scope="module")
def tool():
    return load_tool(Path(__file__).resolve().parents[2], "inspect_data")


@pytest.fixture(scope="module")
def report(tool, folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report") / "report.html"
    assert tool.main([str(folder), "--out", str(out), "--clips", "8"]) == 0
    return out


def test_json_is_one_object_and_nothing_else(tool, folder, capsys):
    assert tool.main([str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["counts"] | {"without_caption": 0} == {
        "files": 19, "trainable": 14, "held_out": 0, "static": 1, "duplicates": 1, "broken": 3, "without_caption": 0
    }  # fmt: skip
    assert sum(found["frame_counts"].values()) == sum(found["formats"].values()) == 16
    assert sum(kind["total"] for kind in found["broken"].values()) == 3
    (equal,) = found["equals"]
    assert [clip["path"] for clip in equal["first"]] == ["shortest copy.gif", "shortest.gif"] and equal["first"][1]["dropped"]
    assert [row["k"] for row in found["variety"]] == [3, 4, 5, 6, 7, 8] and all(row["ratio"] > 0 for row in found["variety"])


def test_clips_are_judged_as_the_run_judges_them(tool, folder, tmp_path, capsys):
    experiment = json.loads(tool.CONFIG.read_text())
    experiment["rdtf"]["data"] |= {"max_source_frames": 39, "validation_fraction": 0.4, "max_bad_fraction": 0.5}
    config = tmp_path / "run.json"
    config.write_text(json.dumps(experiment))
    keys = ["--deepspeed_config", str(config), "--set", "rdtf.data.max_frames=8", "--set", "rdtf.data.max_bytes=5000000"]
    index = tmp_path / "index"
    indexed = load_tool(Path(__file__).resolve().parents[2], "index_data").main([str(folder), "--out", str(index), *keys, "--json"])
    counts = json.loads(capsys.readouterr().out)["counts"]
    made = {path: path.stat().st_mtime_ns for path in index.rglob("*.arrow")}
    assert tool.main([str(folder), "--json", "--index", str(index), *keys]) == indexed == 0
    found = json.loads(capsys.readouterr().out)
    assert found["counts"] == counts and counts["held_out"] > 2
    too_long = found["broken"]["… frames are more than rdtf.data.max_source_frames (…)"]
    assert EVIL_NAME in [row["path"] for row in too_long["first"]] and counts["broken"] == 3 + too_long["total"]
    assert {path: path.stat().st_mtime_ns for path in index.rglob("*.arrow")} == made, "nothing was examined again"
    assert [row["clips"] > 0 for row in found["variety"]] == [True] * 5 + [False], "of no clip more than 8 frames are kept"


def test_the_same_seed_makes_the_same_page(tool, folder, report, tmp_path, capsys):
    assert tool.main([str(folder), "--out", str(tmp_path / "again.html"), "--clips", "8", "--index", str(tmp_path / "index")]) == 0
    assert (tmp_path / "again.html").read_bytes() == report.read_bytes()
    said = capsys.readouterr().out
    assert "8 clips shown" in said and "MB" in said and (tmp_path / "index").is_dir()
    assert tool.main([str(folder), "--out", str(tmp_path / "other.html"), "--clips", "8", "--seed", "1"]) == 0
    assert (tmp_path / "other.html").read_bytes() != report.read_bytes()


def test_a_folder_of_broken_files_has_a_report(tool, tmp_path, capsys):
    for number in range(3):
        (tmp_path / f"{number}.gif").write_bytes(b"GIF89a")
    assert tool.main([str(tmp_path), "--out", str(tmp_path / "report.html"), "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["counts"]["broken"] == found["counts"]["files"] == 3 and found["variety"] == []
    assert "0 clips shown" in captured.err and "0.gif" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{tmp}/absent", "--json"], "absent"),
        (["{tmp}", "--json"], "clips"),
        (["{folder}", "--out", "{tmp}/no/report.html"], "report.html lies in no folder that exists"),
        (["{folder}", "--json", "--set", "rdtf.data.frame_features={tmp}/no_model"], "no_model"),
        (["{folder}", "--json", "--deepspeed_config", "{tmp}/absent.json"], "absent.json"),
    ],
)
def test_bad_input_is_one_paragraph(tool, folder, tmp_path, capsys, arguments, said):
    assert tool.main([word.format(tmp=tmp_path, folder=folder) for word in arguments]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "examining" not in line]
    assert captured.out == "" and said in captured.err and "Traceback" not in captured.err and len(lines) == 1


@pytest.mark.parametrize("arguments", [["{folder}"], ["{folder}", "--json", "--clips", "-1"]])
def test_what_to_make_must_be_said(tool, folder, arguments):
    with pytest.raises(SystemExit) as stopped:
        tool.main([word.format(folder=folder) for word in arguments])
    assert stopped.value.code == 2


@pytest.fixture
def opened(browser, report) -> Iterator[SimpleNamespace]:
    """The report as `opened_on_a_phone` gives it."""
    with opened_on_a_phone(browser, report.as_uri()) as seen:
        yield seen


def test_it_opens_alone_and_nothing_is_wrong(opened, report):
    page = opened.page
    assert page.title() == "stickers: what is in the data", "a caption ran as a script"
    page.locator("article").last.scroll_into_view_if_needed()
    assert opened.faults == []
    assert {address for address in opened.requests if not address.startswith("data:")} == {report.as_uri()}
    assert page.evaluate("document.querySelector('meta[name=viewport]').content").startswith("width=device-width")
    assert EVIL in page.inner_text("#clips") or EVIL in page.inner_text("#captions")


@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_sticks_out_sideways(opened, width):
    page = opened.page
    page.set_viewport_size({"width": width, "height": 740})
    page.evaluate("for (const element of document.querySelectorAll('details')) element.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # wider contents would be cut off or hidden in an element that scrolls by itself
    wider = "e.clientWidth > 0 && e.scrollWidth > e.clientWidth + 1"
    assert page.evaluate(f"[...document.querySelectorAll('body *')].filter(e => {wider}).map(e => e.outerHTML.slice(0, 200))") == []


def test_animations_play(opened):
    page = opened.page
    shown = page.evaluate("[...document.querySelectorAll('img.animation')].map(i => [i.complete, i.naturalWidth, i.src.slice(0, 15)])")
    assert len(shown) == 8 and all(row == [True, 128, "data:image/webp"] for row in shown)
    image = page.locator("article", has_text=EVIL_NAME).locator("img.animation")
    seen = set()
    for _ in range(20):  # a ball that falls for two seconds
        seen.add(image.screenshot())
        page.wait_for_timeout(60)
    assert len(seen) > 3


def test_buttons_change_k_task_mask_and_draw(opened):
    page = opened.page
    card = page.locator("article", has_text=EVIL_NAME)

    def frames() -> list[str]:
        return card.locator(".chosen .frame").all_inner_texts()

    def hidden() -> tuple[bool, ...]:
        names = card.locator(".chosen .frame").evaluate_all("es => es.map(e => e.className)")
        return tuple("hidden" in name.split() for name in names)

    assert card.locator(".strip .frame").count() == 40
    for k in (3, 5, 8):
        page.click(f"[data-k='{k}']")
        assert page.get_attribute(f"[data-k='{k}']", "aria-pressed") == "true" and page.locator("[data-k][aria-pressed=true]").count() == 1
        assert len(frames()) == k == card.locator(".strip .taken").count()
        assert sorted(map(int, frames())) == list(map(int, frames()))
        colours = card.locator(".strip .frame").evaluate_all("es => es.map(e => e.style.getPropertyValue('--colour'))")
        assert len(set(colours)) == k
        taken = card.locator(".strip .taken").evaluate_all("es => es.map(e => e.style.getPropertyValue('--colour'))")
        assert len(set(taken)) == k, "one frame of each cluster"
        for task in Task:
            page.click(f"[data-task={task.value}]")
            for mask in (*mask_family(task, k), mask_family(task, k)[0]):  # after the last comes the first
                assert hidden() == tuple(not visible for visible in mask)
                assert f"N = {mask.count(False)}" in page.inner_text("#mask") and f"N = {mask.count(False)}" in card.inner_text()
                page.click("#mask-after")
            page.click("#mask-before")
    drawn = []
    for _ in range(3):
        drawn.append(tuple(frames()))
        page.click("#draw")
    assert len(set(drawn)) > 1 and tuple(frames()) == drawn[0], "and round again"
    assert opened.faults == []


def test_a_clip_with_fewer_frames_shows_all_it_has(opened):
    page = opened.page
    page.click("[data-k='8']")
    card = page.locator("article", has_text="shortest")
    assert card.locator(".chosen .frame").count() == 3 and "only 3 frames" in card.inner_text()


def test_broken_files_can_be_opened(opened):
    page = opened.page
    details = page.locator("details.broken")
    assert details.count() == 3 and not page.locator("text=empty.gif").is_visible()
    for number in range(3):
        details.nth(number).locator("summary").click()
    assert page.locator("text=empty.gif").is_visible() and page.locator("text=text <i>.webp").is_visible()


def test_dark_mode_is_dark(opened):
    page = opened.page
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = [sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(","))) for colour in (light, dark)]
    assert brightness[0] > 700 and brightness[1] < 120


def test_twelve_real_clips_make_a_page_of_at_most_five_megabytes(tool, real_data, tmp_path, browser, capsys):
    out = tmp_path / "real.html"
    assert tool.main([str(real_data / "stickers"), "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert out.stat().st_size <= 5e6
    assert (found["counts"]["trainable"], found["counts"]["held_out"]) == (94, 2) and found["with_alpha"] > 0, "as v100.json holds out"
    ratios = {row["k"]: row["ratio"] for row in found["variety"]}
    assert all(ratio > 1 for ratio in ratios.values()), f"clusters should be more varied than even spacing: {ratios}"
    page = browser.new_page(viewport={"width": 360, "height": 740})
    page.goto(out.as_uri())
    assert page.locator("article .chosen").count() == 12 and page.evaluate("document.documentElement.scrollWidth") == 360
    page.close()
