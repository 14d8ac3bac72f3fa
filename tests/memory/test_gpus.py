from __future__ import annotations

import pytest

from rdtf_ds.errors import UserError
from rdtf_ds.memory.gpus import CONTEXT_BYTES, GPUS, context_bytes, find_gpu

NOMINAL_GIB = {
    "8gb": 8, "rtx3060": 12, "t4": 16, "v100-16gb": 16, "p100": 16, "a10": 24, "rtx4090": 24, "rtx3090": 24, "v100-32gb": 32,
    "a100-40gb": 40, "a100-80gb": 80,
}  # fmt: skip


def test_every_card_has_a_little_less_than_its_box_says():
    assert GPUS.keys() == NOMINAL_GIB.keys()
    for name, gpu in GPUS.items():
        assert 0.9 < gpu.bytes / 2**30 / NOMINAL_GIB[name] < 1.0
    assert list(GPUS.values()) == sorted(GPUS.values(), key=lambda gpu: gpu.bytes)


def test_only_ampere_and_later_have_bf16():
    assert {name for name, gpu in GPUS.items() if gpu.capability < (8, 0)} == {"t4", "v100-16gb", "v100-32gb", "p100"}


def test_cards_are_found_in_any_case_and_unknown_ones_named():
    assert find_gpu("V100-32GB") is GPUS["v100-32gb"]
    with pytest.raises(UserError, match=r"--gpu h900: known are 8gb, .*a100-80gb"):
        find_gpu("h900")


def test_more_than_one_rank_takes_nccl_too():
    assert context_bytes(1) == CONTEXT_BYTES < context_bytes(2) == context_bytes(8)
