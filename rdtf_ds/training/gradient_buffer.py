"""One buffer of gradients in place of DeepSpeed's two.

ZeRO-2 sums the gradients of a step's micro-batches in a buffer of this rank's part. With more than one micro-batch DeepSpeed (0.19.8)
makes a second buffer of that size for each of them, and joins a group's gradients in yet another copy before it steps. It has a
leaner way, one flat buffer for each group into which a micro-batch is added, but takes it only to sum in fp32 what was computed in
less. The adapter here makes it take that way always. It lives on one optimizer, replaces three of its methods, imports no deepspeed,
and refuses a DeepSpeed that no longer has what it stands on.

What is added is what DeepSpeed would add, in its order and precision, so no number changes.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

_METHODS = {
    "_use_compact_grad_partition_buffer": ["group_idx"],
    "_get_compact_grad_partition_slice": ["group_idx", "partition_id", "param_id", "num_elements"],
    "_get_compact_grad_partition_buffer": ["group_idx"],
    "_get_preflattened_grad_partition": ["group_idx"],
    "copy_grads_in_partition": ["param", "group_idx"],
    "clear_grad_attribute": ["param"],
    "get_param_id": ["param"],
}
"""DeepSpeed's methods that are replaced, called or relied upon, and their parameters."""
_DATA = ("averaged_gradients", "all_grad_tensors", "grad_start_offset", "grad_partition_insertion_offset", "partition_size")
_BEFORE_THE_FIRST = -1
"""DeepSpeed's ``micro_step_id`` when a step has begun and none of its micro-batches has."""


def use_one_buffer(optimizer: Any) -> None:
    """Let a ZeRO-2 optimizer of DeepSpeed's sum gradients in one buffer for each group; call it before the first backward.

    Args:
        optimizer: ``engine.optimizer`` after ``deepspeed.initialize``, its gradients contiguous and not offloaded.

    Raises:
        RuntimeError: DeepSpeed has changed and lacks what this stands on, or the optimizer is of another kind.
    """
    for name, parameters in _METHODS.items():
        method = getattr(optimizer, name, None)
        if not callable(method) or list(inspect.signature(method).parameters) != parameters:
            raise RuntimeError(f"DeepSpeed's ZeRO optimizer has no {name}({', '.join(parameters)}): use_one_buffer must be written anew.")
    missing = [name for name in _DATA if not hasattr(optimizer, name)]
    if missing:
        raise RuntimeError(f"DeepSpeed's ZeRO optimizer has no {missing[0]}: use_one_buffer must be written anew.")
    if optimizer.cpu_offload or not optimizer.contiguous_gradients:
        raise RuntimeError("One buffer of gradients is for ZeRO-2 with contiguous gradients that stay on the device.")
    optimizer._use_compact_grad_partition_buffer = lambda group_idx: True
    takes_reduced_buckets = optimizer.gradient_accumulation_dtype == optimizer.dtype
    if takes_reduced_buckets:
        # DeepSpeed would add piece by piece while it reduces, from a joined copy of the bucket, so as to keep what a sum over ranks in
        # fp32 has more than the bucket holds. The sum is no wider than the bucket here, so we add from the bucket itself, below.
        optimizer._get_compact_grad_partition_slice = lambda group_idx, partition_id, param_id, num_elements: None

    def add_and_let_go(param: Tensor, group_idx: int) -> None:
        """Called for each of this rank's parameters once its gradient is the mean over ranks."""
        if takes_reduced_buckets:
            output, source = _own_parts(optimizer, param, group_idx)
            output.add_(source)
        # One larger than a bucket lies in memory of its own, and would stay until the end of the backward pass. It may be in use still.
        if optimizer.reduction_stream is not None and optimizer.overlap_comm:
            param.grad.record_stream(optimizer.reduction_stream)  # type: ignore[union-attr]
        optimizer.clear_grad_attribute(param)

    optimizer.copy_grads_in_partition = add_and_let_go


def _own_parts(optimizer: Any, param: Tensor, group_idx: int) -> tuple[Tensor, Tensor]:
    """Where in this rank's buffer a parameter's gradient goes, and the part of the gradient that goes there."""
    rank = torch.distributed.get_rank(optimizer.real_dp_process_group[group_idx])
    number = optimizer.get_param_id(param)
    start = int(optimizer.grad_start_offset[group_idx][rank][number])
    place = int(optimizer.grad_partition_insertion_offset[group_idx][rank][number])
    length = min(param.numel() - start, int(optimizer.partition_size[group_idx]) - place)
    flat: Tensor = optimizer._get_compact_grad_partition_buffer(group_idx).flat_partition
    assert param.grad is not None
    return flat[place : place + length], param.grad.view(-1)[start : start + length]


def forget_gradients(optimizer: Any) -> None:
    """Drop what was summed of a step that is not finished; DeepSpeed would add the next step's gradients to it."""
    for sums in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
        for group in sums:
            sums[group] = None
    if optimizer.cpu_offload:
        optimizer.reset_cpu_buffers()
        optimizer._offload_accumulated_param_ids.clear()
    optimizer.micro_step_id = _BEFORE_THE_FIRST
