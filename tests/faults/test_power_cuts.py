"""The power is cut after every file operation of a save: what is there afterwards is the old checkpoint or the new one, whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from rdtf_ds.checkpoints.store import CheckpointStore
from rdtf_ds.training.checkpoint import Identity, SaveFailed, resume_checkpoint, save_checkpoint
from rdtf_ds.training.ema import ShardedEMA
from tests.faults.power import Disk, PowerCut

IDENTITY = Identity({"seed": 1}, {})
KEEP = 2


class Saves:
    """An engine three steps on, two checkpoints of its past on disk, and another engine to resume into."""

    def __init__(self, make_engine, train, past: Path) -> None:
        self.engine, self.other = make_engine("fp16"), make_engine("fp16")
        self.ema, self.other_ema = self._mean(self.engine), self._mean(self.other)
        self.past, self.states = past, {}
        for step in (1, 2, 3):
            train(self.engine, range(step, step + 1))
            self.ema.update()
            self.states[step] = self._tensors(self.engine, self.ema)
            if step < 3:
                self.save(past)

    def save(self, folder: Path) -> None:
        save_checkpoint(self.engine, self.ema, CheckpointStore(folder, KEEP), {"any": "state"}, IDENTITY, {})

    def resumed_step(self, folder: Path) -> int:
        """The step that a new process would go on from; its state is that of the run at that step, bit for bit."""
        resumed = resume_checkpoint(self.other, self.other_ema, CheckpointStore(folder, KEEP), IDENTITY)
        assert resumed is not None
        expected, found = self.states[resumed.step], self._tensors(self.other, self.other_ema)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        return resumed.step

    @staticmethod
    def _mean(engine) -> ShardedEMA:
        return ShardedEMA({group.name: master for group, master in zip(engine.groups, engine.masters, strict=True)}, decay=0.9)

    @staticmethod
    def _tensors(engine, ema):
        moments = [v for m in engine.masters for v in engine._ds.optimizer.optimizer.state[m].values() if torch.is_tensor(v)]
        return [t.detach().clone() for t in (*engine.masters, *ema.shards.values(), *engine.model.parameters(), *moments)]


@pytest.fixture
def saves(make_engine, train, tmp_path) -> Saves:
    return Saves(make_engine, train, tmp_path / "past")


def operations(saves: Saves, tmp_path: Path, monkeypatch) -> list[str]:
    """Of a save that nothing disturbs."""
    folder, limbo = tmp_path / "whole", tmp_path / "limbo"
    shutil.copytree(saves.past, folder)
    limbo.mkdir()
    with monkeypatch.context() as patch:
        disk = Disk(folder, limbo)
        disk.install(patch)
        saves.save(folder)
    assert saves.resumed_step(folder) == 3
    return disk.done


def cut_points(done: list[str], every: bool) -> list[int]:
    """Each operation; without ``every`` the first and the last write of a file stand for all of them."""
    kept = [
        number
        for number, name in enumerate(done)
        if every or not name.startswith("write") or done[number - 1] != name or (number + 1 < len(done) and done[number + 1] != name)
    ]
    return [*kept, len(done)]


def cut_and_resume(saves: Saves, tmp_path: Path, monkeypatch, points: list[int], done: list[str]) -> dict[str, int]:
    commit = next(number for number, name in enumerate(done) if name.startswith("rename") and ".partial" in name)
    counts = {"old": 0, "new": 0}
    for number in points:
        for lose in (False, True):
            folder, limbo = tmp_path / f"cut{number}{lose}", tmp_path / f"limbo{number}{lose}"
            shutil.copytree(saves.past, folder)
            limbo.mkdir()
            with monkeypatch.context() as patch:
                disk = Disk(folder, limbo, number, lose)
                disk.install(patch)
                if number < len(done):
                    # Out of the middle of torch.save it comes as an error of torch's, and the save goes on to fail like any other.
                    with pytest.raises((PowerCut, SaveFailed)):
                        saves.save(folder)
                else:
                    saves.save(folder)
            found = disk.found
            step = saves.resumed_step(found)
            assert step == (3 if number > commit + lose else 2), f"cut before operation {number}, {done[number : number + 1]}, lose={lose}"
            counts["new" if step == 3 else "old"] += 1
            saves.save(found)  # and what this one left is not in the way of the next
            assert saves.resumed_step(found) == 3
            assert not list(found.glob("*.partial")), "nothing half done is left"
            shutil.rmtree(folder)
            shutil.rmtree(limbo)
    return counts


def test_a_cut_between_any_two_kinds_of_operations(saves, tmp_path, monkeypatch):
    done = operations(saves, tmp_path, monkeypatch)
    assert {name.split()[0] for name in done} == {"create", "write", "fsync", "mkdir", "rename", "unlink", "rmdir"}
    counts = cut_and_resume(saves, tmp_path, monkeypatch, cut_points(done, every=False), done)
    assert counts["old"] >= 20 and counts["new"] >= 10


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_cut_after_every_operation(saves, tmp_path, monkeypatch, fault_table):
    done = operations(saves, tmp_path, monkeypatch)
    points = cut_points(done, every=True)
    counts = cut_and_resume(saves, tmp_path, monkeypatch, points, done)
    fault_table(
        "power cut after every file operation of a save, unflushed data kept and lost",
        "every prefix recovers to the old or the new checkpoint, bit-equal",
        f"{len(points)} prefixes x 2: {counts['old']} to the old one, {counts['new']} to the new one, 0 to neither",
    )
