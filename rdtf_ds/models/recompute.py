"""What backward computes again instead of keeping: torch's non-reentrant checkpointing of one unit at a time, by mode.

``none``                 everything is kept
``selective``            each unit runs again in backward, but the results that are dear are kept and taken as they are
``blocks``               each unit runs again, of its forward pass only its input is kept
``blocks_cpu_offload``   the same, and the input waits in CPU memory

What is dear is decided for each operation by one number: the multiply-adds that one element of its result took. That is time per byte,
the price of memory. A 3 × 3 convolution over 1280 channels took 11,520 for each, a linear layer over 320 only 320, a norm or an
activation none; so a bound on this number keeps the results that save the most time in the least memory first. docs/benchmarks.md has
the curve of which `keep_from` is one point.

Legend: C channels, L tokens that are looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

MODES = ("none", "selective", "blocks", "blocks_cpu_offload")

_aten = torch.ops.aten
# Attention as torch's dispatcher sees it, and the dimension of the key that counts tokens; xformers calls the last one.
_KEY_TOKENS = {
    _aten._scaled_dot_product_flash_attention_for_cpu: 2,
    _aten._scaled_dot_product_flash_attention: 2,
    _aten._scaled_dot_product_efficient_attention: 2,
    _aten._scaled_dot_product_cudnn_attention: 2,
    _aten._efficient_attention_forward: 1,
}


def run_unit(mode: str, keep_from: int, unit: Callable[..., Tensor], *args: object) -> Tensor:
    """``unit(*args)``, with a backward pass that computes again what ``mode`` says; values and gradients are the same to the bit.

    Args:
        mode: One of :data:`MODES`.
        keep_from: Of ``selective``: results whose elements took so many multiply-adds or more are kept.
        unit: Draws no random numbers, so no generator's state is kept for its second run.
    """
    if mode == "none" or not torch.is_grad_enabled():
        return unit(*args)
    again: Callable[..., Tensor] = partial(checkpoint, unit, *args, use_reentrant=False, preserve_rng_state=False)
    if mode == "selective":
        return again(context_fn=partial(create_selective_checkpoint_contexts, partial(_policy, keep_from)))
    with save_on_cpu(pin_memory=torch.cuda.is_available()) if mode == "blocks_cpu_offload" else nullcontext():
        return again()


def _policy(keep_from: int, context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = multiply_adds_per_element(operation, args) >= keep_from
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def multiply_adds_per_element(operation: Any, args: tuple[Any, ...]) -> int:
    """How many multiply-adds one element of the operation's result took; 0 for what multiplies no matrices.

    Args:
        operation: An operator as torch's dispatcher hands it to a mode.
        args: It is called on.
    """
    kind = operation.overloadpacket
    if kind is _aten.convolution:
        return int(args[1][0].numel())  # of one output channel's kernel: C / groups, height, width
    if kind is _aten.mm or kind is _aten.bmm:
        return int(args[0].shape[-1])
    if kind is _aten.addmm or kind is _aten.baddbmm:
        return int(args[1].shape[-1])
    if kind in _KEY_TOKENS:
        return 2 * int(args[1].shape[_KEY_TOKENS[kind]])  # L for the scores of a query, L for the sum of values, over as many channels
    return 0
