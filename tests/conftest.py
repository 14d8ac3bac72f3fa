"""What every test shares: a small, quiet, offline CPU machine and the way to the real clips."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# Before torch, DeepSpeed and the hub client are imported, and inherited by every process a test starts.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from tests.browsers import browser  # noqa: E402, F401  a fixture
from tests.small_engines import make_engine, process_group, train  # noqa: E402, F401  fixtures

ROOT = Path(__file__).resolve().parents[1]

# The same examples on every machine, and no failure because a machine was busy.
settings.register_profile("steady", derandomize=True, deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")


@pytest.fixture(scope="session")
def project_root() -> Path:
    """The folder with setup.cfg."""
    return ROOT


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real clips (``stickers/`` and ``odd/``), from RDTF_REAL_DATA; the test skips when there is none."""
    folder = Path(os.environ.get("RDTF_REAL_DATA", ROOT / ".." / "shared" / "data")).resolve()
    if not (folder / "stickers" / "metadata.jsonl").is_file():
        pytest.skip(f"no real clips in {folder}; set RDTF_REAL_DATA to a folder with stickers/ and odd/")
    return folder


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """How two processes share the suite: what launches whole runs goes to one of them, one after the other; other files go whole."""
    from xdist.scheduler import LoadScopeScheduling

    class Shared(LoadScopeScheduling):
        """By file but for launches. (Marks of `--dist loadgroup` are lost between pytest-xdist 3.8 and pytest 9.2.)"""

        def _split_scope(self, nodeid: str) -> str:
            """The name of what goes to one process, of the test ``tests/PLACE/FILE.py::NAME``."""
            file = nodeid.partition("::")[0]
            return "launches" if file.startswith(("tests/faults/", "tests/integration/")) else file

    return Shared(config, log)
