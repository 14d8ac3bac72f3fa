"""What tests of exporting share: a run of two ranks, and its export."""

from __future__ import annotations

import pytest

from rdtf_ds.export.exporting import export
from tests.export.runs import WIDTH
from tests.small_models import small_dfgn, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, small_dfgn(text_width=WIDTH), world_size=2)
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "model"
    return export(run, out, "master")
