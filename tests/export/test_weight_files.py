"""What is written: values, names, shards, and what is refused."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save

from rdtf_ds.checkpoints.durable import digest_file
from rdtf_ds.errors import UserError
from rdtf_ds.export.weight_files import (
    DTYPES,
    INDEX_FILE,
    WEIGHTS_FILE,
    UnexportableWeight,
    bytes_of,
    plan_files,
    refuse_unexportable,
    write_weights,
)

TENSORS = {"a": torch.randn(3, 5), "odd": torch.randn(7), "scalar": torch.tensor(2.5), "none": torch.zeros(0, 4), "z": torch.randn(2, 2)}


def shapes_of(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_a_file_is_what_safetensors_would_write(tmp_path, dtype):
    digests = write_weights(tmp_path, shapes_of(TENSORS), TENSORS.items(), dtype)
    ours = load((tmp_path / WEIGHTS_FILE).read_bytes())
    theirs = load(save({name: tensor.to(dtype) for name, tensor in TENSORS.items()}))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {tensor.dtype for tensor in ours.values()} == {dtype}
    assert digests == {WEIGHTS_FILE: digest_file(tmp_path / WEIGHTS_FILE)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shards_are_shared_out_as_diffusers_does(tmp_path, dtype):
    """The reference is diffusers' own save_pretrained of a model of ours, cast and cut by the same size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1).to(dtype)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=4000)
    tensors = model.state_dict()
    (tmp_path / "ours").mkdir()
    digests = write_weights(tmp_path / "ours", shapes_of(tensors), ((n, t.float()) for n, t in tensors.items()), dtype, 4000)
    ours, theirs = (json.loads((tmp_path / name / INDEX_FILE).read_text()) for name in ("ours", "theirs"))
    assert ours["weight_map"] == theirs["weight_map"] and len(set(ours["weight_map"].values())) > 3
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    names = set(theirs["weight_map"].values())
    assert digests.keys() == names | {INDEX_FILE} == {path.name for path in (tmp_path / "ours").iterdir()}
    for name in names:
        mine, other = load_file(tmp_path / "ours" / name), load_file(tmp_path / "theirs" / name)
        assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in other)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 100))
def test_no_shard_is_above_the_size_but_by_a_single_parameter(lengths, limit):
    shapes = {f"p{n}": (length,) for n, length in enumerate(lengths)}
    files = plan_files(shapes, torch.float16, limit)
    assert [name for file in files for name in file.specs] == list(shapes)  # all, once, in order
    sizes = [[2 * shape[0] for _, shape in file.specs.values()] for file in files]
    assert all(sum(size) <= limit or len([part for part in size if part]) == 1 for size in sizes)
    for before, after in zip(sizes, sizes[1:], strict=False):
        assert sum(before) + after[0] > limit  # nothing is cut that need not be
    names = [file.name for file in files]
    assert names == [WEIGHTS_FILE] or names[-1].endswith(f"-{len(files):05d}-of-{len(files):05d}.safetensors")


def test_one_parameter_at_a_time_is_held(tmp_path):
    alive: list[weakref.ref] = []

    def parameters():
        for n in range(6):
            tensor = torch.full((1000,), float(n))
            alive.append(weakref.ref(tensor))
            yield f"p{n}", tensor
            del tensor
            assert sum(reference() is not None for reference in alive) <= 1  # the one the loop of the writer still names

    write_weights(tmp_path, {f"p{n}": (1000,) for n in range(6)}, parameters(), torch.float16, 5000)
    assert len(list(tmp_path.glob("*-of-00003.safetensors"))) == 3


@pytest.mark.parametrize(
    ("dtype", "value", "accepted"),
    [
        ("float16", 65504.0, True), ("float16", -65504.0, True), ("float16", 65504.1, False), ("float16", -7e4, False),
        ("bfloat16", 7e4, True), ("bfloat16", 3.38e38, True), ("bfloat16", -3.4e38, False), ("float32", -3.4e38, True),
    ],
)  # fmt: skip
def test_values_beyond_the_dtype_are_refused(dtype, value, accepted):
    weight = torch.tensor([1.0, value])
    if accepted:
        refuse_unexportable("block.w", weight, DTYPES[dtype])
        assert torch.isfinite(weight.to(DTYPES[dtype])).all()
    else:
        with pytest.raises(UnexportableWeight, match=rf"block\.w reaches .* {dtype} ends at") as refused:
            refuse_unexportable("block.w", weight, DTYPES[dtype])
        assert ("--dtype bfloat16" in str(refused.value)) == (dtype == "float16")


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("values", [[float("nan"), 1.0], [0.0, float("inf")], [-float("inf"), 0.0]])
def test_what_is_no_number_is_refused_in_every_dtype(dtype, values):
    with pytest.raises(UnexportableWeight, match=r"w holds 1 values? that are NaN"):
        refuse_unexportable("w", torch.tensor(values), dtype)


@pytest.mark.parametrize(
    "parameters",
    [
        [("a", torch.zeros(2))],
        [("b", torch.zeros(3)), ("a", torch.zeros(2))],
        [("a", torch.zeros(3)), ("b", torch.zeros(3))],
        [("a", torch.zeros(2)), ("b", torch.zeros(3)), ("c", torch.zeros(1))],
    ],
)
@pytest.mark.parametrize("max_shard", [4, 10**9])
def test_the_stream_holds_to_what_it_announced(tmp_path, parameters, max_shard):
    with pytest.raises(ValueError, match="announced"):
        write_weights(tmp_path, {"a": (2,), "b": (3,)}, parameters, max_shard=max_shard)


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("200 mb", 2 * 10**8), ("1.5GiB", 3 * 2**29), ("7KB", 7000), ("1KiB", 1024), ("12", 12)]
)
def test_sizes_are_read(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "0", "0GB", "-1GB", "5 GBit", "big", "0.0001KB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UserError, match="max_shard_size"):
        bytes_of(text)


def test_a_file_in_the_way_is_not_overwritten(tmp_path: Path):
    (tmp_path / WEIGHTS_FILE).write_text("mine")
    with pytest.raises(FileExistsError):
        write_weights(tmp_path, {"a": (1,)}, [("a", torch.zeros(1))])
    assert (tmp_path / WEIGHTS_FILE).read_text() == "mine"
