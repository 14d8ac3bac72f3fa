"""What the fault tests share: a fork server, clips, runs left alone to compare with, and the table of counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rdtf_ds.data.synthetic import write_stickers
from tests.faults.fork_server import ROOT, ForkServer
from tests.faults.runs import TRIALS, learned
from tests.faults.table import FaultTable, render

_TABLE = FaultTable()
Undisturbed = Callable[[str, int], Path]


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    with ForkServer() as server:
        yield server


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated stickers of the formats that decode in a millisecond."""
    folder = tmp_path_factory.mktemp("clips")
    write_stickers(folder, 40, seed=3, size=32, suffixes=(".gif", ".webp"))
    return folder


@pytest.fixture(scope="session")
def undisturbed(fork_server: ForkServer, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """A run of a trial left alone, by its name and number of ranks, with a checkpoint of every step."""
    made: dict[tuple[str, int], Path] = {}

    def run(trial: str, ranks: int) -> Path:
        if (trial, ranks) not in made:
            folder = tmp_path_factory.mktemp(f"undisturbed_{trial}_{ranks}_")
            settings = ("rdtf.checkpoint.interval=1", "rdtf.checkpoint.keep=1000")
            launched = fork_server.launch(TRIALS[trial].arguments(clips, folder, *settings), ranks, folder / "logs")
            assert launched.wait() == 0, launched.said[-3000:]
            lines = learned(folder)
            assert len({line["target_level"] for line in lines}) > 3 and len({line["loss"] for line in lines}) == len(lines)
            assert (trial == "fp16") == any(line["skipped"] for line in lines[3:]), "the loss scale must move, in fp16 alone"
            made[trial, ranks] = folder
        return made[trial, ranks]

    return run


@pytest.fixture(scope="session")
def fault_table() -> FaultTable:
    """Call it with a row of the table; it is printed at the end, and written to docs/faults.md by `make soak`."""
    return _TABLE


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.option.markexpr == "soak" and _TABLE.rows:
        terminalreporter.section("faults")
        terminalreporter.write(render(list(_TABLE.rows.values())))
        _TABLE.write(ROOT / "docs" / "faults.md")
