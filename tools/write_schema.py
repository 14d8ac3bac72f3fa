"""Write ``ds_configs/rdtf.schema.json``, from which editors complete and check experiment files; ``--check`` only compares."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rdtf_ds.experiment import json_schema  # noqa: E402

SCHEMA = Path(__file__).resolve().parents[1] / "ds_configs" / "rdtf.schema.json"


def main() -> int:
    """Exit code 0, or 1 when ``--check`` finds the file out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the file is out of date")
    arguments = parser.parse_args()
    text = json.dumps(json_schema(), indent=2) + "\n"
    if not arguments.check:
        SCHEMA.write_text(text, encoding="utf-8")
        return 0
    if SCHEMA.is_file() and SCHEMA.read_text(encoding="utf-8") == text:
        return 0
    print(f"{SCHEMA.name} is out of date; run: make schema", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
