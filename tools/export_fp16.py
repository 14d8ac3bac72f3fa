"""Exports a checkpoint as fp16 safetensors in diffusers' layout: ``python tools/export_fp16.py CHECKPOINT OUT``."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rdtf_ds.errors import UserError  # noqa: E402
from rdtf_ds.export import export  # noqa: E402

ENCODERS = ("autoencoder", "clip", "t5")


def main() -> int:
    """Exit code 0, or 2 with one paragraph on standard error when the input cannot be exported."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a run folder (its newest complete step is taken) or a step folder")
    parser.add_argument("out", type=Path, help="folder to make; must not exist, or be empty")
    parser.add_argument("--weights", choices=("ema", "master"), default="ema", help="mean over training, or the weights as they are")
    parser.add_argument(
        "--encoders", nargs="+", default=[], metavar="NAME=SOURCE", help="other frozen parts than the run's: autoencoder=, clip=, t5="
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    try:
        report = export(arguments.checkpoint, arguments.out, arguments.weights, _sources(arguments.encoders))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(asdict(report)))
    else:
        size = f"{report.bytes / 2**20:,.1f} MiB"
        print(f"{report.parameters:,} parameters of step {report.step} ({report.weights}) in {report.folder}, {size}.")
        print(f'Next: python tools/generate.py --model {report.folder} --prompt "..." --out sticker.gif')
    return 0


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
