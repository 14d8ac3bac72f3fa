"""tools/reshard.py as people type it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rdtf_ds.checkpoints.durable import Digest
from rdtf_ds.checkpoints.manifest import flaw_of, read_manifest
from rdtf_ds.checkpoints.store import CheckpointStore
from tests.checkpoints.saved_state import Whole, same, write_checkpoint
from tests.small_models import load_tool

WHOLE = Whole([12, 24, 12], [700, 900])
KEY = b"0123456789abcdef"


@pytest.fixture
def reshard(project_root, typed):
    """Calls the tool; returns exit code, standard output, standard error."""
    return typed(load_tool(project_root, "reshard"))


def holds(folder: Path, whole: Whole, world: int, prefix: str = "") -> bool:
    """Whether a checkpoint is whole and just what so many ranks would have written."""
    manifest = read_manifest(folder)
    assert flaw_of(folder, manifest) is None and manifest["world_size"] == world and manifest["tag"] == folder.name
    expected = {f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(world)}
    expected |= {f"ema_rank{rank:04d}.safetensors" for rank in range(world)} | {"mp_rank_00_model_states.pt", "curriculum.json"}
    assert manifest["files"].keys() == expected == {path.name for path in folder.iterdir()} - {"MANIFEST.json"}
    model = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=True)
    assert model["dp_world_size"] == world and model["module"]["w"].tolist() == [1.0, 1.0, 1.0]
    shards = [
        torch.load(folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", weights_only=False) for rank in range(world)
    ]
    averages = [{**load_file(folder / f"ema_rank{rank:04d}.safetensors")} for rank in range(world)]
    ordered = [{key: rank[key] for key in sorted(rank)} for rank in averages]
    return same(shards, whole.written_by(world)) and same(
        ordered, [{key: rank[key] for key in sorted(rank)} for rank in whole.averages_of(world)]
    )


@pytest.mark.parametrize("prefix", ["", "bf16_"])
def test_a_new_run_folder_with_all_it_takes_to_go_on(reshard, tmp_path, prefix):
    source = write_checkpoint(tmp_path / "run", WHOLE, 2, prefix=prefix)
    code, out, err = reshard(tmp_path / "run", "--to", 3, tmp_path / "new" / "run")
    assert code == 0, err
    (made,) = CheckpointStore(tmp_path / "new" / "run" / "checkpoints").candidates()
    assert made.name == "step00000005-0001" and holds(made, WHOLE, 3, prefix)
    assert read_manifest(made)["resharded_from"] == {"tag": source.name, "world_size": 2}
    assert (made / "curriculum.json").read_bytes() == (source / "curriculum.json").read_bytes()
    assert (made.parent / "latest").read_text() == made.name and (made.parent / "zero_to_fp32.py").is_file()
    assert (tmp_path / "new" / "run" / "config.json").read_bytes() == (tmp_path / "run" / "config.json").read_bytes()
    assert f"on 3 process(es), with --output_dir {tmp_path / 'new' / 'run'}\n" in out and str(made) in out and "for 2" in out
    assert holds(source, WHOLE, 2, prefix)


def test_the_run_itself_goes_on_from_what_was_made(reshard, tmp_path):
    """A step folder of the run as the source, the run as the target; what is there stays."""
    older, source = (write_checkpoint(tmp_path / "run", WHOLE, world, step) for world, step in ((1, 3), (2, 5)))
    code, _, err = reshard(source, "--to", 1, tmp_path / "run")
    assert code == 0, err
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    assert [path.name for path in store.candidates()] == ["step00000005-0003", source.name, older.name]
    assert store.newest()[0] == store.candidates()[0] and holds(store.candidates()[0], WHOLE, 1)
    code, out, err = reshard(tmp_path / "run", "--to", 2, tmp_path / "run")
    assert code == 2 and out == "" and f"{source}' is that step for 2 process(es) already" in err


def test_json_is_all_that_stands_on_standard_output(tmp_path, project_root):
    write_checkpoint(tmp_path / "run", WHOLE, 2)
    command = [sys.executable, "tools/reshard.py", str(tmp_path / "run"), "--to", "4", str(tmp_path / "out"), "--json"]
    environment = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    ended = subprocess.run(command, cwd=project_root, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout)
    made = tmp_path / "out" / "checkpoints" / "step00000005-0001"
    size = sum(path.stat().st_size for path in made.iterdir() if path.name != "MANIFEST.json")
    assert report.pop("seconds") > 0 and report == {
        "folder": str(made), "source": str(tmp_path / "run" / "checkpoints" / "step00000005-0001"), "step": 5, "source_ranks": 2,
        "ranks": 4, "micro_batch": 1, "bytes": size,
    }  # fmt: skip
    assert ended.stderr == ""


def test_a_micro_batch_that_no_longer_fits_is_told(reshard, tmp_path):
    write_checkpoint(tmp_path / "run", WHOLE, 2)
    config = json.loads((tmp_path / "run" / "config.json").read_text()) | {"train_micro_batch_size_per_gpu": 30}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    code, out, _ = reshard(tmp_path / "run", "--to", 4, tmp_path / "out")
    assert code == 0 and out.endswith(f"--output_dir {tmp_path / 'out'} --set train_micro_batch_size_per_gpu=15\n")


def test_signed_checkpoints_stay_signed(reshard, tmp_path):
    write_checkpoint(tmp_path / "run", WHOLE, 2, key=KEY)
    (tmp_path / "key").write_bytes(KEY)
    code, _, err = reshard(tmp_path / "run", "--to", 1, tmp_path / "out", "--key_file", tmp_path / "key")
    assert code == 0, err
    assert read_manifest(tmp_path / "out" / "checkpoints" / "step00000005-0001", KEY)["world_size"] == 1
    (tmp_path / "other").write_bytes(KEY[::-1])
    code, _, err = reshard(tmp_path / "run", "--to", 1, tmp_path / "more", "--key_file", tmp_path / "other")
    assert code == 2 and "not signed with the key" in err and not (tmp_path / "more").exists()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["rdtf"]["checkpoint"] = {"key_file": str(tmp_path / "absent")}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    code, _, err = reshard(tmp_path / "run", "--to", 1, tmp_path / "more")
    assert code == 2 and f"'{tmp_path / 'absent'}'" in err


def damaged(run: Path) -> None:
    path = run / "checkpoints" / "step00000005-0001" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def later(run: Path) -> None:
    config = (run / "config.json").read_bytes()
    write_checkpoint(run, WHOLE, 2, step=9)
    (run / "config.json").write_bytes(config)


@pytest.mark.parametrize(
    ("arguments", "prepare", "told"),
    [
        (["{run}", "--to", "0", "{out}"], None, "--to 0: at least one"),
        (["{run}", "--to", "7", "{out}"], None, "60 .* cannot be shared by 7 ranks.*: 1, 2, 3, 4, 5, 6, 10"),
        (["{run}", "--to", "5", "{out}"], None, "Group weights_000 of 3072 values.* for 5 ranks.*: 1, 2, 3, 4, 6, 12"),
        (["{absent}", "--to", "1", "{out}"], None, "absent' is no folder"),
        (["{run}", "--to", "1", "{file}"], None, "is a file"),
        (["{run}", "--to", "1", "{out}"], lambda run: (run / "config.json").unlink(), "config.json'.* cannot be read"),
        (["{run}", "--to", "1", "{out}"], lambda run: (run / "config.json").write_text("{}"), "config.json'.* cannot be read"),
        (["{run}", "--to", "1", "{out}"], damaged, "rank_1_mp_rank_00_optim_states.pt was changed or damaged.*another checkpoint"),
        (["{run}", "--to", "1", "{other}"], None, "holds checkpoints of another run already, step00000005-0001"),
        (["{run}", "--to", "1", "{config}"], None, "holds the config.json of another run"),
        (["{step}", "--to", "1", "{run}"], later, "step00000009-0002, a later step than step00000005-0001"),
        (["{run}", "--to", "2", "{run}"], None, "is that step for 2 process"),
    ],
)
def test_wrong_use_is_one_paragraph_and_leaves_nothing(reshard, tmp_path, arguments, prepare, told):
    run = tmp_path / "run"
    write_checkpoint(run, WHOLE, 2)
    write_checkpoint(tmp_path / "other", WHOLE, 2)
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("")
    if prepare is not None:
        prepare(run)
    before = sorted(path for path in tmp_path.rglob("*") if path.name != ".lock")
    places = {name: tmp_path / name for name in ("run", "out", "absent", "file", "other", "config")}
    places["step"] = run / "checkpoints" / "step00000005-0001"
    code, out, err = reshard(*(argument.format(**places) for argument in arguments))
    assert code == 2 and out == "" and err.count("\n") == 1
    with pytest.raises(AssertionError, match=told):
        raise AssertionError(err)
    assert sorted(path for path in tmp_path.rglob("*") if path.name != ".lock") == before


def test_a_full_disk_leaves_nothing(reshard, tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "run", WHOLE, 2)

    def full(*_, **__):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    monkeypatch.setattr("rdtf_ds.checkpoints.offline_reshard.write_safetensors", full)
    code, _, err = reshard(tmp_path / "run", "--to", 1, tmp_path / "out")
    assert code == 2 and "cannot be written anew for 1 ranks" in err and "unexpected pos" in err
    assert not (tmp_path / "out").exists()
    code, _, err = reshard(tmp_path / "run", "--to", 1, tmp_path / "run")
    assert code == 2 and len(list((tmp_path / "run" / "checkpoints").glob("step*"))) == 1


def test_a_disk_without_room_loses_nothing(reshard, tmp_path, monkeypatch):
    """A trainer would let old checkpoints go; a tool must not."""
    for step in (3, 4, 5):
        write_checkpoint(tmp_path / "run", WHOLE, 2, step)
    monkeypatch.setattr(CheckpointStore, "_room", lambda store: 1000)
    code, _, err = reshard(tmp_path / "run", "--to", 1, tmp_path / "run")
    assert code == 2 and "has room for" in err
    assert len(CheckpointStore(tmp_path / "run" / "checkpoints").candidates()) == 3


def test_a_folder_in_which_a_trainer_runs_is_left_alone(reshard, tmp_path, project_root):
    write_checkpoint(tmp_path / "run", WHOLE, 2)
    script = (
        "import sys; from pathlib import Path; from rdtf_ds.training.run_lock import RunLock\n"
        "with RunLock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=project_root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None and trainer.stdout.readline() == "held\n"
        code, _, err = reshard(tmp_path / "run", "--to", 1, tmp_path / "run")
        assert code == 2 and "in use by another trainer" in err
        assert trainer.stdin is not None
        trainer.stdin.close()
    assert reshard(tmp_path / "run", "--to", 1, tmp_path / "run")[0] == 0


def test_what_the_disk_does_not_give_back_is_not_committed(reshard, tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "run", WHOLE, 2)
    monkeypatch.setattr("rdtf_ds.checkpoints.offline_reshard.digest_file", lambda path: Digest(0, ""))
    code, _, err = reshard(tmp_path / "run", "--to", 1, tmp_path / "out")
    assert code == 2 and "does not give back" in err and not (tmp_path / "out").exists()
