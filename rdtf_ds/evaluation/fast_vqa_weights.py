"""The weights of FAST-VQA-B, and what to say when a file is not that."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rdtf_ds.errors import UserError
from rdtf_ds.wording import counted

FILE = "FAST_VQA_B_1_4.pth"
SOURCE = "release v2.0.0 of the FAST-VQA project, https://github.com/VQAssessment/FAST-VQA-and-FasterVQA/releases/tag/v2.0.0"
_MEGABYTES = 127
REMEDY = f"The file is {FILE} (about {_MEGABYTES} MB) from {SOURCE}: download it, and name it."
"""Where the weights come from, for people who have none."""
_scalar = np.float64(0).__reduce__()[0]  # what a pickled number of numpy names, wherever this numpy keeps it
# The project saves its correlations, numbers of numpy, beside the weights.
_NUMBERS: list[Any] = [
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    np.dtypes.Float32DType,
    np.dtypes.Float64DType,
]


def load_weights(network: nn.Module, path: Path) -> None:
    """Fill FAST-VQA-B's network with the weights of ``FAST_VQA_B_1_4.pth``.

    Raises:
        UserError: There is no such file, it cannot be read, holds more than tensors and numbers, or the tensors of another network.
    """
    if not path.is_file():
        raise UserError(f"VQA needs the weights of FAST-VQA-B, and there is no file '{path}'. {REMEDY}")
    given, expected = _tensors(path), network.state_dict()
    if flaw := _flaw(given, expected):
        raise UserError(f"'{path}' does not hold the weights of FAST-VQA-B: {flaw}. {REMEDY}")
    network.load_state_dict(given)


def _tensors(path: Path) -> dict[str, Tensor]:
    """Of the file's ``state_dict``, without the constants that networks of the project save along."""
    try:
        with torch.serialization.safe_globals(_NUMBERS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler meets torn bytes with errors of every kind, IndexError among them
        # An UnpicklingError's own words advise loading without the check, which runs whatever the file says.
        words = "it holds more than tensors and numbers, or is cut short" if isinstance(error, UnpicklingError) else str(error)
        told = f"{type(error).__name__}: {words.partition(chr(10))[0]}"
        raise UserError(f"'{path}' cannot be read as weights of FAST-VQA-B ({told}). {REMEDY}") from error
    state: Any = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        raise UserError(f"'{path}' does not hold the weights of FAST-VQA-B: there is no 'state_dict' in it. {REMEDY}")
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and not name.endswith(".relative_position_index")}


def _flaw(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """The first thing that is wrong with the tensors given, and how many more are."""
    missing = [name for name in expected if name not in given]
    if missing:
        return f"it lacks {counted(len(missing), 'tensor')} of {len(expected)}, such as '{missing[0]}'"
    for name, wanted in expected.items():
        if given[name].shape != wanted.shape:
            return f"'{name}' is {tuple(given[name].shape)}, not {tuple(wanted.shape)}"
        if not given[name].is_floating_point() or not given[name].isfinite().all():
            return f"'{name}' has values that are no finite numbers"
    if foreign := [name for name in given if name not in expected]:
        return f"it has {counted(len(foreign), 'tensor')} of another network, such as '{foreign[0]}'"
    return None
