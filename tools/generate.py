"""Makes animated stickers with an exported model.

text to animation:       python tools/generate.py --model OUT --prompt "a red circle slides left" --out x.gif
picture to animation:    ... --frame 0=a.png
prediction:              ... --frame 0=a.png --frame 1=b.png
interpolation:           ... --frame 0=a.png --frame 7=b.png
many prompts:            python tools/generate.py --model OUT --prompts prompts.txt --out_dir clips
a grid of settings:      ... --grid text_scale=1,4,7.5 --grid steps=25,50 --seeds 0,1,2 --out_dir clips
how a clip was made:     python tools/generate.py --show x.gif
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rdtf_ds.data.clips.metadata import read_metadata  # noqa: E402
from rdtf_ds.errors import UserError  # noqa: E402
from rdtf_ds.generation.ordering import SUFFIXES, Order, take_order  # noqa: E402
from rdtf_ds.models.devices import DTYPES  # noqa: E402
from rdtf_ds.samplers import SAMPLERS  # noqa: E402

INTERRUPTED = 130


def main() -> int:
    """Exit code 0, 2 with what is wrong on standard error when the input does not do, or 130 after Ctrl-C."""
    arguments = _parser().parse_args()
    order: Order | None = None
    try:
        if arguments.show is not None:
            return _show(arguments.show)
        order = take_order(arguments)
        report = order.fill()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        done = f"{order.done} of {len(order.jobs)} clips are there. " if order is not None else ""
        print(f"\nStopped. {done}The same command goes on with the rest.", file=sys.stderr)
        return INTERRUPTED
    if arguments.json:
        print(json.dumps(report))
    else:
        print(_told(report))
    return 0


def _show(path: Path) -> int:
    metadata = read_metadata(path)
    if metadata is None:
        raise UserError(f"'{path}' says nothing of how it was made: this package did not make it, or another program rewrote it.")
    print(json.dumps(metadata, indent=2, ensure_ascii=False))
    return 0


def _told(report: dict[str, object]) -> str:
    files, kept, sheets = report["files"], report["kept"], report["sheets"]
    assert isinstance(files, list) and isinstance(kept, int) and isinstance(sheets, list)
    shown = ", ".join(files) if len(files) <= 4 else f"{files[0]} … {files[-1]}, {len(files)} clips"
    lines = [f"{shown}: {report['frames']} frames each, {report['seconds']:.1f} s on {report['device']}"]
    if kept:
        lines.append(f"{kept} of them were there already, made with the same settings, and were left.")
    if sheets:
        part = f", of the first {report['shown']} clips" if report["shown"] != len(files) else ""
        lines.append(f"look at {' and '.join(sheets)}{part}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder made by tools/export_fp16.py")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print what a clip's file says of how it was made, and end")
    what = parser.add_argument_group("what to make")
    what.add_argument("--prompt", default="", help="caption; may be left out when frames are given")
    what.add_argument("--prompts", type=Path, metavar="FILE", help="many: .txt a line each; .jsonl, .csv with pictures, seeds, settings")
    what.add_argument("--frame", action="append", default=[], metavar="N=PICTURE", help="a visible frame, the first is 0; repeatable")
    what.add_argument("--frames", type=int, help="frames of a clip (default: the most the model makes)")
    what.add_argument("--seed", type=int, help="of the first clip of a prompt (default: 0); the next ones count up")
    what.add_argument("--count", type=int, default=1, help="clips of each prompt; more than one are numbered: x_0.gif, x_1.gif, ...")
    what.add_argument("--seeds", metavar="N,N", help="in place of --seed and --count: the seeds of each prompt's clips")
    what.add_argument("--grid", action="append", default=[], metavar="NAME=V,V", help="every combination: text_scale=1,4 ...; repeatable")
    where = parser.add_argument_group("where to")
    where.add_argument("--out", type=Path, help=f"file to write: {' '.join(SUFFIXES)}")
    where.add_argument("--out_dir", type=Path, help="folder for many; clips that are there already are left")
    where.add_argument("--suffix", default=".gif", choices=SUFFIXES, help="of the clips in --out_dir (default: .gif)")
    where.add_argument("--overwrite", action="store_true", help="clips of other settings that are in --out_dir are made again")
    where.add_argument("--sheet", action="store_true", help="also write all clips on one picture, as PNG and playing (--grid always does)")
    how = parser.add_argument_group("how")
    how.add_argument("--sampler", choices=SAMPLERS, help="default: the model's")
    how.add_argument("--steps", type=int, help="steps of sampling (default: the model's)")
    how.add_argument("--eta", type=float, help="of ddim; 0 adds no noise while sampling (default: the model's)")
    how.add_argument("--text_scale", type=float, help="guidance by the caption (default: the model's)")
    how.add_argument("--image_scale", type=float, help="guidance by the visible frames (default: the model's)")
    how.add_argument("--fit", action="store_true", help="pictures of another size or with transparency are fitted, not refused")
    how.add_argument("--redraw_frames", action="store_true", help="show the model's version of the given frames, not the pictures")
    how.add_argument("--scale", type=int, default=1, help="enlarge by whole pixels, for small models")
    how.add_argument("--duration_ms", metavar="N or N,N", help="time each frame is shown, or one for each (default: the model's)")
    machine = parser.add_argument_group("by what")
    machine.add_argument("--batch", type=int, default=1, help="clips made at once; changes memory and time, not the clips")
    machine.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    machine.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: float16 on a GPU, float32 without")
    machine.add_argument("--offload", action="store_true", help="on a GPU: parts wait in CPU memory until they are needed")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(main())
