"""Every file of a checkpoint damaged in every way: it is noticed, and the checkpoint before is used."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rdtf_ds.checkpoints.durable import digest_file
from rdtf_ds.checkpoints.manifest import MANIFEST, read_manifest, write_manifest
from rdtf_ds.checkpoints.store import CheckpointStore
from rdtf_ds.errors import UserError
from rdtf_ds.training.checkpoint import resume_checkpoint
from tests.faults.test_power_cuts import IDENTITY, Saves


@pytest.fixture
def saves(make_engine, train, tmp_path) -> Saves:
    return Saves(make_engine, train, tmp_path / "past")


def cut_to(share: float) -> Callable[[Path, Path], None]:
    return lambda path, other: os.truncate(path, int(path.stat().st_size * share))


def flip(share: float) -> Callable[[Path, Path], None]:
    def damage(path: Path, other: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int((len(data) - 1) * share)] ^= 1
        path.write_bytes(data)

    return damage


DAMAGES: dict[str, Callable[[Path, Path], None]] = {
    "deleted": lambda path, other: path.unlink(),
    "empty": cut_to(0.0),
    "one byte left": lambda path, other: os.truncate(path, 1),
    "half left": cut_to(0.5),
    "99.9 % left": lambda path, other: os.truncate(path, min(int(path.stat().st_size * 0.999), path.stat().st_size - 1)),
    "one byte more": lambda path, other: path.write_bytes(path.read_bytes() + b"\0"),
    "first bit flipped": flip(0.0),
    "a bit in the middle flipped": flip(0.5),
    "last bit flipped": flip(1.0),
    "that of another checkpoint": lambda path, other: path.write_bytes(other.read_bytes()),
    "a link to that of another checkpoint": lambda path, other: (path.unlink(), path.symlink_to(other))[0],
}


def damage_everything(saves: Saves, folder: Path) -> tuple[int, list[str]]:
    """Damages tried, and those that were accepted or did not lead to the previous checkpoint."""
    previous, newest = reversed(CheckpointStore(saves.past).candidates())
    accepted, tried = [], 0
    for name in sorted(path.name for path in newest.iterdir()):
        for damage, spoil in DAMAGES.items():
            shutil.copytree(saves.past, folder)
            path = folder / newest.name / name
            before = digest_file(path)
            spoil(path, folder / previous.name / name)
            same = path.is_file() and not path.is_symlink() and digest_file(path) == before  # the two checkpoints share its bytes
            if not same:
                tried += 1
                found, reasons = CheckpointStore(folder).newest()
                if found != folder / previous.name or len(reasons) != 1:
                    accepted.append(f"{name} {damage}: {found}, {reasons}")
            shutil.rmtree(folder)
    return tried, accepted


def test_no_damage_is_accepted(saves, tmp_path):
    tried, accepted = damage_everything(saves, tmp_path / "spoilt")
    assert tried >= 50 and accepted == []


@pytest.mark.soak
def test_the_count_of_damages(saves, tmp_path, fault_table):
    tried, accepted = damage_everything(saves, tmp_path / "spoilt")
    fault_table(
        "every file of a checkpoint deleted, cut short (0, 1 byte, 50 %, 99.9 %), a bit flipped (first, middle, last), swapped, linked",
        "0 silent acceptances; previous tag used",
        f"{tried} damages, {len(accepted)} accepted, {tried - len(accepted)} times the previous checkpoint",
    )
    assert tried >= 50 and accepted == []


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "ema_rank0000.safetensors"])
def test_a_run_goes_on_from_the_one_before(saves, name):
    (_, newest) = reversed(CheckpointStore(saves.past).candidates())
    flip(0.5)(newest / name, newest)
    assert saves.resumed_step(saves.past) == 1


class Payload:
    """Runs a command when unpickled carelessly."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def reseal(folder: Path, **changes: object) -> None:
    """A manifest that agrees with what an attacker who knows the format put there."""
    manifest = {**read_manifest(folder), **changes}
    for name in manifest["files"]:
        if (folder / name).is_file():
            manifest["files"][name] = digest_file(folder / name).to_json()
    (folder / MANIFEST).unlink()
    write_manifest(folder, manifest)


def doctor_every_shard(saves: Saves, folder: Path) -> tuple[int, int]:
    """Shards doctored, and payloads that ran, though the manifest was sealed anew to go with them."""
    (_, newest) = reversed(CheckpointStore(saves.past).candidates())
    shards, ran = [path.name for path in sorted(newest.iterdir()) if path.suffix == ".pt"], 0
    for name in shards:
        shutil.copytree(saves.past, folder)
        doctored, marker = folder / newest.name / name, folder / "ran"
        torch.save({**torch.load(doctored, weights_only=False), "more": Payload(marker)}, doctored)
        reseal(folder / newest.name)
        assert CheckpointStore(folder).newest()[0] == folder / newest.name, "the digests do not give it away"
        assert saves.resumed_step(folder) == 1
        ran += marker.exists()
        shutil.rmtree(folder)
    return len(shards), ran


def test_a_doctored_pickle_is_refused_not_run(saves, tmp_path):
    assert doctor_every_shard(saves, tmp_path / "doctored") == (2, 0)


OUTSIDE = ["../../elsewhere", "/etc/hostname", "..", "a/b", "a\\b", "", "."]


@pytest.mark.soak
def test_the_count_of_doctored_files(saves, tmp_path, fault_table):
    shards, ran = doctor_every_shard(saves, tmp_path / "doctored")
    refused = sum(names_outside_refused(saves, tmp_path / f"named{number}", name) for number, name in enumerate(OUTSIDE))
    (saves.past / "latest").write_text("../elsewhere")
    followed = saves.resumed_step(saves.past) != 2
    fault_table(
        "doctored pickle in each shard, the manifest sealed anew; traversal in tag, latest, manifest",
        "never executed; refused",
        f"{shards} shards: {ran} executed; {refused} of {len(OUTSIDE)} manifests that name files outside refused; latest not followed",
    )
    assert ran == 0 and refused == len(OUTSIDE) and not followed


def names_outside_refused(saves: Saves, folder: Path, name: str) -> bool:
    shutil.copytree(saves.past, folder)
    (_, newest) = reversed(CheckpointStore(folder).candidates())
    reseal(newest, files={**read_manifest(newest)["files"], name: {"bytes": 1, "sha256": "0" * 64}})
    told = CheckpointStore(folder).newest()[1][0]
    return "is no file of its own folder" in told and saves.resumed_step(folder) == 1


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_that_names_files_outside_is_refused(saves, tmp_path, name):
    assert names_outside_refused(saves, tmp_path / "named", name)


@pytest.mark.parametrize("entry", [None, 3, {"bytes": "4", "sha256": "x"}, {"bytes": 4}, ["a"]])
def test_a_manifest_of_another_make_is_refused(saves, entry):
    (_, newest) = reversed(CheckpointStore(saves.past).candidates())
    manifest = json.loads((newest / MANIFEST).read_text())
    manifest["files"]["curriculum.json"] = entry
    (newest / MANIFEST).write_text(json.dumps(manifest))
    assert f"its {MANIFEST}" in CheckpointStore(saves.past).newest()[1][0]


def test_a_tag_that_leads_out_of_the_folder_is_refused(saves, tmp_path):
    (_, newest) = reversed(CheckpointStore(saves.past).candidates())
    elsewhere = tmp_path / "elsewhere"
    newest.rename(elsewhere)
    newest.symlink_to(elsewhere)
    assert "symbolic link" in CheckpointStore(saves.past).newest()[1][0]
    assert saves.resumed_step(saves.past) == 1


def test_a_checkpoint_under_another_name_is_refused(saves):
    (_, newest) = reversed(CheckpointStore(saves.past).candidates())
    newest.rename(newest.with_name("step00000099-0099"))
    assert f"that of '{newest.name}'" in CheckpointStore(saves.past).newest()[1][0]


def test_all_damaged_is_an_error_not_a_new_start(saves):
    for path in CheckpointStore(saves.past).candidates():
        flip(0.5)(path / "curriculum.json", path)
    with pytest.raises(UserError, match="2 checkpoint.*none can be used"):
        resume_checkpoint(saves.other, saves.other_ema, CheckpointStore(saves.past), IDENTITY)
