"""Examines the clips of a data folder once, for every run that trains on them.

    python tools/index_data.py DATA --out INDEX [--deepspeed_config C] [--set rdtf.data.KEY=VALUE ...] [--retry] [--json]

DATA is a folder of clips, a folder of tar shards, or a manifest (.csv, .jsonl). A run of the same config and keys then takes the index
with --set rdtf.data.index_dir=INDEX, and examines no clip itself. Stopped, it goes on where it was; run again, it examines what is new.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # nothing here is DeepSpeed's; it must not build anything

import torch  # noqa: E402

from rdtf_ds.data.indexing.index import ClipIndex  # noqa: E402
from rdtf_ds.data.indexing.split_check import split_doubts  # noqa: E402
from rdtf_ds.errors import UserError  # noqa: E402
from rdtf_ds.experiment import load_experiment  # noqa: E402
from rdtf_ds.training.data_assembly import index_clips, why_refused  # noqa: E402
from rdtf_ds.wording import counted  # noqa: E402

CONFIG = Path(__file__).resolve().parents[1] / "ds_configs" / "v100.json"
SHOWN_REASONS, SHOWN_FILES = 20, 3


@dataclass(frozen=True)
class Report:
    """What came of it.

    Attributes:
        counts: `ClipIndex.counts`.
        broken: for each reason how many clips, most first, and the first few of them.
        examined: files examined now, at ``per_second``; the others were known.
        doubts: of the split into training and validation.
        refused: why a run would not start from it, else None.
    """

    summary: str
    counts: dict[str, int]
    broken: list[dict[str, Any]]
    examined: int
    seconds: float
    per_second: float
    fingerprint: str
    doubts: list[str]
    refused: str | None

    def lines(self) -> list[str]:
        """For people."""
        lines = [self.summary]
        for reason in self.broken[:SHOWN_REASONS]:
            more = ", ..." if reason["clips"] > len(reason["first"]) else ""
            lines.append(f"  {reason['clips']} broken: {reason['reason']}: {', '.join(reason['first'])}{more}")
        if len(self.broken) > SHOWN_REASONS:
            lines.append(f"  and {len(self.broken) - SHOWN_REASONS} more reasons; --json lists them all")
        lines.append(f"{counted(self.counts['duplicates'], 'duplicate')}, {self.counts['held_out']} held out from training")
        speed = f", {self.per_second:.1f} a second" if self.examined else "; all others were known"
        lines.append(f"{counted(self.examined, 'file')} examined{speed}; {self.seconds:.1f} s in all")
        return [*lines, *(f"WARNING: {doubt}" for doubt in self.doubts)]


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when there is an index to train from, 1 when more clips are broken than a run allows, 2 when there is none.

    Beyond 0, one paragraph on standard error says why.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", metavar="DATA", help="folder of clips or of tar shards, or a manifest")
    parser.add_argument("--out", type=Path, required=True, metavar="INDEX", help="folder of the index, made if it is not there")
    parser.add_argument("--deepspeed_config", type=Path, default=CONFIG, metavar="JSON", help="the run's experiment (ds_configs/v100.json)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="as for the run; repeat for more")
    parser.add_argument("--retry", action="store_true", help="examine again what failed for a reason that may pass, such as a deadline")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args(arguments)
    if not options.data_dir:
        parser.error("DATA is empty: name a folder or a manifest")
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        report = run(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"Interrupted; what was examined is kept in '{options.out}', the same command goes on.", file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps(asdict(report)))
    else:
        print("\n".join(report.lines()))
    if report.refused is not None:
        print(f"A run would not start from this index: {report.refused}", file=sys.stderr)
        return 1
    if not options.json:
        print(f"Train with it: --data_dir {options.data_dir} --set rdtf.data.index_dir={options.out}")
    return 0


def run(options: argparse.Namespace) -> Report:
    """Build the index, or add to it."""
    experiment = load_experiment(options.deepspeed_config, options.overrides, data_dir=options.data_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    examined = 0

    def count(done: int, _: int) -> None:
        nonlocal examined
        examined = done

    started = time.perf_counter()
    index = index_clips(experiment.rdtf, options.data_dir, options.out, device, count, options.retry)
    seconds = time.perf_counter() - started
    refused = why_refused(experiment.rdtf, Path(experiment.rdtf.output_dir), index)
    speed = examined / seconds
    return Report(
        index.summary(), index.counts(), by_reason(index), examined, seconds, speed, index.fingerprint, split_doubts(index), refused
    )


def by_reason(index: ClipIndex) -> list[dict[str, Any]]:
    """The broken clips, the most frequent reason first."""
    clips: Counter[str] = Counter()
    first: dict[str, list[str]] = {}
    for problem in index.problems:
        clips[problem.reason] += 1
        if clips[problem.reason] <= SHOWN_FILES:
            first.setdefault(problem.reason, []).append(problem.path)
    return [{"reason": reason, "clips": number, "first": first[reason]} for reason, number in clips.most_common()]


if __name__ == "__main__":
    sys.exit(main())
