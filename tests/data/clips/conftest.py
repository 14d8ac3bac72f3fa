"""What tests of clips share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rdtf_ds.data.clips.decoder_pool import DecoderPool


@pytest.fixture(scope="module")
def pool() -> Iterator[DecoderPool]:
    with DecoderPool() as children:
        yield children
