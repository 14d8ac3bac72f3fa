"""Fills a feature cache, from which training runs without the frozen encoders.

    python tools/cache_dataset.py --deepspeed_config C [--set KEY=VALUE ...] [--data_dir DIR] --out CACHE [--variants 8]

Give it the config, the --set and the clips of the run, and the run --set rdtf.memory.encoders=cached rdtf.memory.cache_dir=CACHE.
Stopped, it goes on where it was; several of it may run at once, say one for each GPU (CUDA_VISIBLE_DEVICES).
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # nothing here is DeepSpeed's; it must not build anything

import numpy as np  # noqa: E402
import torch  # noqa: E402

from rdtf_ds.data.cache_header import HEADER, CacheError, CacheHeader  # noqa: E402
from rdtf_ds.data.clips.decoding import decode_clip  # noqa: E402
from rdtf_ds.data.feature_cache import FeatureCache  # noqa: E402
from rdtf_ds.data.indexing.index import ClipIndex  # noqa: E402
from rdtf_ds.data.indexing.split_check import split_doubts  # noqa: E402
from rdtf_ds.errors import UserError  # noqa: E402
from rdtf_ds.experiment import Experiment, load_experiment  # noqa: E402
from rdtf_ds.training.cache_making import FeatureMaker, Filled, fill_cache  # noqa: E402
from rdtf_ds.training.caching import clips_of_cache, make_header  # noqa: E402
from rdtf_ds.training.data_assembly import decode_limits, make_index, why_refused  # noqa: E402
from rdtf_ds.training.encoders import encoder_dtype, load_encoders  # noqa: E402
from rdtf_ds.wording import counted  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Make or extend a cache; the exit code.

    0 when every clip that can be decoded is in it, 1 when some were not decoded for a reason that may pass or when more are broken than
    a run allows, 2 with one paragraph on standard error when it cannot be made.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", required=True, metavar="JSON", help="the run's experiment")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="as for the run; repeat for more")
    parser.add_argument("--data_dir", metavar="DIR", help="folder of clips (rdtf.data.data_dir)")
    parser.add_argument("--seed", type=int, metavar="N", help="the run's (rdtf.seed); it makes the clips where there is no folder of them")
    parser.add_argument("--out", type=Path, required=True, metavar="CACHE", help="the cache, made if it is not there")
    parser.add_argument("--variants", type=int, default=8, metavar="N", help="draws of hidden words for each caption (8)")
    options = parser.parse_args(arguments)
    if options.variants < 1:
        parser.error(f"--variants is {options.variants}: one draw of hidden words is the least")
    try:
        cache_dir = f"rdtf.memory.cache_dir={json.dumps(str(options.out))}"
        experiment = load_experiment(
            options.deepspeed_config, [*options.overrides, cache_dir], data_dir=options.data_dir, seed=options.seed
        )
        index, filled = run(experiment, options.out, options.variants)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except torch.OutOfMemoryError:
        print(
            f"the GPU's memory does not do for the encoders and one clip. What is in '{options.out}' is whole, the same command goes on: "
            "see by nvidia-smi what else is on that GPU, or take another one by CUDA_VISIBLE_DEVICES.",
            file=sys.stderr,
        )
        return UserError.exit_code
    except KeyboardInterrupt:
        print(f"Interrupted; what is in '{options.out}' is whole, the same command goes on.", file=sys.stderr)
        return 130
    for doubt in split_doubts(index):
        print(f"WARNING: {doubt}", file=sys.stderr)
    print(index.summary())
    print(f"{options.out}: {counted(filled.made, 'clip')} made, {filled.kept} there before, {len(filled.broken)} not decodable")
    for problem in filled.broken:
        print(f"  {problem.path}: {problem.reason}")
    if filled.put_off:
        for problem in filled.put_off:
            print(f"  {problem.path}: {problem.reason}", file=sys.stderr)
        print(
            f"Not decoded for a reason that may pass, and not in '{options.out}' yet: {counted(len(filled.put_off), 'clip')}. The same "
            "command tries again, with more time by --set rdtf.data.decode_timeout_s=S. A run from this cache needs them all.",
            file=sys.stderr,
        )
        return 1
    try:
        refused = why_refused(experiment.rdtf, Path(experiment.rdtf.output_dir), clips_of_cache(FeatureCache(options.out), index))
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if refused is not None:
        print(f"A run from this cache would not start: {refused}", file=sys.stderr)
        return 1
    print(f"Train from it with --set rdtf.memory.encoders=cached --set rdtf.memory.cache_dir={options.out}")
    return 0


def run(experiment: Experiment, out: Path, variants: int) -> tuple[ClipIndex, Filled]:
    """Index the clips, load the encoders, fill the cache."""
    rdtf = experiment.rdtf
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # What two processes make of one clip must be the same, as in a run: see `start_distributed`.
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    autoencoder, text = load_encoders(rdtf, encoder_dtype(experiment, device), device)
    header = make_header(experiment, autoencoder, text, variants)
    limits = decode_limits(rdtf)
    with alone(out):  # the first of several makes what the others then find
        cache = open_or_create(out, header)
        index = make_index(rdtf, out, device)

    def decode(clip: int) -> np.ndarray:
        place, window = index.place(clip), index.window(clip)
        return decode_clip(place, rdtf.data.image_size, rdtf.data.background, limits, content=index.content(clip), window=window)

    with_pixels = rdtf.model.guidance == "pixel"
    make = FeatureMaker(autoencoder, text, device, experiment.precision, with_pixels, rdtf.data.word_hide_probability, variants)
    return index, fill_cache(cache, index, decode, make)


def open_or_create(out: Path, header: CacheHeader) -> FeatureCache:
    """The cache in a folder, which must be of this header, or a new one.

    Raises:
        CacheError: It is of another.
    """
    if not (out / HEADER).exists():
        return FeatureCache.create(out, header)
    cache = FeatureCache(out)
    cache.require(header.identity)
    if cache.header.variants != header.variants:
        raise CacheError(
            f"--variants is {header.variants}, but '{out}' holds {cache.header.variants} of each caption. Give --variants "
            f"{cache.header.variants}, or make a cache in another folder."
        )
    return cache


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """One process at a time; who has to wait is told so.

    Raises:
        UserError: The folder cannot be made, written or locked.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / ".lock", "w")  # noqa: SIM115  closed below, which lets it go
    except OSError as error:
        raise UserError(f"'{out}' cannot be written ({error.strerror}). Give --out a folder you may write to.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Another process looks through the clips for '{out}': waiting until it has, then both make features.", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(f"'{out}' cannot be locked ({error.strerror}). Give --out a folder on a disk that knows flock(2).") from error
        yield


if __name__ == "__main__":
    sys.exit(main())
