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
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rdtf_ds.models import recompute
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
        host: Of these, bytes that wait in CPU memory at most; they are in none of the others.
    """

    saved: int
    forward_peak: int
    arrivals: tuple[GradientArrival, ...]
    backward_tail: int
    host: int = 0


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's modes are not typed
    """Counts the bytes of the storages that operations make, for as long as anything holds them.

    Args:
        known: Weights and inputs: tensors whose storages are not counted, and whatever else stands among them.
    """

    def __init__(self, known: Iterable[Any] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.host = self.host_peak = 0
        self._counted: dict[int, int] = {}
        self._on_host: set[int] = set()
        self._goes_to_host = False
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

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """What is made inside lies in CPU memory, and is counted apart."""
        self._goes_to_host = True
        try:
            yield
        finally:
            self._goes_to_host = False

    def _count(self, storage: torch.UntypedStorage) -> None:
        place = storage._cdata
        if place in self._counted or place in self._ignored:
            return
        self._counted[place] = size = storage.nbytes()
        if self._goes_to_host:
            self._on_host.add(place)
            self.host += size
            self.host_peak = max(self.host_peak, self.host)
        else:
            self.now += size
            self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, place)

    def _forget(self, place: int) -> None:
        size = self._counted.pop(place)
        if place in self._on_host:
            self._on_host.remove(place)
            self.host -= size
        else:
            self.now -= size


class _ToHost(saved_tensors_hooks):
    """``save_on_cpu`` where device and CPU are the same and it would keep the tensor itself: a copy there, and another when it is back."""

    def __init__(self, live: LiveBytes) -> None:
        def pack(tensor: Tensor) -> Tensor:
            """What autograd keeps in the place of an activation: a copy that counts as CPU memory."""
            with live.on_host():
                return tensor.clone()

        super().__init__(pack, lambda packed: packed.clone())


@contextmanager
def _offload_counted(live: LiveBytes) -> Iterator[None]:
    """Activations that DFGN sends to the CPU are counted as gone from the device."""
    before = recompute.save_on_cpu  # type: ignore[attr-defined]
    recompute.save_on_cpu = lambda pin_memory=False: _ToHost(live)  # type: ignore[attr-defined,assignment,misc]
    try:
        yield
    finally:
        recompute.save_on_cpu = before  # type: ignore[attr-defined]


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
        """Notes a gradient that is complete, lets it go, and begins a new peak."""
        arrivals.append(GradientArrival(parameter.numel(), live.peak, live.now))
        parameter.grad = None
        live.restart_peak()

    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(arrived) for parameter in trained]  # type: ignore[no-untyped-call]
    try:
        with live, _offload_counted(live):
            predicted = run()
            saved, forward_peak = live.now, live.peak
            live.restart_peak()
            loss = predicted.float().pow(2).mean()
            del predicted
            loss.backward()  # type: ignore[no-untyped-call]
            return TrainingTrace(saved, forward_peak, tuple(arrivals), live.peak, live.host_peak)
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
