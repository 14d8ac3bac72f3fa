"""The project's only source of randomness: seeds derived by name, so that nothing random has to be saved or synchronised.

A draw is named by what it is for, e.g. ``(run seed, sample number, "noise")``. Any process on any machine that knows the name
draws the same; a resumed, moved or resized run therefore repeats no state of a generator.
"""

from __future__ import annotations

import hashlib
import operator

import numpy as np
import torch

_SEED_BITS = 63  # torch.Generator takes a signed 64-bit seed


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^63) from the parts' values, types, order and borders: ``(1, "2")``, ``("1", 2)`` and ``(12,)`` all differ.

    Raises:
        TypeError: a part is neither an integer (NumPy's included) nor a string.
        ValueError: no parts.
    """
    if not parts:
        raise ValueError("derive_seed needs at least one part: a seed from nothing would be shared by every caller")
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        tag, text = ("s", part) if isinstance(part, str) else ("i", str(operator.index(part)))
        encoded = text.encode()
        digest.update(f"{tag}{len(encoded)}:".encode() + encoded)  # the length makes joining unambiguous
    return int.from_bytes(digest.digest(), "little") >> (64 - _SEED_BITS)


def numpy_generator(*parts: int | str) -> np.random.Generator:
    """A NumPy generator seeded by :func:`derive_seed`; PCG64 by name, as NumPy may change its default."""
    return np.random.Generator(np.random.PCG64(derive_seed(*parts)))


def torch_generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by :func:`derive_seed`: draws do not depend on the device that uses them."""
    return torch.Generator(device="cpu").manual_seed(derive_seed(*parts))
