"""What ``--device`` and ``--dtype`` mean, with a GPU and without."""

from __future__ import annotations

import pytest
import torch

from rdtf_ds.errors import UserError
from rdtf_ds.models.devices import DTYPES, choose_device


@pytest.mark.parametrize(
    ("gpu", "asked", "chosen"),
    [
        (True, ("auto", "auto"), ("cuda", "float16")),
        (True, ("cuda", "bfloat16"), ("cuda", "bfloat16")),
        (True, ("cpu", "auto"), ("cpu", "float32")),
        (False, ("auto", "auto"), ("cpu", "float32")),
        (False, ("auto", "float16"), ("cpu", "float16")),
        (False, ("cpu", "bfloat16"), ("cpu", "bfloat16")),
    ],
)
def test_what_was_asked_is_taken_and_auto_goes_by_the_machine(monkeypatch, gpu, asked, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert choose_device(*asked) == chosen and chosen[1] in DTYPES


@pytest.mark.parametrize("dtype", ["auto", *DTYPES])
def test_a_gpu_that_is_not_there_is_refused(monkeypatch, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: torch sees no GPU here.*tools/doctor.py.*--device cpu"):
        choose_device("cuda", dtype)


def test_the_names_are_torchs():
    assert {name: f"torch.{name}" for name in DTYPES} == {name: str(dtype) for name, dtype in DTYPES.items()}
