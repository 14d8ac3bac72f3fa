"""Makes animated stickers with an exported model.

text to animation:       python tools/generate.py --model OUT --prompt "a red circle slides left" --out x.gif
picture to animation:    ... --frame 0=a.png
prediction:              ... --frame 0=a.png --frame 1=b.png
interpolation:           ... --frame 0=a.png --frame 7=b.png
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from rdtf_ds.data.clips.writing import write_clip  # noqa: E402
from rdtf_ds.errors import UserError  # noqa: E402
from rdtf_ds.pipeline import RDTFPipeline  # noqa: E402

SUFFIXES = (".gif", ".webp", ".png", ".apng", ".mp4", ".webm")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def main() -> int:
    """Exit code 0, or 2 with one paragraph on standard error when the input does not do."""
    arguments = _parser().parse_args()
    try:
        report = _generate(arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(report))
    else:
        print(f"{', '.join(report['files'])}: {report['frames']} frames each, {report['seconds']:.1f} s on {report['device']}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder made by tools/export_fp16.py")
    parser.add_argument("--prompt", default="", help="caption; may be left out when frames are given")
    parser.add_argument("--frame", action="append", default=[], metavar="N=PICTURE", help="a visible frame, the first is 0; repeatable")
    parser.add_argument("--out", type=Path, required=True, help=f"file to write: {' '.join(SUFFIXES)}")
    parser.add_argument("--frames", type=int, help="frames of a clip (default: the most the model makes)")
    parser.add_argument("--steps", type=int, help="DDIM steps (default: the model's)")
    parser.add_argument("--eta", type=float, help="0 adds no noise while sampling (default: the model's)")
    parser.add_argument("--text_scale", type=float, help="guidance by the caption (default: the model's)")
    parser.add_argument("--image_scale", type=float, help="guidance by the visible frames (default: the model's)")
    parser.add_argument("--seed", type=int, default=0, help="of the first clip; the next ones count up")
    parser.add_argument("--count", type=int, default=1, help="clips to make; more than one are numbered: x_0.gif, x_1.gif, ...")
    parser.add_argument("--batch", type=int, default=1, help="clips made at once; changes memory and time, not the clips")
    parser.add_argument("--redraw_frames", action="store_true", help="show the model's version of the given frames, not the pictures")
    parser.add_argument("--scale", type=int, default=1, help="enlarge by whole pixels, for small models")
    parser.add_argument("--duration_ms", type=int, default=120, help="time each frame is shown")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: float16 on a GPU, float32 without")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _generate(arguments: argparse.Namespace) -> dict[str, object]:
    """Checks everything that can be checked before the model is loaded, makes the clips and writes them."""
    _check(arguments)
    pictures = _pictures(arguments.frame)
    device, dtype = _device(arguments.device, arguments.dtype)
    started = time.perf_counter()
    pipeline = RDTFPipeline.from_pretrained(arguments.model, torch_dtype=dtype).to(device)
    files: list[str] = []
    for first in range(0, arguments.count, arguments.batch):
        seeds = range(arguments.seed + first, arguments.seed + min(first + arguments.batch, arguments.count))
        clips = pipeline(
            arguments.prompt,
            pictures,
            num_frames=arguments.frames,
            num_inference_steps=arguments.steps,
            eta=arguments.eta,
            text_scale=arguments.text_scale,
            image_scale=arguments.image_scale,
            seeds=list(seeds),
            keep_given_frames=not arguments.redraw_frames,
        ).frames
        for clip in clips:
            path = arguments.out if arguments.count == 1 else arguments.out.with_stem(f"{arguments.out.stem}_{len(files)}")
            _write(clip, path, arguments.scale, arguments.duration_ms)
            files.append(str(path))
    return {
        "files": files,
        "seeds": list(range(arguments.seed, arguments.seed + arguments.count)),
        "prompt": arguments.prompt,
        "frames": len(clip),
        "device": device,
        "seconds": time.perf_counter() - started,
    }


def _check(arguments: argparse.Namespace) -> None:
    if not (arguments.model / "model_index.json").is_file():
        raise UserError(f"--model {arguments.model}: no exported model is there. Make one with: python tools/export_fp16.py CHECKPOINT OUT")
    if not arguments.prompt.strip() and not arguments.frame:
        raise UserError("neither --prompt nor --frame is given, so there is nothing to go by. Give a caption, pictures, or both.")
    if arguments.out.suffix.lower() not in SUFFIXES:
        raise UserError(f"--out {arguments.out}: the suffix is not one of {' '.join(SUFFIXES)}.")
    for name, least in (("count", 1), ("batch", 1), ("scale", 1), ("duration_ms", 10), ("eta", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"--{name} is {value}; it must be at least {least}.")


def _pictures(pairs: list[str]) -> dict[int, Image.Image]:
    pictures: dict[int, Image.Image] = {}
    for pair in pairs:
        number, equals, path = pair.partition("=")
        if not equals or not number.strip().isdecimal():
            raise UserError(f"--frame {pair}: write N=PICTURE, with N the frame's number, 0 for the first.")
        if int(number) in pictures:
            raise UserError(f"--frame {pair}: frame {int(number)} is given twice.")
        try:
            with Image.open(path) as image:
                pictures[int(number)] = image.convert("RGBA")
        except Exception as error:  # Pillow's readers raise OSError, SyntaxError, ValueError and more for a broken picture
            reason = "there is no such file" if isinstance(error, FileNotFoundError) else f"{error}"
            raise UserError(f"--frame {pair}: the picture cannot be read: {reason}.") from error
    return pictures


def _device(device: str, dtype: str) -> tuple[str, torch.dtype]:
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here. python tools/doctor.py says why; --device cpu works without one.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "float16" if device == "cuda" else "float32"
    return device, DTYPES[dtype]


def _write(clip: np.ndarray, path: Path, scale: int, duration_ms: int) -> None:
    try:
        write_clip(clip.repeat(scale, axis=1).repeat(scale, axis=2), path, duration_ms)
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written: {error.strerror or error}.") from error


if __name__ == "__main__":
    sys.exit(main())
