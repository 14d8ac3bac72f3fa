"""Opening an index of a million clips, what it holds in memory, and planning from it, beside one Python object a row.

The index is made up, but written by the writer of real ones and opened in a fresh process. The peer is how the index was held before it was
mapped: a Parquet file read into one object a row, and a shuffled list of the clips for each epoch; measured with fewer rows and scaled.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rdtf_ds.benchmarks.index_child import OBJECT_COLUMNS
from rdtf_ds.benchmarks.report import Row, make_report
from rdtf_ds.data.clips.clip import DecodeLimits
from rdtf_ds.data.clips.frame_features import THUMBNAIL_DIM
from rdtf_ds.data.indexing.index_segments import WHOLE, IndexSettings, read_segments, write_segment
from rdtf_ds.data.indexing.index_table import BROKEN, NO_CLIP, STATIC, TRAINABLE, index_path, write_index
from rdtf_ds.errors import UserError

OPEN_S, RESIDENT_MB, PLAN_MS = 2.0, 200.0, 2.0
GROWTH_MB = 10.0  # what a heap settles by, most of it within the first 6,000 steps; from half of the steps on a tenth of it: 0.1 KB a step
PEER = "one object a row"
_SEGMENT_ROWS = 1000
_WORDS = ("a", "red", "blue", "happy", "sad", "cat", "dog", "fox", "bear", "waves", "hops", "spins", "cries", "laughs", "sleeps", "winks")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``tools/benchmark.py index``."""
    parser.add_argument("--rows", type=int, default=1_800_000, help="clips in the index (1800000)")
    parser.add_argument("--steps", type=int, default=20_000, help="steps planned, 16 samples each (20000)")
    parser.add_argument("--peer_rows", type=int, default=200_000, help="rows the peer is measured with, scaled to --rows (200000)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds to open, resident memory, milliseconds to plan a step, microseconds to ask for what a sample needs."""
    rows, peer_rows = arguments.rows, min(arguments.peer_rows, arguments.rows)
    if min(rows, peer_rows) < _SEGMENT_ROWS or arguments.steps < 20:
        raise UserError(f"--rows and --peer_rows must be at least {_SEGMENT_ROWS}, --steps at least 20.")
    with TemporaryDirectory(prefix="rdtf-index-") as made:
        folder = Path(made)
        settings = IndexSettings(folder, DecodeLimits())
        start = perf_counter()
        write_made_up_index(folder, settings, rows)
        written_s = perf_counter() - start
        ours = _measure("mapped", str(folder), settings.identity, str(arguments.steps))
        write_objects(folder / "peer.parquet", made_up_table(folder, settings, peer_rows))
        peer = _measure("objects", str(folder / "peer.parquet"), "-", str(arguments.steps))
        size_mb = index_path(folder, settings.identity).stat().st_size / 1e6
    notes = [
        f"{rows} rows, an index of {size_mb:.0f} MB written in {written_s:.1f} s; its file was in the system's cache",
        f"memory is what the resident set rises by once all is imported, mapped pages included; the peer's of {peer_rows} rows, scaled",
        "growth is of anonymous memory: mapped pages come and go, and are in the largest resident memory",
        f"{arguments.steps} steps of 16 samples across an epoch's border, each sample's caption, place and features read",
        "a step is slow by its own plan, and then again, or by the machine or the garbage collector, which goes through all there is",
    ]
    return make_report("index", report_rows(ours, peer, rows / peer_rows), notes, rows_in_index=rows, measured=ours, peer=peer)


def report_rows(ours: Mapping[str, Any], peer: Mapping[str, Any], scale: float) -> list[Row]:
    """Each figure beside its bar, and beside the peer's."""

    def barred(name: str, value: float, unit: str, bar: float) -> Row:
        """A figure beside the most it may be, in the same unit."""
        return Row(name, value, unit, f"the bar of {bar:g} {unit}", value / bar, 1.0)

    def of_peer(name: str, key: str, unit: str, scale: float) -> Row:
        """The peer's figure times ``scale``, and how many times ours of the same ``key`` that is."""
        scaled = peer[key] * scale
        ratio = scaled / ours[key] if ours[key] > 0 else None  # a small index may need no memory that was not there
        return Row(f"{name}, {PEER}", scaled, unit, "mapped", ratio)

    early, half, late = (ours[f"{when}_mb"] for when in ("early", "half", "late"))
    return [
        barred("open", ours["open_s"], "s", OPEN_S),
        of_peer("open", "open_s", "s", scale),
        Row("resident memory when opened", ours["opened_mb"], "MB"),
        of_peer("resident memory when opened", "opened_mb", "MB", scale),
        barred("largest resident memory", ours["peak_mb"], "MB", RESIDENT_MB),
        barred("growth of own memory from a tenth of the steps on", late - early, "MB", GROWTH_MB),
        barred("growth of own memory from half of the steps on", late - half, "MB", GROWTH_MB / 10),
        barred("plan a step", ours["plan_ms"], "ms", PLAN_MS),
        barred("plan the step at an epoch's border", ours["border_ms"], "ms", PLAN_MS),
        of_peer("plan the step at an epoch's border, unscaled", "border_ms", "ms", 1.0),
        barred("slowest of the slowest thousandth when planned again, processor time", ours["again_ms"], "ms", PLAN_MS),
        Row("slowest plan of a thousand, processor time", ours["thousandth_ms"], "ms"),
        Row("slowest plan of all steps", ours["slowest_ms"], "ms"),
        *(Row(f"{name} of a clip", ours[f"{name}_us"], "µs") for name in ("caption", "place", "frame_features")),
    ]


def made_up_table(folder: Path, settings: IndexSettings, rows: int) -> pa.Table:
    """Clips as a large folder has them: long-tailed frame counts, captions of some words, one in fifty not to be trained on.

    Features lie in one committed segment, which the rows share in turn.
    """
    if not read_segments(folder, settings).num_rows:
        _write_features(folder, settings)
    number = np.arange(rows)
    table = read_segments(folder, settings).take(pa.array(number % _SEGMENT_ROWS))
    path = pa.array((f"{at // 1000:05d}/{at:08d}.webp" for at in range(rows)), pa.large_string(), size=rows)
    rng = np.random.default_rng(0)
    words = rng.integers(len(_WORDS), size=(4096, 5))
    captions = pa.array([" ".join(_WORDS[word] for word in line) for line in words], pa.large_string())
    status = np.select([number % 100 == 98, number % 100 == 99], [STATIC, BROKEN], TRAINABLE)
    replaced = {
        "file": path,
        "content": _hex_digests(rng, rows),
        "status": pa.array(status, pa.large_string()),
        "reason": pa.array(np.where(status == BROKEN, "file is truncated inside a frame", ""), pa.large_string()),
    }
    for name, column in replaced.items():
        table = table.set_column(table.column_names.index(name), name, column)
    caption = captions.take(pa.array(rng.integers(len(captions), size=rows)))
    laid_over = {"path": path, "caption": caption, "group": path, "held_out": pa.array(number % 100 == 97)}
    duplicate_of = pa.array(np.where(number % 100 == 96, number - 1, NO_CLIP), pa.int32())
    return pa.table({**dict(zip(table.column_names, table.columns, strict=True)), **laid_over, "duplicate_of": duplicate_of})


def write_made_up_index(folder: Path, settings: IndexSettings, rows: int) -> None:
    """A whole index, written as real ones are."""
    write_index(folder, settings, made_up_table(folder, settings, rows))


def write_objects(path: Path, table: pa.Table) -> None:
    """The columns of the peer's rows."""
    pq.write_table(table.select([name for name in OBJECT_COLUMNS if name != "clip_id"]), path)


def _write_features(folder: Path, settings: IndexSettings) -> None:
    rng = np.random.default_rng(1)
    counts = np.clip(rng.lognormal(2.9, 0.6, _SEGMENT_ROWS), 3, 128).astype(int)  # median 18
    shape: dict[str, Any] = {
        "file": "", "offset": 0, "length": WHOLE, "size": 100_000, "mtime_ns": 0, "window_first": WHOLE, "window_count": WHOLE,
        "status": TRAINABLE, "reason": "", "transient": False, "content": "", "file_content": "", "format": "webp",
        "width": 256, "height": 256, "has_alpha": True,
    }  # fmt: skip
    clips = [{**shape, "num_frames": count, "durations_ms": [40] * count} for count in counts.tolist()]
    write_segment(folder, settings, clips, [rng.integers(256, size=(count, THUMBNAIL_DIM), dtype=np.uint8) for count in counts])


def _hex_digests(rng: np.random.Generator, rows: int) -> pa.Array:
    """As many strings of 64 hexadecimal digits."""
    text = rng.bytes(32 * rows).hex().encode()
    offsets = 64 * np.arange(rows + 1, dtype=np.int64)
    return pa.LargeStringArray.from_buffers(rows, pa.py_buffer(offsets), pa.py_buffer(text))


def _measure(*arguments: str) -> dict[str, Any]:
    """What a fresh process says."""
    command = [sys.executable, "-m", "rdtf_ds.benchmarks.index_child", *arguments]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed with code {done.returncode}:\n{done.stderr.strip()[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result
