"""Who is measured: DFGN, diffusers' I2VGenXLUNet and UNet3DConditionModel in the same widths on the same clip, and a plain trainer.

The paper's base model is I2VGen-XL; a user who adapts an image-to-video network to stickers picks one of these two. All weights are
random: no time depends on their values.

Legend: B clips, F frames, C channels, h w latent size, L text tokens, D context width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import I2VGenXLUNet, UNet3DConditionModel
from torch import Tensor, nn

from rdtf_ds.models.dfgn import DFGN
from rdtf_ds.models.text_conditioning import TextFeatures


@dataclass(frozen=True)
class Size:
    """One size of all networks; ``full`` is Table 6 and both peers' own defaults.

    Attributes:
        widths: Of each level.
        attends: Which levels have transformers.
        head_channels: Of the spatial transformers.
        context_dim: D, and width of both text features.
        side: h and w of the latents.
        text_length: L.
    """

    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    attends: tuple[bool, ...] = (True, True, True, False)
    head_channels: int = 64
    context_dim: int = 1024
    side: int = 32
    text_length: int = 77


SIZES = {
    "full": Size(),
    "mid": Size(widths=(128, 256, 512, 512), context_dim=512),
    "tiny": Size(widths=(32, 64), attends=(True, False), head_channels=16, context_dim=32, side=16, text_length=7),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PEERS = ("I2VGenXLUNet", "UNet3DConditionModel")
GUIDED = 4  # of the 8 input channels, the noisy ones; the others are visual guidance


@dataclass(frozen=True)
class Clip:
    """What every network is called on: sample (B, 8, F, h, w), timestep (B,), text features (B, L, D) of both encoders."""

    sample: Tensor
    timestep: Tensor
    text: TextFeatures


def device_here() -> torch.device:
    """The current GPU, or the CPU where torch sees none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_clip(size: Size, frames: int) -> Clip:
    """One clip in the default dtype, on the default device."""
    sample = torch.randn(1, 2 * GUIDED, frames, size.side, size.side)
    text = TextFeatures(*(torch.randn(1, size.text_length, size.context_dim) for _ in range(2)))
    return Clip(sample, torch.full((1,), 500), text)


@contextmanager
def made_in(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Networks and tensors made inside are of this dtype, on this device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def dfgn(size: Size, attention_backend: str = "auto") -> DFGN:
    """Ours."""
    return DFGN(
        block_out_channels=size.widths, attention_levels=size.attends, head_channels=size.head_channels,
        context_dim=size.context_dim, clip_dim=size.context_dim, t5_dim=size.context_dim, attention_backend=attention_backend,
    )  # fmt: skip


def channels_last(network: nn.Module) -> nn.Module:
    """The same network with the kernels of its picture convolutions in channels-last memory, as a run has ours."""
    for parameter in network.parameters():
        if parameter.ndim == 4:  # convolutions over frames and pixels have five dimensions and stay as they are
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return network


def call_dfgn(network: nn.Module, clip: Clip) -> Tensor:
    """(B, 4, F, h, w)."""
    predicted: Tensor = network(clip.sample, clip.timestep, clip.text)
    return predicted


def peer(name: str, size: Size) -> nn.Module:
    """I2VGenXLUNet or UNet3DConditionModel as its class makes it, in our widths.

    Raises:
        ValueError: any other name.
    """
    if name not in PEERS:
        raise ValueError(f"there is no peer {name!r}; choose one of {', '.join(PEERS)}")
    down = tuple("CrossAttnDownBlock3D" if attends else "DownBlock3D" for attends in size.attends)
    up = tuple("CrossAttnUpBlock3D" if attends else "UpBlock3D" for attends in reversed(size.attends))
    shape = {
        "block_out_channels": size.widths, "down_block_types": down, "up_block_types": up,
        "attention_head_dim": size.head_channels, "cross_attention_dim": size.context_dim,
    }  # fmt: skip
    network: nn.Module = I2VGenXLUNet(**shape) if name == "I2VGenXLUNet" else UNet3DConditionModel(in_channels=2 * GUIDED, **shape)
    return network.eval()


def call_peer(name: str, network: nn.Module, clip: Clip) -> Tensor:
    """The same clip: I2VGen-XL takes the guidance beside the sample, and the embedding of a picture; both take one text of L tokens."""
    noisy, guidance = clip.sample.split(GUIDED, dim=1)
    if name == "I2VGenXLUNet":
        picture = clip.text.clip[:, 0]  # (B, D): some vector of the width that CLIP's picture has
        fps = torch.full((len(noisy),), 8, device=noisy.device)
        predicted: Tensor = network(
            noisy, clip.timestep, fps=fps, image_latents=guidance, image_embeddings=picture, encoder_hidden_states=clip.text.clip
        ).sample
    else:
        predicted = network(clip.sample, clip.timestep, encoder_hidden_states=clip.text.clip).sample
    return predicted


def forward_and_backward(network: nn.Module, clip: Clip, target: Tensor, item: bool = True) -> Callable[[], float | None]:
    """A train step without its optimizer: loss, gradients. ``item``: its value is read, which tensors without data have not."""

    def step() -> float | None:
        """The loss, None without ``item``; gradients are added to those that are there."""
        loss = nn.functional.mse_loss(call_dfgn(network, clip).float(), target.float())
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item() if item else None

    return step


def plain_training(network: nn.Module, clip: Clip, target: Tensor) -> Callable[[], float]:
    """The step a user writes first: everything kept, AdamW, all in one dtype. Its moments are made at the first step."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, weight_decay=0.01)

    def step() -> float:
        """The loss as it was before the update; no gradient is left."""
        loss = nn.functional.mse_loss(call_dfgn(network, clip).float(), target.float())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step
