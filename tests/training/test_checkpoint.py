from __future__ import annotations

import json
import shutil

import pytest
import torch

from rdtf_ds.checkpoints.durable import UNFINISHED
from rdtf_ds.checkpoints.manifest import MANIFEST, read_manifest
from rdtf_ds.checkpoints.store import CheckpointStore, Tag
from rdtf_ds.errors import UserError
from rdtf_ds.exit_codes import DISK
from rdtf_ds.training import checkpoint
from rdtf_ds.training.checkpoint import Identity, SaveFailed, WeightsNotFinite, resume_checkpoint, save_checkpoint
from rdtf_ds.training.ema import ShardedEMA

IDENTITY = Identity({"train_batch_size": 4, "rdtf": {"seed": 3, "model": {"widths": [8, 16]}}}, {"data fingerprint": "abc"})


@pytest.fixture
def session(make_engine, train, tmp_path):
    """An engine, its EMA and its store, stepped together."""

    class Session:
        def __init__(self, keep: int = 3, key: bytes | None = None) -> None:
            self.engine = make_engine()
            names = [group.name for group in self.engine.groups]
            self.ema = ShardedEMA(dict(zip(names, self.engine.masters, strict=True)), decay=0.9)
            self.store = CheckpointStore(tmp_path / "checkpoints", keep, key=key)

        def step(self, times: int = 1):
            for _ in range(times):
                train(self.engine, range(self.engine.attempted_steps, self.engine.attempted_steps + 1))
                self.ema.update()
            return self

        def save(self, **state):
            return save_checkpoint(self.engine, self.ema, self.store, state, IDENTITY, {"model": {"widths": [8, 16]}}).path

        def resume(self, identity: Identity = IDENTITY):
            return resume_checkpoint(self.engine, self.ema, self.store, identity)

        def tensors(self):
            moments = [v for m in self.engine.masters for v in self.engine._ds.optimizer.optimizer.state[m].values() if torch.is_tensor(v)]
            live = (*self.engine.masters, *self.ema.shards.values(), *self.engine.model.parameters(), *moments)
            return [t.detach().clone() for t in live]

        def names(self):
            return sorted(path.name for path in self.store.folder.iterdir() if path.is_dir())

    return Session


def equal(first, second):
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_new_process_goes_on_where_the_old_one_stopped(session):
    first = session().step(2)
    assert first.save(word="value").name == "step00000002-0001"
    second = session()
    resumed = second.resume()
    assert (resumed.step, resumed.state, resumed.notes) == (2, {"word": "value"}, ())
    assert second.ema.updates == 2
    assert equal(first.tensors(), second.tensors())
    assert equal(first.step(2).tensors(), second.step(2).tensors())


def test_the_state_before_the_first_step_can_be_gone_back_to(session):
    run = session()
    before = run.tensors()
    run.save()
    straight = run.step(3).tensors()
    assert run.resume().step == run.engine.attempted_steps == run.ema.updates == 0
    assert equal(before, run.tensors()), "a live engine keeps nothing of what came after"
    assert equal(straight, run.step(3).tensors())


def test_nothing_to_resume(session):
    assert session().resume() is None


def test_the_manifest_describes_the_flat_groups(session):
    run = session().step()
    folder = run.save()
    manifest = read_manifest(folder)
    assert manifest["must_match"] == IDENTITY.must_match and manifest["model"] == {"widths": [8, 16]}
    assert (manifest["tag"], manifest["step"], manifest["world_size"]) == (folder.name, 1, 1)
    assert set(manifest["files"]) == {path.name for path in folder.iterdir()} - {MANIFEST}
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
    ("batch", "seed", "widths", "told"),
    [
        (8, 3, [8, 16], "train_batch_size was 4 and is now 8"),
        (4, 4, [8, 16], "rdtf.seed was 3 and is now 4"),
        (4, 3, (8, 32), r"rdtf.model.widths was \[8, 16\] and is now \[8, 32\]"),
    ],
)
def test_another_run_is_refused_by_what_differs(session, batch, seed, widths, told):
    session().step().save()
    other = session()
    before = other.tensors()
    with pytest.raises(UserError, match=told) as caught:
        other.resume(Identity({"train_batch_size": batch, "rdtf": {"seed": seed, "model": {"widths": widths}}}, {}))
    assert caught.value.everywhere
    assert equal(before, other.tensors())


def test_other_data_is_only_noted(session):
    run = session().step()
    run.save()
    resumed = run.resume(Identity(IDENTITY.must_match, {"data fingerprint": "other"}))
    assert resumed.step == 1 and '"abc" and is now "other"' in resumed.notes[0]


def test_a_damaged_checkpoint_is_passed_over_and_none_left_is_an_error(session):
    run = session()
    folders = [run.step().save(step=step) for step in (1, 2)]
    (folders[1] / "curriculum.json").write_text("{}")
    other = session()
    resumed = other.resume()
    assert resumed.state == {"step": 1} and "step00000002-0002: curriculum.json" in resumed.notes[0]
    (folders[0] / MANIFEST).unlink()
    with pytest.raises(UserError, match="2 checkpoint.*none can be used") as caught:
        other.resume()
    assert caught.value.everywhere


def test_a_commit_after_a_damaged_one_is_the_newer(session):
    run = session().step()
    good = run.save(first=True)
    damaged = run.step().save()
    (damaged / "curriculum.json").unlink()
    other = session()
    assert other.resume().state == {"first": True}
    again = other.step().save(again=True)
    assert Tag.of(again.name) > Tag.of(damaged.name) > Tag.of(good.name)
    assert session().resume().state == {"again": True}


def test_an_interrupted_save_is_no_checkpoint(session):
    run = session().step()
    complete = run.save()
    shutil.copytree(complete, complete.with_name(f"step00000009-0009{UNFINISHED}"))
    assert session().resume().step == 1
    run.step().save()
    assert run.names() == ["step00000001-0001", "step00000002-0002"]


def test_only_the_newest_are_kept(session):
    run = session(keep=2)
    for _ in range(4):
        run.step().save()
    assert run.names() == ["step00000003-0003", "step00000004-0004"]
    assert (run.store.folder / "latest").read_text() == "step00000004-0004"


def test_deepspeeds_recovery_script_lies_beside(session):
    from deepspeed.utils import zero_to_fp32

    run = session().step()
    run.save()
    with open(zero_to_fp32.__file__, "rb") as original:
        assert (run.store.folder / "zero_to_fp32.py").read_bytes() == original.read()


def full(*args, **kwargs):
    raise OSError(28, "No space left on device")


def torn(path, fill):
    digest = checkpoint.durable.write_file(path, fill)
    with open(path, "r+b") as file:
        file.truncate(digest.bytes - 1)
    return digest


@pytest.mark.parametrize(
    ("target", "wrong"),
    [("rdtf_ds.training.checkpoint.write_file", full), ("rdtf_ds.training.shard_files.write_file", full), ("torch.save", full),
     ("rdtf_ds.training.checkpoint.write_file", torn), ("rdtf_ds.training.shard_files.write_file", torn),
     ("rdtf_ds.checkpoints.store.write_manifest", full), ("rdtf_ds.checkpoints.durable.rename", full)],
)  # fmt: skip
def test_a_failed_write_commits_nothing_and_training_goes_on(session, monkeypatch, target, wrong):
    run = session().step()
    complete = run.save()
    run.step()
    with monkeypatch.context() as patch:
        patch.setattr(target, wrong)
        with pytest.raises(SaveFailed, match="rank 0: ") as caught:
            run.save()
    assert caught.value.exit_code == DISK and caught.value.everywhere
    assert run.names() == [complete.name] and run.store.newest() == (complete, [])
    assert run.step().save().name == "step00000003-0002"


def test_what_fails_after_the_rename_does_not_unmake_the_commit(session, monkeypatch):
    run = session().step()
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "prune", full)
        saved = save_checkpoint(run.engine, run.ema, run.store, {}, IDENTITY, {})
    committed = saved.path
    assert "No space left" in saved.trouble
    assert run.store.newest() == (committed, [])


def test_no_room_is_told_before_anything_is_written(session, monkeypatch):
    run = session().step()
    complete = run.save()
    monkeypatch.setattr(CheckpointStore, "_room", lambda self: 1000)
    with pytest.raises(SaveFailed, match="room for 0.00 GB"):
        run.step().save()
    assert run.names() == [complete.name]


def test_weights_that_are_not_finite_are_not_saved(session):
    run = session().step()
    run.engine.masters[0].data[3] = float("nan")
    with pytest.raises(WeightsNotFinite, match="first.weight cannot be held"):
        run.save()
    assert not run.store.folder.exists()


def test_a_signed_run_refuses_checkpoints_without_its_signature(session):
    session().step().save()
    key = b"0123456789abcdef"
    with pytest.raises(UserError, match="not signed with the key"):
        session(key=key).resume()
    signed = session(key=key).step(2)
    signed.save(signed=True)
    assert session(key=key).resume().state == {"signed": True}
    assert session().resume().state == {"signed": True}, "who has no key can still check the digests"
    with pytest.raises(UserError, match="none can be used"):
        session(key=b"another key, and a long one").resume()


def test_latest_is_not_followed(session):
    run = session().step()
    run.save()
    (run.store.folder / "latest").write_text("../../elsewhere")
    resumed = session().resume()
    assert resumed.step == 1 and "'../../elsewhere', which is no checkpoint" in resumed.notes[0]


def test_state_is_plain_json(session):
    folder = session().step().save(numbers=[1, 2.5])
    assert json.loads((folder / "curriculum.json").read_text()) == {"numbers": [1, 2.5]}
