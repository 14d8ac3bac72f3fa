"""Runs to export, and their manifests sealed anew after a test has changed a file."""

from __future__ import annotations

from pathlib import Path

from rdtf_ds.checkpoints.durable import digest_file
from rdtf_ds.checkpoints.manifest import MANIFEST, read_manifest, write_manifest

WIDTH = 64  # of the encoders made on the spot


def reseal(step: Path, name: str | None = None, **changes: object) -> None:
    """Writes the manifest anew: with the digest of a file a test has changed, or with other entries."""
    manifest = {**read_manifest(step), **changes}
    if name is not None:
        manifest["files"][name] = digest_file(step / name).to_json()
    (step / MANIFEST).unlink()
    write_manifest(step, manifest)
