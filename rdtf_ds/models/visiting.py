"""A frozen module whose weights wait in CPU memory and are on the device for the time of one pass."""

from __future__ import annotations

from itertools import chain
from types import TracebackType

import torch
from torch import Tensor, nn


class Visitor:
    """Context in which a module's weights are on the device; outside of it they lie in CPU memory and take none of the device's.

    The weights in CPU memory stay where they are, so that nothing is copied back: what was on the device is let go. An error in the
    middle leaves them on the CPU too. Contexts of one visitor do not nest.

    Args:
        module: Frozen; moved to the CPU.
        device: Where it computes. For a GPU the memory it waits in is page-locked, which makes the way there several times faster.

    Raises:
        ValueError: ``module`` has parameters to train, whose changes would be lost.
    """

    def __init__(self, module: nn.Module, device: torch.device | str) -> None:
        if any(parameter.requires_grad for parameter in module.parameters()):
            raise ValueError(f"{type(module).__name__} is not frozen: what it learns while visiting would be lost")
        self.device = torch.device(device)
        self._tensors: list[Tensor] = list(chain(module.to("cpu").parameters(), module.buffers()))
        self._homes: list[Tensor] = []
        for tensor in self._tensors:
            # One after the other: the memory a weight leaves is free before the next is locked.
            if self.device.type == "cuda":
                tensor.data = tensor.data.pin_memory()
            self._homes.append(tensor.data)
        self._away = False

    def __enter__(self) -> None:
        if self._away:
            raise RuntimeError("the module is on the device already")
        self._away = True
        try:
            for tensor, home in zip(self._tensors, self._homes, strict=True):
                tensor.data = _brought(home, self.device)
        except BaseException:  # no room for all of it
            self._go_home()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._go_home()

    def _go_home(self) -> None:
        for tensor, home in zip(self._tensors, self._homes, strict=True):
            tensor.data = home
        self._away = False


def _brought(home: Tensor, device: torch.device) -> Tensor:
    return home.to(device, non_blocking=True)
