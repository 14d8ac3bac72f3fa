"""Shows what is in a data folder, judged as a run of the same config and keys judges it.

    python tools/inspect_data.py DIR --out report.html [--deepspeed_config C] [--set rdtf.data.KEY=VALUE ...] [--clips 12] [--seed 0]
        [--index INDEX] [--json]

DIR is a folder of clips or of tar shards, or a manifest (.csv, .jsonl). The report is one HTML page that needs nothing else: counts,
formats, frame counts, sizes, times, captions, duplicates, broken files with reasons, and for a sample of clips the animation, its
clusters, the frames training takes and the masks laid over them. INDEX is what tools/index_data.py --out takes, too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from rdtf_ds.errors import UserError  # noqa: E402
from rdtf_ds.experiment import load_experiment  # noqa: E402
from rdtf_ds.inspection.report import inspect_folder  # noqa: E402
from rdtf_ds.wording import counted  # noqa: E402

CONFIG = Path(__file__).resolve().parents[1] / "ds_configs" / "v100.json"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", metavar="DIR", help="a folder of clips or of tar shards, or a manifest (.csv, .jsonl)")
    parser.add_argument("--out", type=Path, metavar="HTML", help="the page to write")
    parser.add_argument("--deepspeed_config", type=Path, default=CONFIG, metavar="JSON", help="the run's experiment (ds_configs/v100.json)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="as for the run; repeat for more")
    parser.add_argument("--clips", type=int, default=12, metavar="N", help="clips shown (12)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the clips picked and the frames drawn (0)")
    parser.add_argument("--index", type=Path, metavar="INDEX_DIR", help="keep the index here, for the next look or run")
    parser.add_argument("--json", action="store_true", help="print what was counted as one JSON object")
    options = parser.parse_args(arguments)
    if options.out is None and not options.json:
        parser.error("give --out a file for the page, or --json, or both")
    if options.clips < 0:
        parser.error(f"--clips is {options.clips}: it counts clips")
    if not options.data_dir:
        parser.error("DIR is empty: name a folder or a manifest")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 with a report, also of a folder with nothing to train on; 2 with one paragraph on standard error for bad input."""
    options = parse_arguments(arguments)
    try:
        if options.out is not None:
            require_writable(options.out)
        data = load_experiment(options.deepspeed_config, options.overrides, data_dir=options.data_dir).rdtf.data
        report = inspect_folder(options.data_dir, data, options.clips if options.out else 0, options.seed, options.index)
        if options.out is not None:
            size = write_page(options.out, report.page())
            told = sys.stderr if options.json else sys.stdout
            print(f"{report.survey.summary}\n{options.out}: {size / 1e6:.1f} MB, {counted(len(report.clips), 'clip')} shown", file=told)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        kept = f"what was examined is kept in '{options.index}'" if options.index else "nothing is kept without --index"
        print(f"Interrupted; {kept}.", file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps(report.survey.to_json()))
    return 0


def require_writable(path: Path) -> None:
    """See that a page can be written, before minutes go into it.

    Raises:
        UserError: It cannot.
    """
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        fault = "is a folder" if path.is_dir() else "may not be written" if path.parent.is_dir() else "lies in no folder that exists"
        raise UserError(f"--out {path} {fault}. Name a file in a folder that exists and that you may write to.")


def write_page(path: Path, page: str) -> int:
    """Write the page; its bytes.

    Raises:
        UserError: It cannot be written.
    """
    data = page.encode("utf-8", "backslashreplace")
    try:
        path.write_bytes(data)
    except OSError as error:
        raise UserError(f"--out {path} cannot be written ({error.strerror}). Name a file in a folder that you may write to.") from error
    return len(data)


if __name__ == "__main__":
    sys.exit(main())
