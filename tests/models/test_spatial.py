"""The spatial layers against diffusers', which they take the place of: values, gradients, and the memory layout they keep."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from einops import repeat
from torch import nn

from rdtf_ds.models.spatial import Resnet, SpatialTransformer
from tests.models.test_dfgn import inputs, tiny

CLIPS, FRAMES, WIDTH, SIDE = 2, 3, 16, 4


def gradients_of(result: torch.Tensor, wanted: list[torch.Tensor]) -> list[torch.Tensor]:
    ramp = torch.linspace(-1, 1, result.numel()).view(result.shape)
    return list(torch.autograd.grad((result * ramp).sum(), wanted))


def assert_same(layers: tuple[nn.Module, nn.Module], results: tuple[torch.Tensor, torch.Tensor], **inputs: torch.Tensor) -> None:
    """Two layers of the same parameters: what they answer, and the gradients of inputs and parameters, each by its name."""
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)
    wanted = [[*inputs.values(), *layer.parameters()] for layer in layers]
    names = [*inputs, *(name for name, _ in layers[0].named_parameters())]
    for name, own, other in zip(names, *map(gradients_of, results, wanted), strict=True):
        torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("width", [16, 24])
def test_resnet_is_diffusers(width: int) -> None:
    torch.manual_seed(0)
    ours = Resnet(WIDTH, width, temb_width=12, norm_groups=8)
    theirs = ResnetBlock2D(in_channels=WIDTH, out_channels=width, temb_channels=12, groups=8, eps=1e-5)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    hidden, temb = torch.randn(CLIPS * FRAMES, WIDTH, SIDE, SIDE, requires_grad=True), torch.randn(CLIPS, 12, requires_grad=True)
    results = ours(hidden, temb), theirs(hidden, repeat(temb, "b t -> (b f) t", f=FRAMES))
    assert_same((ours, theirs), results, hidden=hidden, temb=temb)


def test_transformer_is_diffusers_with_the_text_of_its_clip_for_every_frame() -> None:
    torch.manual_seed(0)
    ours = SpatialTransformer(WIDTH, head_channels=8, context_dim=20, norm_groups=8)
    theirs = Transformer2DModel(2, 8, WIDTH, num_layers=1, cross_attention_dim=20, norm_num_groups=8, use_linear_projection=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    hidden, context = torch.randn(CLIPS * FRAMES, WIDTH, SIDE, SIDE, requires_grad=True), torch.randn(CLIPS, 5, 20, requires_grad=True)
    repeated = repeat(context, "b l d -> (b f) l d", f=FRAMES)
    results = ours(hidden, context), theirs(hidden, encoder_hidden_states=repeated, return_dict=False)[0]
    assert_same((ours, theirs), results, hidden=hidden, context=context)


def test_keys_of_the_text_are_made_once_for_each_clip() -> None:
    layer = SpatialTransformer(WIDTH, head_channels=8, context_dim=20, norm_groups=8)
    seen = []
    for project in (layer.transformer_blocks[0].attn2.to_k, layer.transformer_blocks[0].attn2.to_v):
        project.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    layer(torch.randn(CLIPS * FRAMES, WIDTH, SIDE, SIDE), torch.randn(CLIPS, 5, 20))
    assert seen == [(CLIPS, 5, WIDTH)] * 2


@pytest.mark.parametrize("training", [True, False])
def test_nothing_leaves_channels_last(training: bool) -> None:
    """Of the whole network: every picture that goes into or out of a module, or it would be copied at the next convolution."""
    model = tiny(block_out_channels=(16, 32, 32), attention_levels=(True, True, False)).train(training)
    model.to(memory_format=torch.channels_last)
    strayed, seen = [], []

    def look(module: torch.nn.Module, inputs: tuple, output: object) -> None:
        for tensor in (inputs[0] if inputs else None, output):
            # Tokens of the fusion's gate have four dimensions too, channels last of them.
            if isinstance(tensor, torch.Tensor) and tensor.ndim == 4 and not isinstance(module, torch.nn.Linear):
                seen.append(tensor.shape)
                if not tensor.is_contiguous(memory_format=torch.channels_last):
                    strayed.append((type(module).__name__, tuple(tensor.shape), tensor.stride()))

    for module in model.modules():
        module.register_forward_hook(look)
    model(*inputs())
    assert len(seen) > 100 and not strayed
