"""Cutting saved state anew: against an independent cut of the whole in numpy, and against what DeepSpeed itself writes."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import weakref
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.utils.tensor_fragment import fragment_address
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from rdtf_ds.checkpoints.manifest import CheckpointError, read_manifest
from rdtf_ds.checkpoints.resharding import Reopened, batch_keys, ema_shard, model_states, optimizer_shard, shard_to_load
from rdtf_ds.checkpoints.store import CheckpointStore
from rdtf_ds.checkpoints.weights import CheckpointWeights
from tests.checkpoints.resizing_plan import BATCH, MORE, SAVED
from tests.checkpoints.saved_state import BLOCK, QUANT, Whole, same


def tensors_of(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else []
    return [tensor for part in parts for tensor in tensors_of(part)]


COUNTS = [1, 2, 3, 4, 6]


@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize("new", COUNTS)
@pytest.mark.parametrize("old", COUNTS)
def test_every_rank_gets_what_it_would_have_written(old, new, offloaded):
    whole = Whole([12, 36, 24], [768, 900], offloaded=offloaded)  # the first parameter ends with a rank's part
    shards = whole.written_by(old)
    assert same([optimizer_shard(shards, rank, new) for rank in range(new)], whole.written_by(new))
    assert same([ema_shard(whole.averages_of(old), rank, new) for rank in range(new)], whole.averages_of(new))


@given(data=st.data())
def test_any_lengths_any_counts_there_and_back(data):
    units = data.draw(st.lists(st.integers(1, 3), min_size=2, max_size=4), "units of 60 blocks")
    sizes = data.draw(st.lists(st.integers(1, 9000), min_size=1, max_size=5), "parameters")
    counts = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4), "rank counts")
    whole = Whole([60 * unit for unit in units], sizes, data.draw(st.booleans(), "started"))
    first = data.draw(st.integers(1, 6), "first count")
    shards, averages = whole.written_by(first), whole.averages_of(first)
    for world in [*counts, first]:
        shards = [optimizer_shard(shards, rank, world) for rank in range(world)]
        averages = [ema_shard(averages, rank, world) for rank in range(world)]
    assert same(shards, whole.written_by(first)) and same(averages, whole.averages_of(first))


@pytest.mark.parametrize("blocks", [[4, 24, 24], [24, 24, 4]], ids=["8-bit group", "32-bit group"])
def test_a_cut_through_a_block_is_refused_with_the_counts_that_work(blocks):
    whole = Whole(blocks, [700])
    name = whole.names[blocks.index(4)]
    for cut, shards in ((optimizer_shard, whole.written_by(2)), (shard_to_load, whole.written_by(2)), (ema_shard, whole.averages_of(2))):
        for world in (3, 8):  # 8 could share the values, but not the blocks
            with pytest.raises(CheckpointError, match=rf"Group {name} of 1024 values.* for {world} ranks.*: 1, 2, 4\."):
                cut(shards, 0, world)


def test_shards_that_were_cut_through_a_block_are_refused_but_for_their_own_count():
    whole = Whole([1, 2, 2], [100])
    shards = whole.written_by(1)
    half = copy.deepcopy(shards[0])
    state = half["optimizer_state_dict"]
    state["single_partition_of_fp32_groups"] = [flat[: flat.numel() // 2] for flat in state["single_partition_of_fp32_groups"]]
    with pytest.raises(CheckpointError, match="weights_000 of 256 values in 2 shards"):
        optimizer_shard([half, half], 0, 1)
    for name in ("state1", "state2"):
        for number in range(3):
            moments = state["base_optimizer_state"]["state"][number][QUANT]
            moments[name] = moments[name][: moments[name].numel() // 2]
    for number, kept in ((1, 1), (0, 1)):
        moments = state["base_optimizer_state"]["state"][number][QUANT]
        moments.update({key: moments[key][:kept] for key in ("absmax1", "absmax2")})
    state["param_slice_mappings"] = [{"p0": fragment_address(100, 0)}] * 3
    again = optimizer_shard([half, half], 1, 2)["optimizer_state_dict"]
    assert same(again["base_optimizer_state"], state["base_optimizer_state"])


def wrong(path: str, value: Any) -> Any:
    """A change of rank 1's file; ``path`` leads from its optimizer state to what is replaced."""

    def apply(shard: dict[str, Any]) -> None:
        *way, last = [int(key) if key.isdigit() else key for key in path.split("/")]
        place = shard["optimizer_state_dict"]
        for key in way:
            place = place[key]
        if value is None:
            del place[last]
        else:
            place[last] = value(place[last]) if callable(value) else value

    return apply


BASE = "base_optimizer_state"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (wrong(f"{BASE}/state/0/step", 8), r"step of group weights_000 \(rank 0: 7; rank 1: 8\)"),
        (wrong(f"{BASE}/state/1/{QUANT}/qmap2", lambda q: q + 1), "qmap2 of group weights_001"),
        (wrong(f"{BASE}/state/1/{QUANT}/qmap1", lambda q: q.double()), "qmap1 of group weights_001"),
        (wrong(f"{BASE}/state/0/{QUANT}/state1", lambda s: s[:-1]), "state1 of group weights_000, 1536 values.*1535"),
        (wrong(f"{BASE}/state/0/{QUANT}/state2", lambda s: s.float()), "state2 of group weights_000"),
        (wrong(f"{BASE}/state/0/{QUANT}/absmax1", lambda a: a[:-1]), "absmax1 of group weights_000, 6 values.*5"),
        (wrong(f"{BASE}/state/0/{QUANT}/absmax2", None), "what the moments of group weights_000 holds"),
        (wrong(f"{BASE}/state/1", None), "what the moments holds"),
        (wrong(f"{BASE}/param_groups/1/lr", 0.2), "the optimizer's settings"),
        (wrong("single_partition_of_fp32_groups/1", lambda f: f[:-BLOCK]), "the length of group weights_001"),
        (wrong("single_partition_of_fp32_groups/2", None), "the number of single_partition_of_fp32_groups"),
        (wrong("param_slice_mappings/2", None), "the number of param_slice_mappings"),
        (wrong("loss_scaler", DynamicLossScaler(512.0, 2.0, 1000, 1.0, 1, False, True)), "loss_scaler"),
        (wrong("overflow", True), "overflow"),
        (wrong("clip_grad", None), "what the optimizer's state holds"),
    ],
)
def test_shards_of_two_saves_are_told_apart(change, told):
    shards = Whole([12, 12, 12], [700]).written_by(2)
    change(shards[1])
    with pytest.raises(CheckpointError, match=rf"not of one save.*{told}"):
        optimizer_shard(shards, 0, 1)


@pytest.mark.parametrize("key", ["new_max1", "gnorm_vec"])
def test_state_of_an_unknown_kind_is_refused_by_name(key):
    shards = Whole([12, 12], [700]).written_by(2)
    for shard in shards:
        shard["optimizer_state_dict"][BASE]["state"][0][QUANT][key] = torch.zeros(6)
    with pytest.raises(CheckpointError, match=f"weights_000 hold '{key}'"):
        optimizer_shard(shards, 0, 1)


@pytest.mark.parametrize(("key", "value"), [("group_paddings", [0, 2]), ("param_alignment_paddings", [[0, 0], [3, 0]])])
def test_paddings_of_deepspeeds_own_are_refused(key, value):
    shards = Whole([12, 12], [700]).written_by(2)
    shards[1]["optimizer_state_dict"][key] = value
    with pytest.raises(CheckpointError, match="paddings of DeepSpeed"):
        optimizer_shard(shards, 0, 1)


def test_averages_of_two_saves_are_told_apart():
    whole = Whole([12, 12], [700])
    for change in ({"updates": torch.tensor(5)}, {"weights_000": torch.zeros(BLOCK)}, {"other": torch.zeros(BLOCK)}):
        shards = whole.averages_of(2)
        shards[1] |= change
        with pytest.raises(CheckpointError, match="not of one save"):
            ema_shard(shards, 0, 1)


def test_a_part_of_one_shard_is_not_copied_and_saved_without_the_rest():
    shards = Whole([12, 24, 12], [700]).written_by(2)
    new = optimizer_shard(shards, 1, 4)
    for tensor in tensors_of(new["optimizer_state_dict"]):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    old = shards[0]["optimizer_state_dict"]
    pairs = [(new["optimizer_state_dict"][key][1], old[key][1]) for key in ("single_partition_of_fp32_groups",)]
    pairs += [(new["optimizer_state_dict"][BASE]["state"][1][QUANT][k], old[BASE]["state"][1][QUANT][k]) for k in ("state1", "absmax2")]
    for part, source in pairs:
        assert part.data_ptr() == source.data_ptr() + source.nbytes // 2
    sizes = []
    for content in (shards[0], new):
        file = io.BytesIO()
        torch.save(content, file)
        sizes.append(file.tell())
    assert sizes[1] < 0.7 * sizes[0]


def test_loading_holds_nothing_twice():
    """Masters are cut when asked for, and not copied where they lie in one shard; moments are copies, and deepcopy makes no more."""
    whole = Whole([12, 24, 12], [700])
    shards = whole.written_by(2)
    state = shard_to_load(shards, 2, 4)["optimizer_state_dict"]
    written = whole.written_by(4)[2]["optimizer_state_dict"]
    base, masters = state[BASE], state["single_partition_of_fp32_groups"]
    assert len(masters) == 3 and same(list(masters), written["single_partition_of_fp32_groups"]) and same(masters[-1], list(masters)[2])
    assert masters[0].detach() is not masters[0].detach()
    assert base == {**base} and copy.deepcopy(base) is base
    assert same({**base}, written[BASE])
    files = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors_of(shards)]
    assert not any(low <= t.data_ptr() < high for t in tensors_of(base["state"]) for low, high in files)
    with pytest.raises(IndexError):
        masters[3]


def test_no_more_of_the_files_is_held_than_a_group_of_masters():
    whole = Whole([12, 24, 12, 12], [700])
    handed_out: list[weakref.ref] = []

    def opened(rank: int) -> dict[str, Any]:
        content = whole.written_by(2)[rank]
        handed_out.extend(weakref.ref(tensor) for tensor in tensors_of(content))
        return content

    content = shard_to_load([Reopened(partial(opened, rank)) for rank in range(2)], 0, 1)
    assert handed_out and not any(reference() is not None for reference in handed_out)
    masters = content["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    for master, expected in zip(masters, whole.masters, strict=True):
        assert np.array_equal(master.detach().numpy(), expected)
        assert not any(reference() is not None for reference in handed_out)  # joined here; a view would hold its own
    assert same({**content["optimizer_state_dict"][BASE]}, whole.written_by(1)[0]["optimizer_state_dict"][BASE])
    assert content.keys() == whole.written_by(1)[0].keys() and content["ds_config"] == whole.written_by(1)[0]["ds_config"]


@pytest.mark.parametrize(
    ("batch", "micro", "world", "expected"),
    [(12, 2, 1, (2, 6)), (12, 2, 3, (2, 2)), (12, 4, 2, (3, 2)), (12, 4, 12, (1, 1)), (12, 4, 4, (3, 1)), (16, 16, 2, (8, 1))],
)
def test_the_global_batch_is_kept(batch, micro, world, expected):
    keys = batch_keys({"train_batch_size": batch, "train_micro_batch_size_per_gpu": micro, "steps_per_print": 9}, world)
    assert (keys["train_micro_batch_size_per_gpu"], keys["gradient_accumulation_steps"]) == expected
    assert keys["train_batch_size"] == batch == expected[0] * expected[1] * world and keys["steps_per_print"] == 9


def test_a_global_batch_that_cannot_be_shared_is_refused_with_the_counts_that_work():
    with pytest.raises(CheckpointError, match=r"12 \(train_batch_size\).* 5 ranks.*: 1, 2, 3, 4, 6, 12\."):
        batch_keys({"train_batch_size": 12, "train_micro_batch_size_per_gpu": 2}, 5)


def test_model_states_change_in_the_ranks_alone():
    content = {
        "module": {"w": torch.ones(3)}, "dp_world_size": 2, "global_steps": 4,
        "ds_config": {"train_batch_size": 12, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3},
    }  # fmt: skip
    new = model_states(content, 3)
    assert new == {**content, "dp_world_size": 3, "ds_config": {**content["ds_config"], "gradient_accumulation_steps": 2}}
    assert content["dp_world_size"] == 2 and new["module"]["w"] is content["module"]["w"]


# --- real ranks, real DeepSpeed


@pytest.fixture(scope="module")
def played(tmp_path_factory, project_root) -> Path:
    """What `tests.checkpoints.resizing` leaves."""
    out = tmp_path_factory.mktemp("resizing")
    command = [sys.executable, "-m", "tests.checkpoints.resizing", str(out)]
    ended = subprocess.run(command, cwd=project_root, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr[-5000:]
    return out


def noted(out: Path, name: str, ranks: int) -> list[Any]:
    return [torch.load(out / f"{name}_{rank}.pt", weights_only=False) for rank in range(ranks)]


def shards_in(folder: Path, ranks: int) -> list[dict[str, Any]]:
    path = CheckpointStore(folder).newest()[0]
    assert path is not None and read_manifest(path)["world_size"] == ranks
    return [torch.load(path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", weights_only=False) for rank in range(ranks)]


def joined(ranks: list[dict[str, Any]]) -> list[tuple[np.ndarray, ...]]:
    """Masters and moments of all ranks, by group, laid end to end."""
    groups = []
    for number in range(len(ranks[0]["masters"])):
        moments = [rank["moments"][number] for rank in ranks]
        keys = sorted(key for key, value in moments[0].items() if isinstance(value, torch.Tensor) and not key.startswith("qmap"))
        flats = [[rank["masters"][number] for rank in ranks], *([part[key] for part in moments] for key in keys)]
        groups.append(tuple(np.concatenate([flat.numpy() for flat in flats_of]) for flats_of in flats))
    return groups


def test_deepspeed_writes_what_we_cut(played):
    """2 ranks' checkpoint cut for 3, and the same one resumed by 3 ranks and saved by DeepSpeed: equal in every entry."""
    for cut, saved, ranks in (("to_three", "three_at_once_again", 3), ("to_one", "one_at_once_again", 1)):
        ours, theirs = shards_in(played / cut, ranks), shards_in(played / saved, ranks)
        for shard in (*ours, *theirs):
            for group in shard["optimizer_state_dict"][BASE]["param_groups"]:
                del group["lr"]  # set before every step; a resume leaves the config's
        assert same(ours, theirs)


def test_two_one_three_two_is_what_was_saved(played):
    before, after = (CheckpointStore(played / name).newest()[0] for name in ("two", "to_two"))
    assert same(shards_in(played / "two", 2), shards_in(played / "to_two", 2))
    for rank in range(2):
        assert same(*(load_file(path / f"ema_rank{rank:04d}.safetensors") for path in (before, after)))
    then, now = read_manifest(before), read_manifest(after)
    assert now["resharded_from"] == {"tag": "step00000003-0001", "world_size": 3}
    apart = {"resharded_from", "tag", "files"}
    assert {k: v for k, v in now.items() if k not in apart} == {k: v for k, v in then.items() if k not in apart}
    assert now["files"].keys() == then["files"].keys() and now["files"]["curriculum.json"] == then["files"]["curriculum.json"]


def test_moments_are_worth_the_test(played):
    """Both widths, and hardly a block of them empty."""
    moments = [moment for rank in noted(played, "saved", 2) for moment in rank["moments"]]
    assert {moment["state1"].dtype for moment in moments} == {torch.uint8, torch.float32}
    weights = [moment for moment in moments if moment["state1"].dtype == torch.uint8]
    assert sum(int((moment["absmax1"] > 0).sum()) for moment in weights) >= 5


@pytest.mark.parametrize(("name", "ranks"), [("one", 1), ("one_at_once", 1), ("three_at_once", 3)])
def test_another_number_of_ranks_goes_on_with_the_very_state(played, name, ranks):
    """Masters, moments, averages, weights and counters; then losses as on 2 ranks, but for the order of sums."""
    before, after = noted(played, "saved", 2), noted(played, name, ranks)
    for one, other in zip(joined(before), joined(after), strict=True):
        assert len(one) == len(other) >= 3 and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    for group in before[0]["ema"].keys() - {"updates"}:
        assert torch.equal(torch.cat([rank["ema"][group] for rank in before]), torch.cat([rank["ema"][group] for rank in after]))
    for rank in after:
        assert rank["counters"] == before[0]["counters"] and rank["ema"]["updates"] == SAVED
        assert all(torch.equal(rank["model"][key], value) for key, value in before[0]["model"].items())
    losses = noted(played, f"losses_{name}", ranks)[0]
    assert len(losses) == MORE and losses == pytest.approx(noted(played, "losses_straight", 2)[0][SAVED:], rel=2e-3)


def test_a_run_that_goes_back_to_before_the_first_step_is_a_fresh_one(played):
    """Moments it had by then leave no trace, nor does the width they had."""
    (back,), (fresh,) = noted(played, "back", 1), noted(played, "fresh", 1)
    assert back["moments"] == fresh["moments"] == [{}] * len(back["masters"])
    assert same(back["masters"], fresh["masters"]) and back["counters"] == fresh["counters"] == (0, 0, 2.0**10)
    assert noted(played, "losses_back", 1) == noted(played, "losses_fresh", 1)
    assert all(shard["optimizer_state_dict"][BASE]["state"] == {} for shard in shards_in(played / "start_of_three", 3))


@pytest.mark.parametrize("name", ["two", "to_one", "to_three"])
def test_deepspeeds_own_script_finds_the_masters(played, name):
    theirs = torch.load(played / f"weights_of_{name}.pt", weights_only=False)
    path = CheckpointStore(played / "two").newest()[0]
    ours = dict(CheckpointWeights(path).parameters("master"))
    assert {f"model.{key}" for key in ours} == {key for key in theirs if not key.startswith("paddings.")}
    assert all(torch.equal(theirs[f"model.{key}"], value) for key, value in ours.items())
    assert any(value.abs().sum() > 0 for value in ours.values())


def test_the_record_of_the_batch_fits_the_ranks(played):
    for name, ranks in (("to_one", 1), ("to_three", 3)):
        for shard in shards_in(played / name, ranks):
            keys = shard["ds_config"]
            assert keys["train_micro_batch_size_per_gpu"] * keys["gradient_accumulation_steps"] * ranks == BATCH
