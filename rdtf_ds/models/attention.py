"""One attention function, three backends.

``xformers`` runs its memory-efficient kernels (CUDA only; on sm_70 they dispatch to torch's cutlass kernel), ``sdpa`` is
:func:`torch.nn.functional.scaled_dot_product_attention` and runs anywhere, ``math`` is the written-out reference the other two
are tested against. ``auto`` picks once per process; a run says at its start what was picked.

Legend: B batch, G heads, L tokens, D head width.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from rdtf_ds.errors import UserError

logger = logging.getLogger(__name__)

BACKENDS = ("xformers", "sdpa", "math")

# The memory-efficient kernels read the bias in aligned rows of this many elements.
_BIAS_ALIGNMENT = 8


class AttentionBackendError(UserError):
    """The backend that was asked for cannot run here; the message says why."""


@cache
def resolve_backend(name: str, device_type: str) -> str:
    """Names the backend that will run.

    Args:
        name: ``auto`` or one of :data:`BACKENDS`.
        device_type: ``cuda`` or ``cpu``.

    Raises:
        AttentionBackendError: an unknown backend, or one that cannot run on this device.
    """
    if name not in ("auto", *BACKENDS):
        raise AttentionBackendError(f"rdtf.model.attention_backend is {name!r}; choose one of auto, {', '.join(BACKENDS)}.")
    obstacle = _xformers_obstacle(device_type)
    if name == "xformers" and obstacle:
        raise AttentionBackendError(f"rdtf.model.attention_backend is 'xformers', but {obstacle}; use 'auto' or 'sdpa'.")
    chosen = name
    if name == "auto":
        chosen = "sdpa" if obstacle else "xformers"
    reason = f" ({obstacle})" if name == "auto" and obstacle else ""
    logger.info("STI attention runs on %s%s", chosen, reason)
    return chosen


def _xformers_obstacle(device_type: str) -> str | None:
    if device_type != "cuda":
        return f"xformers has no attention kernel for {device_type}"
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed (pip install xformers)"
    return None


def attention(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Softmax attention, scaled by 1/sqrt(D).

    Args:
        query, key, value: (B, G, L, D), one dtype.
        key_mask: (B, L) bool, False for keys nobody may look at; None when all may be looked at.
        backend: ``auto`` or one of :data:`BACKENDS`.

    Returns:
        (B, G, L, D).

    Raises:
        AttentionBackendError: the backend cannot run on the tensors' device.
    """
    run = {"xformers": _xformers_attention, "sdpa": _sdpa_attention, "math": _math_attention}
    return run[resolve_backend(backend, query.device.type)](query, key, value, key_mask)


def _sdpa_attention(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    mask = None if key_mask is None else key_mask[:, None, None, :]
    return scaled_dot_product_attention(query, key, value, attn_mask=mask)


def _math_attention(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    scores = torch.einsum("bgld,bgmd->bglm", query.float(), key.float()) * query.shape[-1] ** -0.5
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], float("-inf"))
    return torch.einsum("bglm,bgmd->bgld", scores.softmax(dim=-1), value.float()).to(query.dtype)


def _xformers_attention(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    from xformers.ops import memory_efficient_attention

    # xformers keeps heads behind tokens: (B, L, G, D).
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    bias = None if key_mask is None else _aligned_bias(key_mask, heads=query.shape[2], queries=query.shape[1], dtype=query.dtype)
    return memory_efficient_attention(query, key, value, attn_bias=bias).transpose(1, 2)


def _aligned_bias(key_mask: Tensor, heads: int, queries: int, dtype: torch.dtype) -> Tensor:
    """(B, L) key mask -> (B, G, L, L) additive bias, a view on rows whose stride is a multiple of 8."""
    batch, tokens = key_mask.shape
    bias = torch.zeros(batch, tokens, dtype=dtype, device=key_mask.device).masked_fill(~key_mask, float("-inf"))
    aligned = pad(bias, (0, -tokens % _BIAS_ALIGNMENT))
    return aligned[:, None, None, :].expand(batch, heads, queries, -1)[..., :tokens]
