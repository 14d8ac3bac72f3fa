"""The spatial layers: what Stable Diffusion's U-Net does to single frames, told that frames belong to clips.

They compute what diffusers' ResnetBlock2D and Transformer2DModel do, under the same names of parameters, but

* all frames of a clip share one caption, so its keys and values are made once for each clip and not once for each frame: all frames'
  queries stand in one row before them (attention mixes nothing between queries);
* nothing leaves channels-last memory, where diffusers returns to channels-first after every transformer;
* nothing is divided by 1.

Legend: B clips, F frames, (b f) frames as images, C channels, h w latent size, n = h·w tokens, L text tokens, D context width,
T width of the time embedding, g heads.
"""

from __future__ import annotations

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from einops import rearrange, repeat
from torch import Tensor, nn

from rdtf_ds.models.attention import attention


class Resnet(nn.Module):
    """Two 3 × 3 convolutions, each after GroupNorm and SiLU, the time embedding between them, a residual (1 × 1 where widths differ).

    Args:
        width_in, width: channels before and after.
        temb_width: T.
        norm_groups: of both norms.
    """

    def __init__(self, width_in: int, width: int, temb_width: int, norm_groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, width_in, eps=1e-5)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.time_emb_proj = nn.Linear(temb_width, width)
        self.norm2 = nn.GroupNorm(norm_groups, width, eps=1e-5)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.nonlinearity = nn.SiLU()  # a module, so that what searches for bad numbers can name it
        self.conv_shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else None

    def forward(self, hidden: Tensor, temb: Tensor) -> Tensor:
        """(B*F, C, h, w) and (B, T) -> (B*F, width, h, w)."""
        time = self.time_emb_proj(self.nonlinearity(temb))
        time = repeat(time, "b c -> (b f) c 1 1", f=hidden.shape[0] // temb.shape[0])
        inner = self.conv1(self.nonlinearity(self.norm1(hidden))) + time
        inner = self.conv2(self.nonlinearity(self.norm2(inner)))
        return inner + (hidden if self.conv_shortcut is None else self.conv_shortcut(hidden))


class SpatialTransformer(nn.Module):
    """Self-attention within each frame, cross-attention to the text, feed-forward; linear projections around, a residual.

    Args:
        width: channels.
        head_channels: width of a head.
        context_dim: D.
        norm_groups: of the first norm.
    """

    def __init__(self, width: int, head_channels: int, context_dim: int, norm_groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width)
        block = BasicTransformerBlock(width, width // head_channels, head_channels, cross_attention_dim=context_dim)
        for layer in (block.attn1, block.attn2):
            layer.set_processor(ClipAttention())
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = nn.Linear(width, width)

    def forward(self, hidden: Tensor, context: Tensor) -> Tensor:
        """(B*F, C, h, w) and (B, L, D) -> (B*F, C, h, w)."""
        tokens = self.proj_in(rearrange(self.norm(hidden), "n c h w -> n (h w) c"))
        for block in self.transformer_blocks:
            tokens = block(tokens, encoder_hidden_states=context)
        # A sum lies in memory as its first term does: where the network is channels-last the second one, a view, does too.
        return hidden + rearrange(self.proj_out(tokens), "n (h w) c -> n c h w", h=hidden.shape[-2])


class ClipAttention:
    """What diffusers' Attention calls to compute: images look at themselves, or all images of a clip at one context."""

    def __call__(self, layer: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **unused: None) -> Tensor:
        """(B*F, n, C) and (B, L, D) or None -> (B*F, n, C)."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        images, clips = hidden_states.shape[0] // context.shape[0], context.shape[0]
        query = rearrange(layer.to_q(hidden_states), "(b f) n (g d) -> b g (f n) d", b=clips, g=layer.heads)
        key, value = (rearrange(project(context), "b l (g d) -> b g l d", g=layer.heads) for project in (layer.to_k, layer.to_v))
        mixed = attention(query, key, value, backend="sdpa")
        return layer.to_out[0](rearrange(mixed, "b g (f n) d -> (b f) n (g d)", f=images))
