"""Folders that are partly broken, files that break while they are trained on, and data that would lead a reader elsewhere.

What is broken is known by how it was made: cut in half, empty, another kind of file under a clip's name, a header alone, or bits flipped
where a checksum of the format itself says so.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import struct
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rdtf_ds.curriculum.curriculum import Curriculum
from rdtf_ds.curriculum.pid import PIDController
from rdtf_ds.curriculum.static import StaticSchedule
from rdtf_ds.data.batch import Batch
from rdtf_ds.data.clips.clip import DecodeLimits
from rdtf_ds.data.indexing.index_building import build_index
from rdtf_ds.data.loader import PlannedLoader
from rdtf_ds.data.quarantine import Quarantine
from rdtf_ds.data.step_plan import PlanQueue, StepPlanner
from rdtf_ds.data.synthetic import write_stickers
from rdtf_ds.diffusion.masks import Task
from rdtf_ds.errors import UserError
from rdtf_ds.experiment import load_experiment
from rdtf_ds.training.data_assembly import index_clips
from tests.data.folders import dataset, numbered_clips
from tests.faults.fork_server import ROOT, ForkServer
from tests.faults.runs import FP32, commits, differences, learned
from tests.integration.launches import read_metrics

STEPS = 3
START = {Task.INTERPOLATION: 0.6, Task.PREDICTION: 0.25, Task.GENERATION: 0.15}
END = {Task.INTERPOLATION: 0.2, Task.PREDICTION: 0.3, Task.GENERATION: 0.5}
LIMITS = DecodeLimits()


def flip_in_checked_region(data: bytes, rng: random.Random) -> bytes:
    """Bits of a PNG's picture data flipped, so that a chunk's CRC-32 no longer fits; found and verified by zlib, not by our reader."""
    chunks, at = [], 8
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        chunks.append((data[at + 4 : at + 8], at + 8, length))
        at += length + 12
    kind, start, length = rng.choice([chunk for chunk in chunks if chunk[0] in (b"IDAT", b"fdAT")])
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        damaged[start + rng.randrange(length)] ^= 1 << rng.randrange(8)
    stored = struct.unpack_from(">I", data, start + length)[0]
    if zlib.crc32(kind + damaged[start : start + length]) == stored:  # two flips undid each other
        damaged[start] ^= 1
    return bytes(damaged)


KINDS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "truncated": lambda data, rng: data[: rng.randint(len(data) // 4, len(data) * 3 // 4)],
    "zero bytes": lambda data, rng: b"",
    "wrong extension": lambda data, rng: rng.choice([b"%PDF-1.7 not a clip at all\n" * 9, b"\xff\xd8\xff\xe0 a JPEG's beginning" * 9]),
    "header only": lambda data, rng: data[:16],
    "random flips": flip_in_checked_region,
}


def break_some(folder: Path, count: int, seed: int) -> dict[str, str]:
    """Break ``count`` clips, kinds in turn; bit flips only where the format has checksums. What was broken how, by path."""
    rng = random.Random(seed)
    clips = sorted(path for path in folder.iterdir() if path.suffix in (".gif", ".webp", ".png"))
    rng.shuffle(clips)
    broken = {}
    for number, path in enumerate(clips[:count]):
        kind = list(KINDS)[number % len(KINDS)]
        if kind == "random flips" and path.suffix != ".png":
            kind = "truncated"
        path.write_bytes(KINDS[kind](path.read_bytes(), rng))
        broken[path.name] = kind
    return broken


@pytest.fixture(scope="module")
def hundred(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 clips in three formats, all of which can be trained on, with no two alike."""
    folder = tmp_path_factory.mktemp("hundred")
    write_stickers(folder, 100, seed=11, size=32, suffixes=(".gif", ".webp", ".png"))
    return folder


def quarantined(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("percent", [1, 5, 20, 50])
def test_a_partly_broken_folder_is_trained_on_with_exact_counts(hundred, fork_server: ForkServer, tmp_path, percent: int) -> None:
    data, run = shutil.copytree(hundred, tmp_path / "data"), tmp_path / "run"
    intact = build_index(data, LIMITS, tmp_path / "intact", drop_duplicates=False).counts()
    assert intact["broken"] == 0 and intact["files"] == 100
    broken = break_some(data, percent, seed=percent)
    assert percent < 20 or set(broken.values()) == set(KINDS)
    arguments = FP32.arguments(data, run, "rdtf.data.max_bad_fraction=0.5", "rdtf.data.drop_duplicates=false", steps=STEPS)
    launched = fork_server.launch(arguments, 1, run / "logs")
    assert launched.wait() == 0, launched.said[-3000:]
    listed = quarantined(run)
    assert {entry["path"] for entry in listed} == set(broken) and len(listed) == percent
    assert all(entry["reason"] and entry["sample_number"] is None for entry in listed)
    # Those broken before they were looked at are neither trainable nor static any more, whatever they had been.
    assert f"100 clips in '{data}'" in launched.said and f"{percent} broken" in launched.said
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == list(range(STEPS)) and len({line["loss"] for line in lines}) == STEPS
    rest = build_index(data, LIMITS, tmp_path / "rest", drop_duplicates=False).counts()
    assert rest["trainable"] + rest["static"] == 100 - percent == 100 - rest["broken"]
    assert f"{rest['trainable']} to train on" in launched.said


def test_more_than_the_limit_is_refused(hundred, fork_server: ForkServer, tmp_path) -> None:
    data, run = shutil.copytree(hundred, tmp_path / "data"), tmp_path / "run"
    break_some(data, 21, seed=3)
    launched = fork_server.launch(FP32.arguments(data, run, steps=STEPS), 1, run / "logs")
    assert launched.wait() == 2
    assert "21 of 100 data files cannot be decoded (21.0%)" in launched.said and "rdtf.data.max_bad_fraction (0.2)" in launched.said
    assert len(quarantined(run)) == 21


def test_a_wholly_broken_folder_is_a_clear_error_soon(hundred, fork_server: ForkServer, tmp_path) -> None:
    data, run = shutil.copytree(hundred, tmp_path / "data"), tmp_path / "run"
    broken = break_some(data, 100, seed=4)
    assert len(broken) == 100
    start = time.monotonic()
    launched = fork_server.launch(FP32.arguments(data, run, steps=STEPS), 1, run / "logs")
    assert launched.wait() == 2 and time.monotonic() - start <= 30
    said = " ".join(launched.said.split())  # it is wrapped where the folder's name happens to end
    assert "nothing to train on" in said and "100 broken" in said and str(data) in said and "Traceback" not in said


# --- files that break after they were indexed


def _replace_by_another(path: Path) -> None:
    path.write_bytes((path.parent / "1.png").read_bytes())


def _replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _replace_by_link(path: Path) -> None:
    moved = path.parent / ".moved"
    path.rename(moved)
    path.symlink_to(moved)


BREAKS: dict[str, tuple[Callable[[Path], None], str]] = {
    "deleted": (Path.unlink, "No such file"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:200]), "changed since it was indexed"),
    "replaced by another clip": (_replace_by_another, "changed since it was indexed"),
    "replaced by a FIFO": (_replace_by_fifo, "is a FIFO"),
    "replaced by a link": (_replace_by_link, "symbolic link"),
}
VICTIM = "3.png"
BATCH, DELAY, LAST = 4, 2, 12


def trained(root: Path, listed: Path, workers: int, name: str) -> tuple[list[Batch], Quarantine]:
    """All steps over an index made before, with problems merged and clips barred as train.py does."""
    data = dataset(root)
    curriculum = Curriculum("difficulty_adaptive", StaticSchedule(START, END, 5), PIDController(fast_horizon=1, slow_horizon=2))
    queue = PlanQueue(StepPlanner(5, BATCH, data.index.trainable, data.index.frame_counts, curriculum), DELAY)
    quarantine = Quarantine(listed, 1.0, len(data.index.rows), delay=DELAY)
    BREAKS[name][0](root / VICTIM)
    loader, made = PlannedLoader(data, queue, 0, 1, BATCH, 1, workers, barred=quarantine.barred_since), []
    for step, batches in loader.steps(0, LAST):
        quarantine.merge([problem for batch in batches for problem in batch.problems], step)
        made += batches
        queue.push(curriculum.observe(queue.state, 1.0 + 0.5 * (step % 3)))
    return made, quarantine



@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("name", BREAKS)
def test_clips_that_break_later_are_replaced_counted_and_barred_alike_by_any_workers(tmp_path: Path, name: str) -> None:
    runs = {}
    for workers in (0, 2):
        root = numbered_clips(tmp_path / str(workers) / "data", [6, 8, 9, 7, 12])
        runs[workers] = trained(root, tmp_path / str(workers) / "quarantine.jsonl", workers, name)
    (alone, quarantine), (helped, other) = runs[0], runs[2]
    for one, two in zip(alone, helped, strict=True):
        assert torch.equal(one.frames, two.frames) and torch.equal(one.noise, two.noise) and one.clip_ids == two.clip_ids
        assert [(p.path, p.reason, p.sample_number) for p in one.problems] == [(p.path, p.reason, p.sample_number) for p in two.problems]
    problems = [(step, problem) for step, batch in enumerate(alone) for problem in batch.problems]
    assert {problem.path for _, problem in problems} == {VICTIM} and all(BREAKS[name][1] in problem.reason for _, problem in problems)
    assert all(int(VICTIM[0]) not in batch.clip_ids for batch in alone), "its samples are made of stand-ins"
    struck = list(dict.fromkeys(problem.sample_number for _, problem in problems))
    second = next(step for step, problem in problems if problem.sample_number == struck[1])
    # Planned ahead by the delay, it may fail until then, and not once after it, though stand-ins and plans still draw it.
    assert len(struck) >= 2 and all(step <= second + DELAY for step, _ in problems) and second + DELAY + 1 < LAST - 1
    assert len(quarantine.barred(LAST)) == 1 == len(quarantine.barred(second + DELAY + 1)) and not quarantine.barred(second + DELAY)
    assert quarantine.bad == 1 and quarantine.to_json() == other.to_json()


def test_a_run_over_changed_files_is_the_same_with_workers_and_when_resumed(clips: Path, fork_server: ForkServer, tmp_path: Path) -> None:
    """The files keep size and time, so that only their bytes give them away, and every start finds the index that was made before."""
    data, kept = shutil.copytree(clips, tmp_path / "data"), tmp_path / "index"
    settings = (f"rdtf.data.index_dir={kept}", "rdtf.data.max_bad_fraction=0.5")
    config = FP32.arguments(data, tmp_path / "none", *settings)
    sets = [word for flag, word in zip(config, config[1:], strict=False) if flag == "--set"]
    experiment = load_experiment(str(ROOT / "ds_configs" / FP32.config), sets, data_dir=str(data), output_dir=str(tmp_path / "none"))
    index = index_clips(experiment.rdtf, str(data), kept, torch.device("cpu"))
    changed = [index.rows[clip_id] for clip_id in index.trainable[::4].tolist()]
    for row in changed:
        path = data / row.path
        status = path.stat()
        known = path.read_bytes()
        path.write_bytes(known[:-20] + bytes([known[-20] ^ 1]) + known[-19:])
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    steps = 2 * len(index.trainable) // 2 + 4  # two a step: every clip comes up, most of them twice
    folders = {}
    for name, workers, stops in (("alone", 0, (steps,)), ("helped", 2, (steps,)), ("resumed", 2, (steps // 2 + 1, steps))):
        folders[name] = tmp_path / name
        for stop in stops:
            arguments = FP32.arguments(data, folders[name], *settings, f"rdtf.data.workers={workers}", steps=stop)
            launched = fork_server.launch(arguments, 1, folders[name] / "logs")
            assert launched.wait() == 0, launched.said[-3000:]
    expected = {row.path for row in changed}
    for folder in folders.values():
        entries = quarantined(folder)
        assert {entry["path"] for entry in entries} == expected and len(entries) == len(expected)
        assert all("changed since it was indexed" in entry["reason"] and entry["sample_number"] is not None for entry in entries)
        assert learned(folder) == learned(folders["alone"])
        assert differences(commits(folder)[0], commits(folders["alone"])[0]) == []


# --- data that would lead a reader elsewhere


def tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


@pytest.fixture
def clip(tmp_path: Path) -> bytes:
    return (numbered_clips(tmp_path / "one", [6]) / "0.png").read_bytes()


def test_a_nested_tar_is_not_opened(tmp_path: Path, clip: bytes) -> None:
    (tmp_path / "data").mkdir()
    tar(tmp_path / "inner.tar", {"0.png": clip, "1.png": clip[:-1] + b"x"})
    tar(tmp_path / "data" / "outer.tar", {"good.png": clip, "inner.tar": (tmp_path / "inner.tar").read_bytes()})
    index = build_index(tmp_path / "data", LIMITS, tmp_path / "index")
    assert [(row.path, row.status) for row in index.rows] == [("outer.tar/good.png", "trainable"), ("outer.tar/inner.tar", "broken")]
    assert "tar" in index.rows[1].reason and "not opened" in index.rows[1].reason


def test_names_that_escape_from_a_tar_are_faults_and_touch_nothing(tmp_path: Path, clip: bytes) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.png").write_bytes(clip)
    names = ["../secret.png", str(tmp_path / "secret.png"), "a/../../secret.png"]
    tar(tmp_path / "data" / "shard.tar", {**dict.fromkeys(names, clip), "good.png": clip})
    before = sorted(tmp_path.rglob("*"))
    index = build_index(tmp_path / "data", LIMITS, tmp_path / "index")
    assert [row.path for row in index.rows if row.status == "trainable"] == ["shard.tar/good.png"]
    broken = [row for row in index.rows if row.status == "broken"]
    assert len(broken) == 3 and all("leaves the tar" in row.reason for row in broken)
    assert [path for path in sorted(tmp_path.rglob("*")) if tmp_path / "index" not in (path, *path.parents)] == before


def test_a_file_name_inside_a_shard_never_opens_a_file(tmp_path: Path, clip: bytes) -> None:
    (tmp_path / "data").mkdir()
    other = numbered_clips(tmp_path / "data" / "loose", [9]) / "0.png"
    note = json.dumps({"file_name": "loose/1.png", "text": "elsewhere"}).encode()
    tar(tmp_path / "data" / "shard.tar", {"0.json": note, "0.png": clip})
    index = build_index(tmp_path / "data", LIMITS, tmp_path / "index", drop_duplicates=False)
    kept = {row.path: row.num_frames for row in index.rows}
    assert kept == {"loose/0.png": 9, "loose/1.png": 6} and other.exists()


@pytest.mark.parametrize("name", ["../outside.png", "linked/outside.png", "/outside.png"])
def test_a_manifest_cannot_leave_its_folder(tmp_path: Path, clip: bytes, name: str) -> None:
    root, outside = tmp_path / "data", tmp_path / "elsewhere"
    root.mkdir()
    outside.mkdir()
    (tmp_path / "outside.png").write_bytes(clip)
    (outside / "outside.png").write_bytes(clip)
    (root / "linked").symlink_to(outside)
    (root / "inside.png").write_bytes(clip)
    named = str(tmp_path / "outside.png") if name.startswith("/") else name
    rows = [{"file_name": "inside.png", "text": "fine"}, {"file_name": named, "text": "not"}]
    (root / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        index = build_index(root / "clips.jsonl", LIMITS, tmp_path / "index")
    except UserError as error:
        assert named in str(error) and "clips.jsonl" in str(error)
    else:
        assert [row.path for row in index.rows if row.status == "trainable"] == ["inside.png"]
        assert [row.status for row in index.rows].count("broken") == 1
