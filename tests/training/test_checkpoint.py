from __future__ import annotations

import json
import shutil

import pytest
import torch

from rdtf_ds.errors import UserError
from rdtf_ds.training import checkpoint
from rdtf_ds.training.checkpoint import Identity, find_latest, read_manifest, resume, save, tag_of
from rdtf_ds.training.ema import ShardedEMA

IDENTITY = Identity({"world_size": 1, "rdtf": {"seed": 3, "model": {"widths": [8, 16]}}}, {"data fingerprint": "abc"})


@pytest.fixture
def session(make_engine, train):
    """An engine and its EMA, stepped together."""

    class Session:
        def __init__(self) -> None:
            self.engine = make_engine()
            names = [group.name for group in self.engine.groups]
            self.ema = ShardedEMA(dict(zip(names, self.engine.masters, strict=True)), decay=0.9)

        def step(self, times: int = 1) -> None:
            for _ in range(times):
                train(self.engine, range(self.engine.attempted_steps, self.engine.attempted_steps + 1))
                self.ema.update()

        def save(self, folder, keep: int = 3, **state):
            return save(self.engine, self.ema, folder, state, IDENTITY, {"model": {"widths": [8, 16]}}, keep)

        def tensors(self):
            return [t.detach().clone() for t in (*self.engine.masters, *self.ema.shards.values(), *self.engine.model.parameters())]

    return Session


def test_a_new_process_goes_on_where_the_old_one_stopped(session, tmp_path):
    first = session()
    first.step(2)
    assert first.save(tmp_path, word="value").name == "step00000002"
    second = session()
    resumed = resume(second.engine, second.ema, tmp_path, IDENTITY)
    assert (resumed.step, resumed.state, resumed.notes) == (2, {"word": "value"}, ())
    assert second.ema.updates == 2
    first.step(2)
    second.step(2)
    assert all(torch.equal(a, b) for a, b in zip(first.tensors(), second.tensors(), strict=True))


def test_nothing_to_resume(session, tmp_path):
    assert find_latest(tmp_path / "absent") == (None, [])
    new = session()
    assert resume(new.engine, new.ema, tmp_path, IDENTITY) is None


def test_the_manifest_describes_the_flat_groups(session, tmp_path):
    run = session()
    run.step()
    manifest = read_manifest(run.save(tmp_path))
    assert manifest["must_match"] == IDENTITY.must_match and manifest["model"] == {"widths": [8, 16]}
    sharded = {path.name for path in (tmp_path / "step00000001").iterdir()} - {"MANIFEST.json"}
    assert set(manifest["files"]) == sharded
    parameters = dict(run.engine.model.named_parameters())
    for group, master in zip(manifest["groups"], run.engine.masters, strict=True):
        assert group["numel"] == master.numel() == sum(p["numel"] for p in group["parameters"]) + group["padding"]
        offset = 0
        for entry in group["parameters"]:
            flat = master[offset : offset + entry["numel"]]
            assert torch.equal(flat.view(entry["shape"]), parameters[entry["name"]])
            offset += entry["numel"]
    assert {entry["name"] for group in manifest["groups"] for entry in group["parameters"]} == set(parameters)


@pytest.mark.parametrize(
    ("must_match", "told"),
    [
        ({"world_size": 2, "rdtf": {"seed": 3, "model": {"widths": [8, 16]}}}, "world_size was 1 and is now 2"),
        ({"world_size": 1, "rdtf": {"seed": 4, "model": {"widths": [8, 16]}}}, "rdtf.seed was 3 and is now 4"),
        ({"world_size": 1, "rdtf": {"seed": 3, "model": {"widths": (8, 32)}}}, r"rdtf.model.widths was \[8, 16\] and is now \[8, 32\]"),
    ],
)
def test_another_run_is_refused_by_what_differs(session, tmp_path, must_match, told):
    run = session()
    run.step()
    run.save(tmp_path)
    other = session()
    before = other.tensors()
    with pytest.raises(UserError, match=told) as caught:
        resume(other.engine, other.ema, tmp_path, Identity(must_match, {}))
    assert caught.value.everywhere
    assert all(torch.equal(a, b) for a, b in zip(before, other.tensors(), strict=True))


def test_a_save_clears_the_damaged_ones_ahead_of_it_and_keeps_the_good(session, tmp_path):
    """A resume passed over steps 8 and 9; their folders must not make a later save delete what is sound."""
    run = session()
    run.step()
    run.save(tmp_path)
    for name in ("step00000008", "step00000009"):
        (tmp_path / name).mkdir()
    run.step()
    run.save(tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step00000001", "step00000002"]


def test_other_data_is_only_noted(session, tmp_path):
    run = session()
    run.step()
    run.save(tmp_path)
    resumed = resume(run.engine, run.ema, tmp_path, Identity(IDENTITY.must_match, {"data fingerprint": "other"}))
    assert resumed.step == 1 and '"abc" and is now "other"' in resumed.notes[0]


def damage_manifest(path):
    (path / "MANIFEST.json").unlink()


def damage_bit(path):
    shard = path / "ema_rank0000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)


def damage_length(path):
    shard = path / "mp_rank_00_model_states.pt"
    shard.write_bytes(shard.read_bytes()[:-1])


def damage_presence(path):
    (path / "curriculum.json").unlink()


@pytest.mark.parametrize("damage", [damage_manifest, damage_bit, damage_length, damage_presence])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(session, tmp_path, damage):
    run = session()
    for step in (1, 2):
        run.step()
        run.save(tmp_path, step=step)
    damage(tmp_path / tag_of(2))
    other = session()
    resumed = resume(other.engine, other.ema, tmp_path, IDENTITY)
    assert resumed.state == {"step": 1} and "step00000002" in resumed.notes[0]
    damage(tmp_path / tag_of(1))
    with pytest.raises(UserError, match="none is complete") as caught:
        resume(other.engine, other.ema, tmp_path, IDENTITY)
    assert caught.value.everywhere


def test_a_resumed_run_replaces_the_damaged_checkpoint(session, tmp_path):
    run = session()
    run.step()
    damage_bit(run.save(tmp_path))
    run.save(tmp_path, again=True)
    path, reasons = find_latest(tmp_path)
    assert path.name == tag_of(1) and reasons == []
    assert json.loads((path / "curriculum.json").read_text()) == {"again": True}


def test_an_interrupted_save_is_no_checkpoint(session, tmp_path):
    run = session()
    run.step()
    complete = run.save(tmp_path)
    shutil.copytree(complete, tmp_path / "step00000009.partial")
    assert find_latest(tmp_path)[0] == complete
    run.step()
    run.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [tag_of(1), tag_of(2)]


def test_only_the_newest_are_kept(session, tmp_path):
    run = session()
    for _ in range(4):
        run.step()
        run.save(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [tag_of(3), tag_of(4)]


def test_a_failed_write_commits_nothing(session, tmp_path, monkeypatch):
    run = session()
    run.step()
    complete = run.save(tmp_path)
    run.step()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="rank 0: .*No space left"):
        run.save(tmp_path)
    assert find_latest(tmp_path) == (complete, [])
