"""STI against a reference written with plain loops and einsum, and the promises its docstring makes."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from rdtf_ds.models.sti import STILayer, TemporalConvLayer, default_gamma

B, F, C, SIDE = 2, 5, 16, 4


def randomised(layer: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return layer


def sti(gamma: int | None = 2) -> STILayer:
    return randomised(STILayer(C, norm_groups=4, heads=2, head_dim=8, gamma=gamma, attention_backend="sdpa"))


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.randn(B * F, C, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def reference_sti(layer: STILayer, hidden: torch.Tensor, frames: int, gamma: int) -> torch.Tensor:
    """The layer as the paper tells it, clip by clip, one token and one frame at a time."""
    weights = layer.state_dict()
    out = []
    for clip in hidden.view(-1, frames, *hidden.shape[1:]):
        normed = torch.stack([functional.group_norm(x[None], 4, weights["norm.weight"], weights["norm.bias"], 1e-5)[0] for x in clip])
        half = C // 2
        for f in range(frames):
            angles = torch.tensor([7 * f / (frames - 1) * math.exp(-math.log(10_000) * i / half) for i in range(half)])
            normed[f] += torch.cat([angles.sin(), angles.cos()])[:, None, None]
        side = normed.shape[-1] // gamma
        coarse = normed.unfold(2, gamma, gamma).unfold(3, gamma, gamma).mean((-1, -2))

        tokens = torch.stack([coarse[f, :, y, x] for f in range(frames) for y in range(side) for x in range(side)])
        q, k, v = (torch.einsum("lc,dc->ld", tokens, weights[f"semantic.to_{n}.weight"]) for n in "qkv")
        heads = []
        for g in range(2):
            part = slice(8 * g, 8 * g + 8)
            attended = (torch.einsum("ld,md->lm", q[:, part], k[:, part]) / math.sqrt(8)).softmax(-1)
            heads.append(torch.einsum("lm,md->ld", attended, v[:, part]))
        mixed = torch.cat(heads, -1) @ weights["semantic.to_out.weight"].T + weights["semantic.to_out.bias"]
        semantic = torch.empty_like(normed)
        for f in range(frames):
            for y in range(normed.shape[-2]):
                for x in range(normed.shape[-1]):
                    semantic[f, :, y, x] = mixed[f * side * side + (y // gamma) * side + x // gamma]

        def along_frames(x: torch.Tensor, name: str) -> torch.Tensor:
            kernel, bias = weights[f"detail.{name}.weight"][..., 0], weights[f"detail.{name}.bias"]
            result = bias[None, :, None, None].repeat(frames, 1, *x.shape[-2:])
            for f in range(frames):
                for tap, source in enumerate((f - 1, f, f + 1)):
                    if 0 <= source < frames:
                        result[f] += torch.einsum("oc,chw->ohw", kernel[:, :, tap], x[source])
            return result

        detail = along_frames(functional.silu(along_frames(normed, "first")), "second")

        semantic, detail = (functional.group_norm(x, 4, eps=1e-5) for x in (semantic, detail))
        logits = torch.einsum("fchw,tc->fthw", torch.cat([semantic, detail], 1), weights["fusion.gate.weight"])
        gate = (logits + weights["fusion.gate.bias"][None, :, None, None]).softmax(1)
        names = ("semantic_scale", "semantic_bias", "detail_scale", "detail_bias")
        affine = {name: weights[f"fusion.{name}"][None, :, None, None] for name in names}
        fused = gate[:, :1] * (semantic * affine["semantic_scale"] + affine["semantic_bias"])
        fused = fused + gate[:, 1:] * (detail * affine["detail_scale"] + affine["detail_bias"])
        out.append(clip + fused)
    return torch.cat(out)


@pytest.mark.parametrize("gamma", [1, 2, 4])
def test_sti_equals_the_einsum_reference(hidden: torch.Tensor, gamma: int) -> None:
    layer = sti(gamma)
    torch.testing.assert_close(layer(hidden, F), reference_sti(layer, hidden, F, gamma), atol=2e-5, rtol=1e-4)


def test_gamma_changes_what_is_attended_to(hidden: torch.Tensor) -> None:
    assert not torch.allclose(sti(1)(hidden, F), sti(2)(hidden, F), atol=1e-3)


def test_default_gamma_is_two_from_side_sixteen_on() -> None:
    assert [default_gamma(side) for side in (4, 8, 15, 16, 32)] == [1, 1, 1, 2, 2]
    wide = torch.randn(F, C, 16, 16)
    torch.testing.assert_close(sti(None)(wide, F), sti(2)(wide, F))


@pytest.mark.parametrize("layer", [STILayer(C, 4, 2, 8), TemporalConvLayer(C, 4)])
def test_layers_start_as_the_identity_and_can_leave_it(hidden: torch.Tensor, layer: torch.nn.Module) -> None:
    assert torch.equal(layer(hidden, F), hidden)
    layer(hidden, F).square().sum().backward()
    silent = dict(layer.named_parameters())
    for name in layer.zero_initialised():
        assert not silent[name].any() and silent[name].grad.any(), name


@pytest.mark.parametrize("layer", [sti(2), sti(1), randomised(TemporalConvLayer(C, 4))], ids=["γ=2", "γ=1", "conv3d"])
def test_padded_frames_are_as_good_as_absent(hidden: torch.Tensor, layer: torch.nn.Module) -> None:
    """What stands in the padding must not matter, and the rest must equal the clip cut short: values and gradients."""
    real = 3
    frame_mask = torch.arange(F)[None].repeat(B, 1) < real
    clips = hidden.view(B, F, C, SIDE, SIDE)
    short = clips[:, :real].reshape(B * real, C, SIDE, SIDE).clone().requires_grad_()
    padded = clips.clone()
    padded[:, real:] = 100.0
    padded = padded.reshape(B * F, C, SIDE, SIDE).requires_grad_()

    cut = layer(short, real)
    kept = layer(padded, F, frame_mask).view(B, F, C, SIDE, SIDE)[:, :real]
    torch.testing.assert_close(kept, cut.view(B, real, C, SIDE, SIDE), atol=1e-5, rtol=1e-5)

    cut.square().sum().backward()
    kept.square().sum().backward()
    grad = padded.grad.view(B, F, C, SIDE, SIDE)
    torch.testing.assert_close(grad[:, :real], short.grad.view(B, real, C, SIDE, SIDE), atol=1e-4, rtol=1e-4)
    assert not grad[:, real:].any()


@pytest.mark.parametrize("branch", ["semantic", "detail"])
def test_frames_know_where_they_stand(branch: str) -> None:
    """Five equal frames leave each branch as five different ones."""
    layer = sti(2)
    seen = {}
    getattr(layer, branch).register_forward_hook(lambda module, inputs, output: seen.update(frames=output))
    layer(torch.randn(1, C, SIDE, SIDE).repeat(F, 1, 1, 1), F)
    middle = seen["frames"][1:-1]  # the borders differ by the convolutions' padding anyway
    assert (middle[0] - middle[1]).abs().max() > 1e-3 and (middle[1] - middle[2]).abs().max() > 1e-3


def test_gamma_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="γ = 2 does not divide a latent level of 5×4"):
        sti(2)(torch.randn(F, C, 5, 4), F)
