"""Writes a folder of captioned synthetic stickers: ``python tools/make_stickers.py OUT --count 600``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rdtf_ds.data.synthetic import write_stickers  # noqa: E402
from rdtf_ds.wording import counted  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder for the clips and metadata.jsonl")
    parser.add_argument("--count", type=int, default=600, help="number of clips (default 600)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=64, help="side in pixels (default 64)")
    parser.add_argument("--held_out", action="store_true", help="the colour x shape pairs kept out of training, instead of the others")
    arguments = parser.parse_args()
    if arguments.count < 1 or arguments.size < 16:
        parser.error(f"--count must be at least 1 and --size at least 16, got {arguments.count} and {arguments.size}")
    try:
        write_stickers(arguments.out, arguments.count, arguments.seed, arguments.size, held_out=arguments.held_out)
    except OSError as error:
        print(f"cannot write to {arguments.out}: {error.strerror or error}. Choose another folder.", file=sys.stderr)
        return 2
    print(f"{counted(arguments.count, 'clip')} and metadata.jsonl in {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
