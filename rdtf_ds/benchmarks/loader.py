"""Samples a second on one core, from animated WebP and from the latent cache, beside a plain loader on the same clips.

Ours makes samples of the plans a run has, over an index built before: k-means on stored features, then the chosen frames alone. The plain
loader (`plain_loader`) is given the same clips and the same k in the same order, in turns. One process, one thread, one CPU.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import faiss
import numpy as np
import torch

from rdtf_ds.benchmarks.plain_loader import PlainStickers, load_peers
from rdtf_ds.benchmarks.report import Row, make_report
from rdtf_ds.benchmarks.timing import Timing, take_turns
from rdtf_ds.config import RDTFSection
from rdtf_ds.data.cache_header import CacheHeader
from rdtf_ds.data.clips.clip import ClipError, DecodeLimits
from rdtf_ds.data.clips.decoding import decode_clip
from rdtf_ds.data.clips.places import read_place
from rdtf_ds.data.clips.writing import write_clip
from rdtf_ds.data.dataset import LatentShape, StickerDataset
from rdtf_ds.data.feature_cache import CachedClips, ClipFeatures, FeatureCache, caption_texts
from rdtf_ds.data.indexing.index import ClipIndex
from rdtf_ds.data.indexing.index_building import build_index
from rdtf_ds.data.sources.captions import words
from rdtf_ds.data.step_plan import SamplePlan, StepPlanner
from rdtf_ds.data.synthetic import all_stickers, render
from rdtf_ds.errors import UserError
from rdtf_ds.inspection.variety import measure_variety
from rdtf_ds.seeding import numpy_generator
from rdtf_ds.training.assembly import build_curriculum

FRAMES, SIZE = 72, 256
LATENT = LatentShape(channels=4, size=32)
TOKENS, CLIP_DIM, T5_DIM, VARIANTS = 77, 1024, 1024, 4
PLAIN_BAR, RATE_BAR, CACHED_BAR, VARIETY_BAR = 4.0, 20.0, 500.0, 1.0
PLAIN, ALL_OURS, ALL_THEIRS = "plain loader", "decode every frame", "decode every frame, imageio"
_SAMPLES = "samples from WebP"
_CACHED_SAMPLES = "samples from the latent cache"
_FULL_TEXT = f"{_CACHED_SAMPLES}, all tokens of T5 used"
_PAID_BACK = 10
_BATCH = 16
_SEED = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``tools/benchmark.py loader``."""
    parser.add_argument("--data", type=Path, metavar="DIR", help="real clips, of which the 256 px WebP of 72 frames are taken (generated)")
    parser.add_argument("--cached", action="store_true", help="only from the latent cache, which needs no peers")
    parser.add_argument("--clips", type=int, default=40, help="at most so many (40)")
    parser.add_argument("--samples", type=int, default=40, help="of one turn; ten times as many from the cache (40)")
    parser.add_argument("--repetitions", type=int, default=5, help="turns, of which the median is taken (5)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Rates, costs and variety; real clips come from ``--data``, else from ``stickers/`` in the environment's RDTF_REAL_DATA."""
    if min(arguments.clips, arguments.samples, arguments.repetitions) < 1:
        raise UserError("--clips, --samples and --repetitions must be at least 1.")
    if not arguments.cached:
        load_peers()  # better now than after indexing
    source = arguments.data or (Path(os.environ["RDTF_REAL_DATA"]) / "stickers" if "RDTF_REAL_DATA" in os.environ else None)
    with TemporaryDirectory(prefix="rdtf-loader-") as made:
        clips = Path(made) / "clips"
        if source is None:
            generate(clips, arguments.clips)
        else:
            take_clips(source, clips, arguments.clips)
        with one_core():
            index, index_s = index_timed(clips, Path(made) / "index")
            rows = [] if arguments.cached else _decoded(index, arguments.samples, arguments.repetitions, index_s)
            rows += _cached(index, Path(made) / "cache", 10 * arguments.samples, arguments.repetitions)
        if not arguments.cached:
            rows += _variety(index, real=source is not None)
        used = len(index.trainable)
    kind = "generated" if source is None else "real"
    notes = [
        f"{used} {kind} clips of {FRAMES} frames and {SIZE} px, all in the system's cache; one process, thread and CPU",
        f"{arguments.samples} samples a turn, {10 * arguments.samples} from the latent cache, by plans made before",
        f"the latent caches hold random features of full size, {TOKENS} tokens, {VARIANTS} variants of each caption",
    ]
    return make_report("loader", rows, notes)


@contextmanager
def one_core() -> Iterator[None]:
    """One CPU and one thread for everything in this process, whichever library would take more."""
    cpus, threads, faiss_threads = os.sched_getaffinity(0), torch.get_num_threads(), faiss.omp_get_max_threads()
    os.sched_setaffinity(0, {max(cpus)})
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cpus)
        torch.set_num_threads(threads)
        faiss.omp_set_num_threads(faiss_threads)


def generate(folder: Path, clips: int) -> None:
    """Captioned clips of the shape of real ones; large areas of one colour make them cheaper to decode than art."""
    folder.mkdir(parents=True)
    stickers = all_stickers(held_out=False)
    for number in range(clips):
        sticker = stickers[number % len(stickers)]
        write_clip(render(sticker, FRAMES, SIZE, numpy_generator(_SEED, number)), folder / f"{number:03d}.webp", 40)
        (folder / f"{number:03d}.txt").write_text(sticker.caption, encoding="utf-8")


def take_clips(source: Path, folder: Path, most: int) -> None:
    """Copy clips of the right shape out of any data folder, evenly spread over it, so that both loaders read files.

    Raises:
        UserError: there are none.
    """
    limits = DecodeLimits()
    index = build_index(source, limits, require_trainable=False)
    fitting = [row for row in index.rows if (row.format, row.num_frames, row.width, row.height) == ("webp", FRAMES, SIZE, SIZE)]
    if not fitting:
        raise UserError(f"'{source}' has no animated WebP of {FRAMES} frames, {SIZE}×{SIZE} pixels. Without --data clips are generated.")
    folder.mkdir(parents=True)
    for number, at in enumerate(np.linspace(0, len(fitting) - 1, min(most, len(fitting))).astype(int)):
        row = fitting[at]
        try:
            data = read_place(index.place(row.clip_id), limits.max_bytes)
        except ClipError as error:
            raise UserError(f"{error}. It was readable a moment ago: does someone change '{source}'?") from error
        (folder / f"{number:03d}.webp").write_bytes(data)
        (folder / f"{number:03d}.txt").write_text(row.caption, encoding="utf-8")


def index_timed(folder: Path, kept: Path) -> tuple[ClipIndex, float]:
    """The index of a folder, and the seconds that one worker takes for a clip once its process has started."""
    done: list[float] = [perf_counter()]
    index = build_index(
        folder, DecodeLimits(), kept, drop_duplicates=False, workers=1, on_progress=lambda number, total: done.append(perf_counter())
    )
    counted = done[1:] if len(done) > 2 else done  # of a single clip, starting is all there is to see
    return index, (counted[-1] - counted[0]) / (len(counted) - 1)


def plans_of(index: ClipIndex) -> Iterator[SamplePlan]:
    """The samples of a run with default settings, in order."""
    curriculum = build_curriculum(RDTFSection())
    planner = StepPlanner(_SEED, _BATCH, index.trainable, index.frame_counts, curriculum)
    for step in count():
        yield from planner.plan(step, curriculum.initial()).samples


def _dataset(index: ClipIndex, cached: CachedClips | None = None) -> StickerDataset:
    return StickerDataset(index, _SEED, LATENT, SIZE, cached=cached)


def _turn(make: Callable[[SamplePlan], object], index: ClipIndex, samples: int, turns: int) -> Callable[[], None]:
    """Makes the next so many samples whenever it is called. Their plans are at hand, as a worker gets them: another process makes them."""
    plans = iter(list(islice(plans_of(index), samples * turns)))

    def run() -> None:
        """Makes the next ``samples`` of them; StopIteration once all turns were taken."""
        for _ in range(samples):
            make(next(plans))

    return run


def _decoded(index: ClipIndex, samples: int, repetitions: int, index_s: float) -> list[Row]:
    paths = [index.place(row.clip_id).path for row in index.rows]
    ours = _dataset(index)
    plain = PlainStickers([(path, index.caption(at)) for at, path in enumerate(paths)], SIZE, (LATENT.channels, LATENT.size, LATENT.size))
    turns = 1 + repetitions  # the first one warms up
    timings = take_turns(
        {
            _SAMPLES: _turn(lambda plan: ours[(plan,)], index, samples, turns),
            PLAIN: _turn(lambda plan: plain.sample(plan.clip_id, plan.k), index, samples, turns),
            ALL_OURS: lambda: [decode_clip(path, SIZE, (255, 255, 255), DecodeLimits()) for path in paths],
            ALL_THEIRS: lambda: [plain.all_frames(path) for path in paths],
        },
        repetitions,
    )
    return _decoded_rows(timings, samples, len(paths), index_s)


def _decoded_rows(timings: dict[str, Timing], samples: int, clips: int, index_s: float) -> list[Row]:
    """Of seconds for ``samples`` samples or ``clips`` whole clips, and of the seconds a clip is indexed in."""
    ours, plain, whole, theirs = (timings[name] for name in (_SAMPLES, PLAIN, ALL_OURS, ALL_THEIRS))
    rate, plain_rate = samples / ours.median, samples / plain.median
    paid_back = 1 / (1 / rate + index_s / _PAID_BACK)
    return [
        Row(_SAMPLES, rate, "samples/s", PLAIN, rate / plain_rate, PLAIN_BAR, at_least=True, spread=ours.spread),
        Row(_SAMPLES, rate, "samples/s", f"the bar of {RATE_BAR:g} a second", rate / RATE_BAR, 1.0, at_least=True, spread=ours.spread),
        Row(PLAIN, plain_rate, "samples/s", spread=plain.spread),
        Row("index a clip, once", 1e3 * index_s, "ms", "a sample", index_s * rate),
        Row(f"{_SAMPLES}, indexing shared by {_PAID_BACK} of each clip", paid_back, "samples/s", PLAIN, paid_back / plain_rate),
        Row(ALL_OURS, 1e3 * whole.median / clips, "ms", ALL_THEIRS, whole.median / theirs.median, spread=whole.spread),
    ]


def _cached(index: ClipIndex, folder: Path, samples: int, repetitions: int) -> list[Row]:
    """Of caches with T5's features as they are, zero past the caption's tokens and stored as far, and of the worst there could be."""
    datasets = {
        name: _dataset(index, fill_cache(index, folder / str(full), full)) for name, full in ((_CACHED_SAMPLES, False), (_FULL_TEXT, True))
    }
    turns = 1 + repetitions  # the first one warms up
    timings = take_turns(
        {name: _turn(lambda plan, made=dataset: made[(plan,)], index, samples, turns) for name, dataset in datasets.items()},  # type: ignore[misc]
        repetitions,
    )
    rates = {name: samples / timing.median for name, timing in timings.items()}
    rate, bar = rates[_CACHED_SAMPLES], f"the bar of {CACHED_BAR:g} a second"
    return [
        Row(_CACHED_SAMPLES, rate, "samples/s", bar, rate / CACHED_BAR, 1.0, at_least=True, spread=timings[_CACHED_SAMPLES].spread),
        Row(_FULL_TEXT, rates[_FULL_TEXT], "samples/s", bar, rates[_FULL_TEXT] / CACHED_BAR, spread=timings[_FULL_TEXT].spread),
    ]


def fill_cache(index: ClipIndex, folder: Path, all_tokens: bool) -> CachedClips:
    """A cache of random features, in fp16 as a V100 has them, written as real ones are.

    Args:
        all_tokens: T5's are none of them zero; else as many as a caption of so many words has, two a word and one for its end.
    """
    cache = FeatureCache.create(folder, CacheHeader({}, VARIANTS, LATENT.channels, LATENT.size, CLIP_DIM, T5_DIM))
    clips = CachedClips(cache, index)
    generator = torch.Generator().manual_seed(_SEED)

    def random(*shape: int) -> torch.Tensor:
        """Normal numbers in fp16, every call the next of one generator."""
        return torch.randn(*shape, generator=generator).half()

    for row in index.rows:
        texts = caption_texts(row.caption, 0.1, VARIANTS)
        latents = random(row.kept, LATENT.channels, LATENT.size, LATENT.size)
        clip, t5 = random(len(texts), TOKENS, CLIP_DIM), random(len(texts), TOKENS, T5_DIM)
        if not all_tokens:
            t5[:, 2 * len(words(row.caption)) + 1 :] = 0
        cache.write(clips.key(row.clip_id), ClipFeatures(latents, texts, clip, t5))
    return clips


def _variety(index: ClipIndex, real: bool) -> list[Row]:
    """Of generated clips there is no bar: their frames are as alike as their motion makes them."""
    found = measure_variety(((at, index.frame_features(at)) for at in index.trainable.tolist()), _SEED)
    bar = VARIETY_BAR if real else None
    return [
        Row(f"variety of {kind.k} frames, clustered", kind.clustered, "distance", "evenly spaced", kind.ratio, bar, at_least=real)
        for kind in found
        if kind.clips
    ]
