"""The backends agree with plain softmax attention, and the choice between them is honest."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from rdtf_ds.models import attention as module
from rdtf_ds.models.attention import AttentionBackendError, attention, resolve_backend


@pytest.fixture
def tensors() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(2, 4, 13, 8, generator=generator) for _ in range(3))
    key_mask = torch.ones(2, 13, dtype=torch.bool)
    key_mask[1, 9:] = False
    return query, key, value, key_mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_backends_equal_loops_over_queries(tensors, backend: str, masked: bool) -> None:
    query, key, value, key_mask = tensors
    result = attention(query, key, value, key_mask if masked else None, backend)
    for b in range(2):
        visible = key_mask[b] if masked else torch.ones(13, dtype=torch.bool)
        for g in range(4):
            scores = query[b, g] @ key[b, g, visible].T / 8**0.5
            torch.testing.assert_close(result[b, g], scores.softmax(-1) @ value[b, g, visible])


def test_auto_is_sdpa_without_cuda_and_xformers_with_it() -> None:
    assert resolve_backend("auto", "cpu") == "sdpa"
    assert resolve_backend("auto", "cuda") == "xformers"


def test_auto_without_xformers_says_why(monkeypatch, caplog) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    resolve_backend.cache_clear()
    try:
        with caplog.at_level("INFO"):
            assert resolve_backend("auto", "cuda") == "sdpa"
        assert "not installed" in caplog.text
    finally:
        resolve_backend.cache_clear()


def test_a_backend_that_cannot_run_is_an_error_that_says_why(tensors) -> None:
    query, key, value, _ = tensors
    with pytest.raises(AttentionBackendError, match="no attention kernel for cpu"):
        attention(query, key, value, backend="xformers")
    with pytest.raises(AttentionBackendError, match="'flash'.*auto, xformers, sdpa, math"):
        resolve_backend("flash", "cpu")


def test_xformers_is_called_in_its_layout_with_an_aligned_bias(tensors, monkeypatch) -> None:
    """xformers has no CPU kernel: a written-out one in xformers' layout stands in for it."""
    query, key, value, key_mask = tensors
    seen = {}

    def reference(q, k, v, attn_bias=None):  # (B, L, G, D), bias (B, G, L, L)
        seen["stride"] = None if attn_bias is None else attn_bias.stride(-2), attn_bias.shape if attn_bias is not None else None
        seen["rows"] = None if attn_bias is None else attn_bias.untyped_storage().nbytes() // attn_bias.element_size() // 2
        scores = torch.einsum("blgd,bmgd->bglm", q, k) / q.shape[-1] ** 0.5
        scores = scores if attn_bias is None else scores + attn_bias
        return torch.einsum("bglm,bmgd->blgd", scores.softmax(-1), v)

    ops = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = reference
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setattr(module, "resolve_backend", lambda name, device: "xformers")
    for mask in (None, key_mask):
        torch.testing.assert_close(attention(query, key, value, mask), module._math_attention(query, key, value, mask))
    assert seen["stride"][1] == (2, 4, 13, 13)
    assert seen["rows"] == 16, "a row of the bias must be padded to a multiple of 8"


def test_xformers_offers_memory_efficient_attention() -> None:
    """The name and the arguments our dispatch leans on exist in the installed xformers."""
    pytest.importorskip("xformers")
    import inspect

    from xformers.ops import memory_efficient_attention

    assert list(inspect.signature(memory_efficient_attention).parameters)[:4] == ["query", "key", "value", "attn_bias"]
