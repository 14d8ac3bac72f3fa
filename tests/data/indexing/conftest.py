"""What tests of building share: a folder of all kinds of clips, and the decoder that stands in for a pool of children."""

from __future__ import annotations

from pathlib import Path

import pytest

from rdtf_ds.data.indexing import examining
from tests.data.indexing.building import Decoder, clip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three clips to train on, one of two frames, one broken, and what is no clip."""
    root = tmp_path / "data"
    clip(root / "b.gif", 3)
    clip(root / "a" / "z.webp", 9)
    clip(root / "a" / "UPPER.PNG", 4)
    clip(root / "two.gif", 2)
    clip(root / ".hidden.gif", 4)
    (root / "broken.gif").write_bytes((root / "b.gif").read_bytes()[:60])
    (root / "notes.md").write_text("no clip")
    (root / "b.txt").write_text("a cat")
    return root


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> type[Decoder]:
    kind = type("Decoder", (Decoder,), {"examined": [], "faults": {}, "sizes": [], "closed": []})
    monkeypatch.setattr(examining, "DecoderPool", kind)
    return kind
