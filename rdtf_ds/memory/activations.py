"""How many bytes a network keeps alive while it runs, found by running it on tensors that have shapes and no data.

PyTorch's fake tensors go through every operation of forward and backward, recomputation included, and a dispatch mode sees each storage
come and go. So nothing about a layer is written down twice: a change of DFGN changes its prediction. The full network takes seconds.

What a kernel takes for itself (cuDNN's and cuBLAS' workspaces, a library's reordered weights) is no tensor and is not seen.

Legend: B clips, F frames, C channels, h w latent size, L text tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rdtf_ds.models.dfgn import DFGN
from rdtf_ds.models.text_conditioning import TextFeatures


@dataclass(frozen=True)
class GradientArrival:
    """One parameter's gradient, complete.

    Attributes:
        elements: Of the parameter.
        peak: Bytes alive at most since the gradient before it came, this gradient among them.
        live: Bytes alive when it came, this gradient among them.
    """

    elements: int
    peak: int
    live: int


@dataclass(frozen=True)
class TrainingTrace:
    """Bytes beyond weights and inputs of one forward and backward pass, without the gradients that arrived before.

    Attributes:
        saved: What forward leaves for backward, the prediction among it.
        forward_peak: At most, while forward runs.
        arrivals: Gradients in the order in which backward completes them.
        backward_tail: At most, after the last gradient came.
    """

    saved: int
    forward_peak: int
    arrivals: tuple[GradientArrival, ...]
    backward_tail: int


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's modes are not typed
    """Counts the bytes of the storages that operations make, for as long as anything holds them.

    Args:
        known: Weights and inputs: tensors whose storages are not counted, and whatever else stands among them.
    """

    def __init__(self, known: Iterable[Any] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._counted: dict[int, int] = {}
        # Held, so that no other storage takes the place of one of theirs.
        self._known = [tensor for tensor in known if isinstance(tensor, Tensor)]
        self._ignored = {tensor.untyped_storage()._cdata for tensor in self._known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self._count(leaf.untyped_storage())
        return made

    def restart_peak(self) -> None:
        """Forget all peaks but the present."""
        self.peak = self.now

    def _count(self, storage: torch.UntypedStorage) -> None:
        place = storage._cdata
        if place in self._counted or place in self._ignored:
            return
        self._counted[place] = size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, place)

    def _forget(self, place: int) -> None:
        self.now -= self._counted.pop(place)


def trace_training(network: nn.Module, run: Callable[[], Tensor], inputs: Iterable[Any]) -> TrainingTrace:
    """Follow one forward and backward pass; works on fake and on real tensors.

    Each gradient is let go as soon as it is complete, as DeepSpeed does once it lies in a bucket: buckets are the planner's.

    Args:
        network: Its trainable parameters get their gradients watched.
        run: Calls the network on ``inputs``; the mean square of what it gives is differentiated.
    """
    arrivals: list[GradientArrival] = []
    live = LiveBytes([*network.parameters(), *network.buffers(), *inputs])

    def arrived(parameter: Tensor) -> None:
        arrivals.append(GradientArrival(parameter.numel(), live.peak, live.now))
        parameter.grad = None
        live.restart_peak()

    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(arrived) for parameter in trained]  # type: ignore[no-untyped-call]
    try:
        with live:
            predicted = run()
            saved, forward_peak = live.now, live.peak
            live.restart_peak()
            loss = predicted.float().pow(2).mean()
            del predicted
            loss.backward()  # type: ignore[no-untyped-call]
            return TrainingTrace(saved, forward_peak, tuple(arrivals), live.peak)
    finally:
        for hook in hooks:
            hook.remove()


def trace_inference(network: nn.Module, run: Callable[[], object], inputs: Iterable[Any]) -> int:
    """Bytes beyond weights and inputs that ``run`` has alive at most, without graph."""
    live = LiveBytes([*network.parameters(), *network.buffers(), *inputs])
    with live, torch.no_grad():
        run()
    return live.peak


@contextmanager
def without_data(dtype: torch.dtype) -> Iterator[None]:
    """Tensors made inside have shapes only, floating ones in ``dtype`` unless they say otherwise: a built model cannot be cast."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode():
            yield
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class ClipShape:
    """What DFGN is called on: frames F, latent side, text tokens L, and the widths of both text features."""

    frames: int
    side: int
    text_length: int
    clip_dim: int
    t5_dim: int


class DFGNTracer:
    """Traces of one DFGN at any micro-batch, remembered.

    Args:
        build: Makes the network; called where tensors have no data and floats are ``dtype``. Its attention must not be xformers', which
            has no operator without a GPU; ``sdpa`` keeps the same: queries, keys, values, the result and one number for each query.
        shape: Of its inputs.
        dtype: It computes in.
    """

    def __init__(self, build: Callable[[], DFGN], shape: ClipShape, dtype: torch.dtype) -> None:
        self._shape, self._dtype = shape, dtype
        self._build = build
        self.training = cache(self._training)
        self.sampling = cache(self._sampling)

    def _training(self, checkpointing: str, clips: int) -> TrainingTrace:
        with without_data(self._dtype):
            network, arguments = self._prepared(clips, padded=clips > 1)
            network.set_activation_checkpointing(checkpointing)
            return trace_training(network, lambda: network(*arguments), tree_leaves(arguments))

    def _sampling(self, clips: int) -> int:
        with without_data(self._dtype):
            network, arguments = self._prepared(clips, padded=False)
            return trace_inference(network, lambda: network(*arguments), tree_leaves(arguments))

    def _prepared(self, clips: int, padded: bool) -> tuple[DFGN, tuple[Any, ...]]:
        """The network and its arguments; frames are padded only where clips of different lengths share a micro-batch."""
        shape, network = self._shape, self._build()
        sample = torch.zeros(clips, network.conv_in.in_channels, shape.frames, shape.side, shape.side)
        text = TextFeatures(*(torch.zeros(clips, shape.text_length, width) for width in (shape.clip_dim, shape.t5_dim)))
        mask = torch.ones(clips, shape.frames, dtype=torch.bool) if padded else None
        return network, (sample, torch.zeros(clips, dtype=torch.int64), text, mask)
