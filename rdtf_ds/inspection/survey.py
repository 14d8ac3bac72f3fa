"""What is in a data folder, in numbers and examples: columns of its index in, nothing decoded.

Lists of paths are capped, with the full count beside them, so that a survey of millions of clips stays a page. The rows are read twice, in
parts: once to count, once to fetch the few that are shown. Nothing is sampled; of a clip that was read 8 bytes stay.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rdtf_ds.data.indexing.index_table import BROKEN
from rdtf_ds.data.sources.captions import words
from rdtf_ds.inspection.counting import FrequentWords, Tally, hashes, largest_groups
from rdtf_ds.inspection.histograms import Histogram, exponents_of_two, histogram, powers_of_two
from rdtf_ds.inspection.variety import Variety

MOST_PATHS = 50
"""Paths listed of one kind of thing."""
MOST_KINDS = 25
"""Kinds of fault, groups of duplicates and frequent words listed."""
MOST_SIZES = 300
_EXAMPLES = 12
_SIDE = 2**31  # beyond any format's; width and height of a canvas make one number
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
        frequent_words: In captions; ``words_short``: counts of words that may be missing in each, as `FrequentWords.short` says.
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
    words_short: int
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


def survey(root: str, summary: str, counts: Mapping[str, int], read: Callable[[], Iterable[pa.RecordBatch]]) -> Survey:
    """Count everything.

    Args:
        summary: The index's line for people.
        counts: The index's own.
        read: The ``COLUMNS`` of the index, a row a clip, in parts of any length; called twice.
    """
    found = _Counts()
    for part in read():
        found.add(part)
    shown = _Shown(found)
    for part in read():
        shown.add(part)
    sizes, often = found.sizes.read()
    order = np.argsort(-often, kind="stable")[:MOST_SIZES]
    return Survey(
        root=root,
        summary=summary,
        counts=dict(counts),
        formats=dict(sorted(found.formats.items(), key=lambda pair: (-pair[1], pair[0]))),
        frame_counts={int(frames): int(clips) for frames, clips in zip(*found.frame_counts.read(), strict=True)},
        sizes={divmod(int(sizes[place]), _SIDE): int(often[place]) for place in order},
        distinct_sizes=len(sizes),
        bytes=_of_exponents(found.exponents),
        seconds=histogram(*found.seconds.read()),
        frames_per_second=histogram(*found.rates.read()),
        intact=found.intact,
        with_alpha=found.with_alpha,
        words=histogram(*found.lengths.read(), whole=True),
        frequent_words=found.words.most_common(MOST_KINDS),
        words_short=found.words.short,
        captions=shown.spread_captions(),
        without_caption=found.without_caption,
        equals=list(shown.equals.values()),
        equal_groups=shown.equal_groups,
        broken={kind_of_fault(files.first[0]["reason"]): files for files in shown.broken.values()},
        broken_kinds=shown.broken_kinds,
    )


class _Counts:
    """What the first reading finds.

    Attributes:
        contents, kinds: A hash for each intact clip's content, and for the kind of each broken one's fault, in the order of the rows.
    """

    def __init__(self) -> None:
        self.intact = self.with_alpha = 0
        self.formats: Counter[str] = Counter()
        self.frame_counts, self.sizes, self.exponents, self.lengths = (Tally(np.int64) for _ in range(4))
        self.seconds, self.rates = Tally(np.float64), Tally(np.float64)
        self.words = FrequentWords()
        self.without_caption = Capped()
        self.contents: list[np.ndarray] = []
        self.kinds: list[np.ndarray] = []

    def add(self, part: pa.RecordBatch) -> None:
        """Count some more rows."""
        intact, broken = _apart(part)
        frames, seconds = intact["num_frames"].to_numpy(), _seconds(intact)
        timed = (seconds > 0) & (frames > 1)
        self.intact += len(intact)
        self.with_alpha += pc.sum(intact["has_alpha"]).as_py() or 0
        self.formats.update({pair["values"]: pair["counts"] for pair in intact["format"].value_counts().to_pylist()})
        self.frame_counts.add(frames)
        self.sizes.add(intact["width"].to_numpy().astype(np.int64) * _SIDE + intact["height"].to_numpy())
        self.exponents.add(exponents_of_two(intact["size"].to_numpy()))
        self.seconds.add(seconds[timed])
        self.rates.add(frames[timed] / seconds[timed])
        self._add_captions(intact)
        self.contents.append(hashes(intact["content"].to_pylist(), len(intact)))
        self.kinds.append(hashes(map(kind_of_fault, broken["reason"].to_pylist()), len(broken)))

    def _add_captions(self, intact: pa.RecordBatch) -> None:
        lengths: list[int] = []
        every: list[str] = []
        for row, caption in enumerate(intact["caption"].to_pylist()):
            if not caption.strip():
                self.without_caption.add(intact["path"][row].as_py())
                continue
            found = words(caption)
            lengths.append(len(found))
            every += found
        folded: Counter[str] = Counter()
        for word, count in Counter(every).items():
            folded[_PUNCTUATION.sub("", word.casefold())] += count
        del folded[""]  # of punctuation alone
        self.words.add(folded)
        self.lengths.add(np.array(lengths, np.int64))


class _Shown:
    """What the second reading fetches: rows of the largest groups, and captions from all over the folder.

    Attributes:
        equals, broken: By hash, the largest group first.
    """

    def __init__(self, found: _Counts) -> None:
        self._contents, self._kinds = (np.concatenate([np.empty(0, np.int64), *parts]) for parts in (found.contents, found.kinds))
        groups, self.equal_groups = largest_groups(self._contents, MOST_KINDS, at_least=2)
        kinds, self.broken_kinds = largest_groups(self._kinds, MOST_KINDS, at_least=1)
        self.equals, self.broken = ({group: Capped() for group in some} for some in (groups, kinds))
        self._every = max(1, found.intact // (4 * _EXAMPLES))
        self._captions: list[str] = []
        self._intact = self._broken = 0  # rows of either kind that were passed

    def add(self, part: pa.RecordBatch) -> None:
        """Fetch what is wanted of the next rows."""
        intact, broken = _apart(part)
        for row in range(-self._intact % self._every, len(intact), self._every):
            self._captions.append(intact["caption"][row].as_py().strip())
        for group, row in _members(self._contents[self._intact :], self.equals, intact.select(["path", "caption", "duplicate_of"])):
            self.equals[group].add({"path": row["path"], "caption": row["caption"], "dropped": row["duplicate_of"] >= 0})
        for group, row in _members(self._kinds[self._broken :], self.broken, broken.select(["path", "reason"])):
            self.broken[group].add(row)
        self._intact += len(intact)
        self._broken += len(broken)

    def spread_captions(self) -> list[str]:
        """Some different ones."""
        there = list(dict.fromkeys(filter(None, self._captions)))
        return there[:: max(1, len(there) // _EXAMPLES)][:_EXAMPLES]


def _apart(part: pa.RecordBatch) -> tuple[pa.RecordBatch, pa.RecordBatch]:
    """The intact clips and the broken ones."""
    broken = pc.equal(part["status"], BROKEN)
    return part.filter(pc.invert(broken)), part.filter(broken)


def _members(hashed: np.ndarray, wanted: Mapping[int, Capped], rows: pa.RecordBatch) -> Iterable[tuple[int, dict[str, Any]]]:
    """(hash, row) of each row that is of one of the groups; ``hashed``: of these rows, and of any after them."""
    hashed = hashed[: len(rows)]
    places = np.flatnonzero(np.isin(hashed, np.array(list(wanted), np.int64)))
    return zip(hashed[places].tolist(), rows.take(pa.array(places)).to_pylist(), strict=True)


def kind_of_fault(reason: str) -> str:
    """A reason without its numbers, so that files with the same fault stand together."""
    return _NUMBER.sub("…", reason)


def _of_exponents(found: Tally) -> Histogram:
    exponents, counts = found.read()
    return powers_of_two(np.exp2(exponents), counts)


def _seconds(intact: pa.RecordBatch) -> np.ndarray:
    """How long each clip is shown, 0 where it does not say: float64."""
    durations = intact["durations_ms"]
    lengths = pc.list_value_length(durations).to_numpy()
    starts = np.cumsum(lengths) - lengths
    seconds = np.zeros(len(lengths))
    there = lengths > 0  # the values of one such clip end where those of the next begin
    if there.any():
        seconds[there] = np.add.reduceat(durations.flatten().to_numpy(), starts[there], dtype=np.int64) / 1000
    return seconds
