"""Exports a checkpoint in diffusers' layout, in fp16 unless told otherwise: ``python tools/export_fp16.py CHECKPOINT OUT``."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rdtf_ds.errors import UserError  # noqa: E402
from rdtf_ds.export.exporting import RECORD, ExportReport, export  # noqa: E402
from rdtf_ds.export.half_check import HalfCheck, half_check  # noqa: E402
from rdtf_ds.export.weight_files import DEFAULT_SHARD, DTYPES  # noqa: E402

ENCODERS = ("autoencoder", "clip", "t5")


def main() -> int:
    """Exit code 0, 1 when the exported model fails its check, 2 when the input cannot be exported, 130 for Ctrl-C.

    Of the last two, one paragraph on standard error says what is there.
    """
    arguments = _parser().parse_args()
    check = None
    try:
        report = export(
            arguments.checkpoint, arguments.out, arguments.weights, _sources(arguments.encoders), arguments.dtype, arguments.max_shard_size
        )
        if arguments.half_check:
            check = half_check(report.checkpoint, report.folder, arguments.weights, arguments.dtype)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"Interrupted; {_what_is_there(arguments.out)}.", file=sys.stderr)
        return 130
    if arguments.json:
        print(json.dumps({**asdict(report), "half_check": check and {**asdict(check), "holds": check.holds}}))
    else:
        print("\n".join(_lines(report, check)))
    return 1 if check is not None and not check.holds else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a run folder (its newest complete step is taken) or a step folder")
    parser.add_argument("out", type=Path, help="folder to make; must not exist, or be empty")
    parser.add_argument("--weights", choices=("ema", "master"), default="ema", help="mean over training, or the weights as they are")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float16", help="of DFGN's weights (float16); the frozen parts keep fp32")
    parser.add_argument("--max_shard_size", default=DEFAULT_SHARD, help=f"a part above it becomes several files ({DEFAULT_SHARD})")
    parser.add_argument("--half_check", action="store_true", help="compare an answer of the exported DFGN with fp32; takes more memory")
    parser.add_argument(
        "--encoders", nargs="+", default=[], metavar="NAME=SOURCE", help="other frozen parts than the run's: autoencoder=, clip=, t5="
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _lines(report: ExportReport, check: HalfCheck | None) -> list[str]:
    size, speed = f"{report.bytes / 2**20:,.1f} MiB", f"{report.seconds:.1f} s, {report.gb_per_second:.2f} GB/s of fp32 weights"
    what = f"{report.parameters:,} parameters of step {report.step} ({report.weights}, {report.dtype})"
    lines = [f"{what} in {report.folder}, {size}; {speed}."]
    if check is not None:
        lines.append(str(check))
    return [*lines, f'Next: python tools/generate.py --model {report.folder} --prompt "..." --out sticker.gif']


def _what_is_there(out: Path) -> str:
    return f"'{out}' is whole, but was not checked" if (out / RECORD).is_file() else f"nothing of '{out}' was kept"


def _sources(pairs: list[str]) -> dict[str, str]:
    sources = {}
    for pair in pairs:
        name, equals, source = pair.partition("=")
        if name not in ENCODERS or not equals or not source:
            raise UserError(f"--encoders {pair}: write NAME=SOURCE, where NAME is {', '.join(ENCODERS)} and SOURCE a folder or hub id.")
        sources[name] = source
    return sources


if __name__ == "__main__":
    sys.exit(main())
