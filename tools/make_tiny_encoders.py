"""Writes tiny CLIP, T5 and autoencoder folders with random weights, for tests and demos: ``python tools/make_tiny_encoders.py OUT``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rdtf_ds.models.tiny_encoders import DEFAULT_WIDTH, STICKER_WORDS, write_tiny_encoders  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder for text_encoder/ tokenizer/ text_encoder_2/ tokenizer_2/ vae/")
    parser.add_argument("--width", type=int, default=DEFAULT_WIDTH, help=f"feature width (default {DEFAULT_WIDTH})")
    parser.add_argument("--words", nargs="+", default=[], metavar="WORD", help="words beside those of the synthetic stickers")
    arguments = parser.parse_args()
    if arguments.width < 8 or arguments.width % 8:
        parser.error(f"--width must be a positive multiple of 8, got {arguments.width}")
    try:
        write_tiny_encoders(arguments.out, arguments.width, (*STICKER_WORDS, *(word.lower() for word in arguments.words)))
    except OSError as error:
        print(f"cannot write to {arguments.out}: {error.strerror or error}. Choose another folder.", file=sys.stderr)
        return 2
    print(f"tiny encoders in {arguments.out}: give it as rdtf.encoders.clip, rdtf.encoders.t5 and rdtf.encoders.autoencoder")
    return 0


if __name__ == "__main__":
    sys.exit(main())
