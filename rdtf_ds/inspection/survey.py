"""What is in a data folder, in numbers and examples: columns of its index in, nothing decoded.

Lists of paths are capped, with the full count beside them, so that a survey of millions of clips stays a page.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rdtf_ds.data.indexing.index_table import BROKEN
from rdtf_ds.data.sources.captions import words
from rdtf_ds.inspection.histograms import Histogram, histogram, powers_of_two
from rdtf_ds.inspection.variety import Variety

MOST_PATHS = 50
"""Paths listed of one kind of thing."""
MOST_KINDS = 25
"""Kinds of fault, groups of duplicates and frequent words listed."""
MOST_SIZES = 300
_EXAMPLES = 12
_BATCH = 8192
_PUNCTUATION = re.compile(r"^\W+|\W+$")
_NUMBER = re.compile(r"(?<![\w-])\d+(\.\d+)?(?!\w)")  # not the digits of MP4 and UTF-8
COLUMNS = (
    "path", "caption", "content", "duplicate_of", "size", "status", "reason", "format", "num_frames", "width", "height", "has_alpha",
    "durations_ms",
)  # fmt: skip
"""Columns of the index that are read."""


@dataclass
class Capped:
    """The first of many, and how many there are."""

    first: list[Any] = field(default_factory=list)
    total: int = 0

    def add(self, item: Any) -> None:
        """Count one more; keep it while there is room."""
        self.total += 1
        if len(self.first) < MOST_PATHS:
            self.first.append(item)

    @property
    def left_out(self) -> int:
        """How many are counted but not kept."""
        return self.total - len(self.first)

    def to_json(self) -> dict[str, Any]:
        """What is kept and how many there are."""
        return {"total": self.total, "first": self.first}


@dataclass
class Survey:
    """All that the report tells of a folder but the clips themselves.

    Attributes:
        counts: Of the index: files, trainable, static, broken, held_out, duplicates, without_caption.
        formats, frame_counts, sizes: How many clips each, of sizes the most frequent; these and what follows are of all intact clips.
        seconds, frames_per_second: Of clips that say how long their frames are shown.
        without_caption: Paths.
        equals: Clips of equal content, the largest groups; ``equal_groups`` counts all. Dropped are those with an equal caption, too.
        broken: By kind of reason, the most frequent ones; ``broken_kinds`` counts all.
        variety, variety_clips: Measured on so many of the trainable clips.
    """

    root: str
    summary: str
    counts: dict[str, int]
    formats: dict[str, int]
    frame_counts: dict[int, int]
    sizes: dict[tuple[int, int], int]
    distinct_sizes: int
    bytes: Histogram
    seconds: Histogram
    frames_per_second: Histogram
    intact: int
    with_alpha: int
    words: Histogram
    frequent_words: dict[str, int]
    captions: list[str]
    without_caption: Capped
    equals: list[Capped]
    equal_groups: int
    broken: dict[str, Capped]
    broken_kinds: int
    variety: list[Variety] = field(default_factory=list)
    variety_clips: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        plain = {name: asdict(value) if isinstance(value, Histogram) else value for name, value in vars(self).items()}
        plain["sizes"] = [{"width": width, "height": height, "clips": count} for (width, height), count in self.sizes.items()]
        plain["without_caption"] = self.without_caption.to_json()
        plain["equals"] = [group.to_json() for group in self.equals]
        plain["broken"] = {kind: files.to_json() for kind, files in self.broken.items()}
        plain["variety"] = [asdict(row) | {"ratio": row.ratio} for row in self.variety]
        return plain


def survey(root: str, summary: str, counts: Mapping[str, int], rows: pa.RecordBatch) -> Survey:
    """Count everything.

    Args:
        summary: The index's line for people.
        counts: The index's own.
        rows: The ``COLUMNS`` of the index, a row a clip.
    """
    table = pa.Table.from_batches([rows])
    broken = pc.equal(table["status"], BROKEN)
    intact, faults = table.filter(pc.invert(broken)), _by_kind(table.filter(broken))
    seconds = _seconds(intact)
    timed = (seconds > 0) & (intact["num_frames"].to_numpy() > 1)
    lengths, frequent, examples = _captions(intact["caption"])
    equals, groups = _equals(intact)
    sizes, distinct_sizes = _sizes(intact)
    return Survey(
        root=root,
        summary=summary,
        counts=dict(counts),
        formats=dict(sorted(_counts(intact["format"]), key=lambda pair: (-pair[1], pair[0]))),
        frame_counts=dict(sorted(_counts(intact["num_frames"]))),
        sizes=sizes,
        distinct_sizes=distinct_sizes,
        bytes=powers_of_two(intact["size"].to_numpy()),
        seconds=histogram(seconds[timed]),
        frames_per_second=histogram(intact["num_frames"].to_numpy()[timed] / seconds[timed]),
        intact=len(intact),
        with_alpha=pc.sum(intact["has_alpha"]).as_py() or 0,
        words=histogram(lengths, whole=True),
        frequent_words=frequent,
        captions=examples,
        without_caption=_first_paths(intact.filter(pc.equal(pc.utf8_trim_whitespace(intact["caption"]), ""))),
        equals=equals,
        equal_groups=groups,
        broken=dict(sorted(faults.items(), key=lambda item: (-item[1].total, item[0]))[:MOST_KINDS]),
        broken_kinds=len(faults),
    )


def kind_of_fault(reason: str) -> str:
    """A reason without its numbers, so that files with the same fault stand together."""
    return _NUMBER.sub("…", reason)


def _counts(column: pa.ChunkedArray) -> list[tuple[Any, int]]:
    return [(pair["values"], pair["counts"]) for pair in column.value_counts().to_pylist()]


def _first_paths(table: pa.Table) -> Capped:
    return Capped(table["path"].slice(0, MOST_PATHS).to_pylist(), len(table))


def _by_kind(broken: pa.Table) -> dict[str, Capped]:
    kinds: defaultdict[str, Capped] = defaultdict(Capped)
    for batch in broken.select(["path", "reason"]).to_batches(max_chunksize=_BATCH):
        for row in batch.to_pylist():
            kinds[kind_of_fault(row["reason"])].add(row)
    return kinds


def _seconds(intact: pa.Table) -> np.ndarray:
    """How long each clip is shown, 0 where it does not say: float64."""
    durations = intact["durations_ms"].combine_chunks()
    lengths = pc.list_value_length(durations).to_numpy()
    starts = np.cumsum(lengths) - lengths
    seconds = np.zeros(len(lengths))
    there = lengths > 0  # the values of one such clip end where those of the next begin
    if there.any():
        seconds[there] = np.add.reduceat(durations.flatten().to_numpy(), starts[there], dtype=np.int64) / 1000
    return seconds


def _sizes(intact: pa.Table) -> tuple[dict[tuple[int, int], int], int]:
    """Clips of the most frequent sizes, and how many sizes there are."""
    pairs = np.stack([intact["width"].to_numpy(), intact["height"].to_numpy()], axis=1)
    sizes, counts = np.unique(pairs, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:MOST_SIZES]
    return {(int(sizes[place][0]), int(sizes[place][1])): int(counts[place]) for place in order}, len(sizes)


def _captions(captions: pa.ChunkedArray) -> tuple[Sequence[int], dict[str, int], list[str]]:
    """Words of each caption there is, the most frequent words, and some captions from all over the folder."""
    lengths: list[int] = []
    counted: Counter[str] = Counter()
    for start in range(0, len(captions), _BATCH):
        for caption in captions.slice(start, _BATCH).to_pylist():
            if caption.strip():
                found = words(caption)
                lengths.append(len(found))
                counted.update(filter(None, (_PUNCTUATION.sub("", word) for word in map(str.casefold, found))))
    places = range(0, len(captions), max(1, len(captions) // (4 * _EXAMPLES)))
    there = dict.fromkeys(text for place in places if (text := captions[place].as_py().strip()))
    spread = list(there)[:: max(1, len(there) // _EXAMPLES)]
    return lengths, dict(counted.most_common(MOST_KINDS)), spread[:_EXAMPLES]


def _equals(intact: pa.Table) -> tuple[list[Capped], int]:
    """The largest groups of clips of equal content, and how many groups there are."""
    codes = intact["content"].combine_chunks().dictionary_encode().indices.to_numpy()
    counts = np.bincount(codes)
    repeated = np.flatnonzero(counts > 1)
    found = []
    for code in repeated[np.argsort(-counts[repeated], kind="stable")[:MOST_KINDS]]:
        members = intact.take(np.flatnonzero(codes == code)[:MOST_PATHS]).select(["path", "caption", "duplicate_of"]).to_pylist()
        clips = [{"path": row["path"], "caption": row["caption"], "dropped": row["duplicate_of"] >= 0} for row in members]
        found.append(Capped(clips, int(counts[code])))
    return found, len(repeated)
