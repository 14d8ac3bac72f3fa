"""Launches shared by the tests that look at them from different sides."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rdtf_ds.data.synthetic import write_stickers
from tests.integration.launches import KILL_AFTER, LAUNCHES, ROOT, Killed, Launch, kill_after, run_to_the_end


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real stickers where they are at hand, else generated ones."""
    real = Path(os.environ.get("RDTF_REAL_DATA", ROOT / ".." / "shared" / "data")).resolve() / "stickers"
    if (real / "metadata.jsonl").is_file():
        return real
    made = tmp_path_factory.mktemp("stickers")
    write_stickers(made, 40, seed=3, size=32)
    return made


@pytest.fixture(scope="session", params=LAUNCHES)
def launch(request: pytest.FixtureRequest) -> Launch:
    return LAUNCHES[request.param]


@pytest.fixture(scope="session")
def straight_run(launch: Launch, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run left alone."""
    folder = tmp_path_factory.mktemp("straight")
    run_to_the_end(launch.command(clips, folder))
    return folder


@pytest.fixture(scope="session")
def killed_run(launch: Launch, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """The same run, killed between two checkpoints and started again by the same command."""
    folder = tmp_path_factory.mktemp("killed")
    lines = kill_after(launch.command(clips, folder), folder, KILL_AFTER)
    return Killed(folder, lines, run_to_the_end(launch.command(clips, folder)))


@pytest.fixture(scope="session")
def scalars_of() -> Callable[[Path], dict[str, list[int]]]:
    """Steps of every TensorBoard scalar of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read(folder: Path) -> dict[str, list[int]]:
        events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
        events.Reload()
        return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

    return read
