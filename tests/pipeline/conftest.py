"""What tests of the pipeline share."""

from __future__ import annotations

from typing import Any

import pytest

from tests.small_models import text_parts


@pytest.fixture(scope="module")
def encoders() -> dict[str, Any]:
    """A set a file, for a pipeline that is turned to bfloat16 turns its encoders with it."""
    return text_parts()
