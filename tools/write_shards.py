"""Writes the clips of a folder, a manifest or other shards into tar shards, from which training reads as from a folder.

    python tools/write_shards.py DATA OUT [--shard_mb 512]

A few large files are kinder to copies, quotas and network disks than a million small ones. The layout is WebDataset's: each clip beside
a .json of its name, caption and group. Clips are copied as they are, in order of their names; the same DATA makes the same bytes. OUT
appears when it is complete; stopped before that, start it anew.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pyarrow.compute as pc  # noqa: E402
from tqdm import tqdm  # noqa: E402

from rdtf_ds.data.clips.clip import ClipError  # noqa: E402
from rdtf_ds.data.clips.headers import sniff_format  # noqa: E402
from rdtf_ds.data.clips.places import read_place  # noqa: E402
from rdtf_ds.data.sources.captions import CLIP_SUFFIXES  # noqa: E402
from rdtf_ds.data.sources.listing import Listing  # noqa: E402
from rdtf_ds.data.sources.shards import MAX_CLIP_BYTES, ShardWriter  # noqa: E402
from rdtf_ds.data.sources.sources import list_clips  # noqa: E402
from rdtf_ds.errors import UserError  # noqa: E402
from rdtf_ds.wording import counted  # noqa: E402

_NAMED_AT_MOST = 10


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when the shards are written, 2 with one paragraph on standard error when they cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA", help="folder of clips, folder of .tar shards, or manifest (.csv, .jsonl)")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to be made")
    parser.add_argument("--shard_mb", type=int, default=512, metavar="N", help="most MB (2^20 bytes) of one shard (512)")
    options = parser.parse_args(arguments)
    if options.shard_mb < 1:
        parser.error(f"--shard_mb is {options.shard_mb}: a shard holds at least 1 MB")
    if not options.data:
        parser.error("DATA is empty: name a folder or a manifest")
    try:
        shards, clips, left_out = run(Path(options.data), options.out, options.shard_mb * 2**20)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"'{options.out}' cannot be written ({error.strerror or error}). Name a folder you may write to, with room.", file=sys.stderr)
        return UserError.exit_code
    except KeyboardInterrupt:
        print(f"Interrupted; nothing of '{options.out}' was kept.", file=sys.stderr)
        return 130
    size = sum(shard.stat().st_size for shard in shards)
    print(f"{options.out}: {counted(clips, 'clip')} in {counted(len(shards), 'shard')}, {size / 2**20:.1f} MB; {len(left_out)} left out")
    for reason in left_out[:_NAMED_AT_MOST]:
        print(f"  {reason}")
    if len(left_out) > _NAMED_AT_MOST:
        print(f"  and {len(left_out) - _NAMED_AT_MOST} more")
    print(f"Train from them with --data_dir {options.out}")
    return 0


def run(data: Path, out: Path, shard_bytes: int) -> tuple[list[Path], int, list[str]]:
    """Write the shards.

    Returns:
        The shards, the number of clips in them, and what was left out: path and reason.
    Raises:
        UserError: There is nothing to write, ``out`` is there or lies inside of ``data``, or a clip is larger than a shard.
    """
    if data.is_dir() and Path(os.path.realpath(out)).is_relative_to(data.resolve()):  # Path.resolve falls over links in a circle
        raise UserError(f"'{out}' lies inside of '{data}', so that each clip would be found there twice. Name a folder outside of it.")
    listing = list_clips(data)
    largest = pc.max(listing.table["size"].filter(pc.is_null(listing.table["fault"]))).as_py()
    if largest is None:
        raise UserError(f"'{data}' has no clip that may be opened; the first: {next(_faults(listing))}. Nothing was written.")
    if largest > MAX_CLIP_BYTES:
        remedy = "Take it out of a set for shards, or train from the files as they are."
        raise UserError(f"the largest clip has {largest} bytes, and a shard holds clips of at most {MAX_CLIP_BYTES}. {remedy}")
    if largest > shard_bytes:
        remedy = f"Give --shard_mb {-(-largest // 2**20)} or more."
        raise UserError(f"the largest clip has {largest} bytes, which is more than --shard_mb {shard_bytes // 2**20}. {remedy}")
    left_out = list(_faults(listing))
    clips = 0
    with ShardWriter(out, shard_bytes) as writer, tqdm(total=len(listing.table), unit="clip", disable=None) as progress:
        row = 0
        for batch in listing.table.select(["path", "caption", "group", "fault"]).to_batches(max_chunksize=4096):
            for path, caption, group, fault in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                if fault is None:
                    try:
                        data = read_place(listing.place(row), shard_bytes)
                        writer.add(path, data, caption, group, _suffix(path, data))
                        clips += 1
                    except ClipError as error:
                        left_out.append(str(error))
                row += 1
                progress.update()
    return writer.close(), clips, left_out


def _suffix(path: str, data: bytes) -> str:
    """Of the name, else of the content: the json in a shard may call a clip whatever it likes. ClipError: neither tells that it is one."""
    suffix = PurePosixPath(path).suffix.lower()
    if suffix in CLIP_SUFFIXES:
        return suffix
    if (format := sniff_format(data)) is None:
        raise ClipError(path, f"is no clip, neither by its name ({', '.join(CLIP_SUFFIXES)}) nor by its first bytes")
    return f".{format}"


def _faults(listing: Listing) -> Iterator[str]:
    broken = listing.table.filter(pc.is_valid(listing.table["fault"]))
    for path, fault in zip(broken["path"].to_pylist(), broken["fault"].to_pylist(), strict=True):
        yield f"{path}: {fault}"


if __name__ == "__main__":
    sys.exit(main())
