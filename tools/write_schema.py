"""Write what follows from the config models: ``ds_configs/rdtf.schema.json`` for editors and ``docs/configuration.md`` for readers.

``--check`` only compares.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rdtf_ds.config import RDTFSection  # noqa: E402
from rdtf_ds.experiment import json_schema  # noqa: E402

SCHEMA = ROOT / "ds_configs" / "rdtf.schema.json"
REFERENCE = ROOT / "docs" / "configuration.md"
INTRODUCTION = """# Configuration

Every key of the `"rdtf"` object of an experiment file, with its default and what it may be. Written by `make schema` from
`rdtf_ds/config.py`. DeepSpeed's own keys that may stand beside it are in `rdtf_ds/deepspeed_keys.py`, with those that are refused and why.
"""


def main() -> int:
    """Exit code 0, or 1 when ``--check`` finds a file out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a file is out of date")
    arguments = parser.parse_args()
    stale = []
    for path, text in ((SCHEMA, json.dumps(json_schema(), indent=2) + "\n"), (REFERENCE, reference())):
        if not arguments.check:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(path.name)
    if stale:
        print(f"{' and '.join(stale)} out of date; run: make schema", file=sys.stderr)
    return 1 if stale else 0


def reference() -> str:
    """The reference as Markdown: one table for each section."""
    schema = RDTFSection.model_json_schema()
    parts = [INTRODUCTION, *_table("rdtf", schema, schema["$defs"])]
    return "\n".join(parts) + "\n"


def _table(prefix: str, section: dict[str, Any], definitions: dict[str, Any]) -> Iterator[str]:
    yield f"\n## `{prefix}`\n{section.get('description', '')}\n\n| key | default | values | |\n| --- | --- | --- | --- |"
    below = []
    for name, field in section["properties"].items():
        if "$ref" in field:
            below.append((f"{prefix}.{name}", definitions[field["$ref"].rsplit("/", 1)[-1]]))
            continue
        default = json.dumps(field.get("default"), ensure_ascii=False)
        yield f"| `{name}` | `{default}` | {_values(field)} | {field.get('description', '')} |"
    for path, definition in below:
        yield from _table(path, definition, definitions)


def _values(field: dict[str, Any]) -> str:
    """What a field may be, in words."""
    if "anyOf" in field:
        return " or ".join(_values(part) for part in field["anyOf"])
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    kind = field.get("type", "any")
    if kind == "array":
        return f"list of {_values(field['items'])}" if "items" in field else f"list of {len(field.get('prefixItems', []))}"
    signs = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
    bounds = [f"{sign} {field[key]}" for key, sign in signs if key in field]
    return f"{kind} {', '.join(bounds)}".strip()


if __name__ == "__main__":
    sys.exit(main())
