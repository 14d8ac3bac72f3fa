"""Measures beside a peer, or what something costs: ``python tools/benchmark.py NAME [--json] ...``; ``--help`` lists the names.

Every figure is a median over repetitions in which ours and the peer took turns in one process on the same input. ``--json`` prints one
JSON object on standard output.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from rdtf_ds.benchmarks.report import lines_of  # noqa: E402
from rdtf_ds.errors import UserError  # noqa: E402

BENCHMARKS = ("forward", "train_step", "attention", "trim", "memory", "index", "loader", "fvd", "export", "guidance", "samplers")


def main() -> int:
    """Exit code 0 when every row with a bar holds, 1 when one does not, 2 with one paragraph on standard error for wrong input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    modules = {name: import_module(f"rdtf_ds.benchmarks.{name}") for name in BENCHMARKS}
    for name, module in modules.items():
        command = commands.add_parser(name, help=_first_line(module), description=module.__doc__)
        command.add_argument("--json", action="store_true", help="print one JSON object")
        module.add_arguments(command)
    arguments = parser.parse_args()
    try:
        with redirect_stdout(sys.stderr):  # libraries print; standard output is the report's
            report = modules[arguments.benchmark].run(arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(report) if arguments.json else "\n".join(lines_of(report)))
    return 1 if any(row["holds"] is False for row in report["rows"]) else 0


def _first_line(module: ModuleType) -> str:
    return (module.__doc__ or "").partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
