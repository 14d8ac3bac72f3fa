"""DFGN against Table 6, diffusers' own U-Net, and itself with and without padding."""

from __future__ import annotations

import inspect

import pytest
import torch
from diffusers import UNet2DConditionModel

from rdtf_ds.models.dfgn import DFGN
from rdtf_ds.models.sti import STILayer
from rdtf_ds.models.text_conditioning import TextFeatures

TINY = dict(
    block_out_channels=(16, 32),
    attention_levels=(True, True),
    layers_per_block=1,
    head_channels=8,
    norm_groups=8,
    context_dim=24,
    clip_dim=12,
    t5_dim=20,
    sti_heads=2,
    sti_head_dim=8,
)


def tiny(seed: int = 0, **changes) -> DFGN:
    torch.manual_seed(seed)
    model = DFGN(**{**TINY, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model


def inputs(frames: int = 8, batch: int = 2, side: int = 8) -> tuple[torch.Tensor, torch.Tensor, TextFeatures]:
    generator = torch.Generator().manual_seed(5)
    features = TextFeatures(torch.randn(batch, 7, 12, generator=generator), torch.randn(batch, 7, 20, generator=generator))
    return torch.randn(batch, 8, frames, side, side, generator=generator), torch.tensor([999, 3][:batch]), features


def test_full_model_has_the_parameters_of_table_8() -> None:
    with torch.device("meta"):
        model = DFGN()
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == 955_305_956
    assert round(count / 1e9, 2) == 0.96
    sti = [module for module in model.modules() if isinstance(module, STILayer)]
    assert sorted(layer.norm.num_channels for layer in sti) == [320] * 5 + [640] * 5 + [1280] * 6


def test_defaults_are_table_6() -> None:
    defaults = {name: parameter.default for name, parameter in inspect.signature(DFGN.__init__).parameters.items()}
    assert defaults["in_channels"] == 8 and defaults["out_channels"] == 4
    assert defaults["layers_per_block"] == 2 and defaults["head_channels"] == 64
    assert defaults["context_dim"] == 1024
    assert (defaults["sti_heads"], defaults["sti_head_dim"], defaults["sti_kernel_size"]) == (8, 32, 3)


def spatial_reference(frames_as_images_of: DFGN) -> UNet2DConditionModel:
    config = frames_as_images_of.config
    widths = tuple(config.block_out_channels)
    reference = UNet2DConditionModel(
        sample_size=8,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=widths,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in config.attention_levels),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(config.attention_levels)),
        layers_per_block=config.layers_per_block,
        cross_attention_dim=config.context_dim,
        attention_head_dim=[width // config.head_channels for width in widths],  # diffusers' name for the number of heads
        norm_num_groups=config.norm_groups,
        use_linear_projection=True,
    )
    return reference


@pytest.mark.parametrize("attention_levels", [(True, True, False), (True, False, True)])
def test_spatial_part_is_diffusers_unet(attention_levels: tuple[bool, ...]) -> None:
    """With the temporal layers silent, every frame gets what UNet2DConditionModel gives it, weights loaded by name."""
    model = tiny(block_out_channels=(16, 32, 32), attention_levels=attention_levels, layers_per_block=2)
    reference = spatial_reference(model)
    torch.nn.init.zeros_(model.frame_position_scale)
    ours_alone = (".temporals.", "text_projection", "frame_position_scale")
    own = {name: value for name, value in model.state_dict().items() if not any(part in name for part in ours_alone)}
    reference.load_state_dict(own, strict=True)
    for module in model.modules():
        if isinstance(module, STILayer):
            for name, parameter in module.fusion.named_parameters():
                if name.endswith(("_scale", "_bias")) and not name.startswith("gate"):
                    torch.nn.init.zeros_(parameter)
    sample, timestep, features = inputs(frames=3)
    with torch.no_grad():
        context = model.text_projection(features)
        assert context.shape == (2, 14, 24)
        result = model(sample, timestep, features)
        for f in range(3):
            expected = reference(sample[:, :, f], timestep, context, return_dict=False)[0]
            torch.testing.assert_close(result[:, :, f], expected, atol=2e-5, rtol=1e-4)


def test_full_spatial_part_counts_like_stable_diffusion() -> None:
    with torch.device("meta"):
        model = DFGN()
        reference = spatial_reference(model)
    spatial = sum(p.numel() for n, p in model.named_parameters() if ".temporals." not in n and "text_projection" not in n)
    assert spatial == sum(p.numel() for p in reference.parameters()) + 320 == 865_922_244 + 320  # 320: the scale of the frame positions


@pytest.mark.parametrize("temporal_layer", ["sti", "conv3d"])
def test_padding_to_eight_and_computing_k_frames_agree(temporal_layer: str) -> None:
    model = tiny(temporal_layer=temporal_layer)
    sample, timestep, features = inputs()
    k = 5
    frame_mask = torch.arange(8)[None].repeat(2, 1) < k
    losses, gradients = [], []
    for clip, mask in ((sample[:, :, :k], None), (sample, frame_mask)):
        model.zero_grad()
        loss = model(clip, timestep, features, mask)[:, :, :k].square().mean()
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0 or name.endswith("to_k.bias"), name
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


def test_frames_and_text_and_time_all_matter() -> None:
    model = tiny()
    sample, timestep, features = inputs()
    with torch.no_grad():
        base = model(sample, timestep, features)
        assert not torch.allclose(base, model(sample, timestep + 200, features), atol=1e-4)
        for changed in (features._replace(clip=features.clip + 1), features._replace(t5=features.t5 + 1)):
            assert not torch.allclose(base, model(sample, timestep, changed), atol=1e-4)
        other = sample.clone()
        other[:, :, 7] += 1.0
        assert not torch.allclose(base[:, :, 0], model(other, timestep, features)[:, :, 0], atol=1e-5)


@pytest.mark.parametrize("mode", ["selective", "blocks", "blocks_cpu_offload"])
def test_activation_checkpointing_changes_no_bit(mode: str) -> None:
    model = tiny()
    sample, timestep, features = inputs()
    gradients = []
    for each in ("none", mode):
        model.set_activation_checkpointing(each)
        model.zero_grad()
        model(sample, timestep, features).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_activation_checkpointing_recomputes() -> None:
    model = tiny()
    calls = []
    model.mid_block.resnets[0].register_forward_hook(lambda *_: calls.append(1))
    for mode, expected in (("none", 1), ("selective", 2), ("blocks", 2), ("blocks_cpu_offload", 2)):
        calls.clear()
        model.set_activation_checkpointing(mode)
        model(*inputs()).sum().backward()
        assert len(calls) == expected, mode
    with pytest.raises(ValueError, match="'some'"):
        model.set_activation_checkpointing("some")


def test_channels_last_changes_the_layout_only() -> None:
    model = tiny()
    with torch.no_grad():
        before = model(*inputs())
        after = model.to(memory_format=torch.channels_last)(*inputs())
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)


def test_frames_are_told_apart_at_the_input_relative_to_their_clip() -> None:
    """Equal frames enter the first block as different ones; the first and last of 4 frames like the first and last of 8."""
    model = tiny()
    seen = []
    model.down_blocks[0].resnets[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    _, timestep, features = inputs(batch=1)
    with torch.no_grad():
        for frames in (8, 4):
            model(torch.zeros(1, 8, frames, 8, 8), timestep, features)
    eight, four = seen
    assert all((eight[i] - eight[i + 1]).abs().max() > 1e-2 for i in range(7))
    torch.testing.assert_close(four[[0, -1]], eight[[0, -1]])


def test_zero_initialised_parameters_are_zero_and_named() -> None:
    model = DFGN(**TINY)
    parameters = dict(model.named_parameters())
    names = model.zero_initialised_parameters()
    assert {"conv_out.weight", "mid_block.temporals.0.fusion.detail_scale"} <= names
    assert all(not parameters[name].any() for name in names)


def test_save_and_load_keep_every_weight(tmp_path) -> None:
    model = tiny(sti_gamma=(2, 1), guidance="pixel", in_channels=9)
    model.save_pretrained(tmp_path)
    loaded = DFGN.from_pretrained(tmp_path)
    assert dict(loaded.config)["sti_gamma"] == [2, 1] and loaded.config.guidance == "pixel"
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True))


def test_widths_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="width 20 must be a multiple of norm_groups 8"):
        DFGN(**{**TINY, "block_out_channels": (16, 20)})
    with pytest.raises(ValueError, match="one of each per level"):
        DFGN(**{**TINY, "attention_levels": (True,)})
