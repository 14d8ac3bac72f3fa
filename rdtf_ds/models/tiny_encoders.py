"""Tiny frozen encoders with random weights: the real ones' classes and folder layout, megabytes smaller, nothing to download.

They serve tests and the CPU demo. Random weights still make usable text features: the words of the captions get orthogonal
embeddings of unit variance, and one shallow layer mixes in a little of the sentence, so a word's feature stays recognisable
in any context. The autoencoder is untrained and only good for exercising the code; for pictures use ``haar:2``.

Layout of a folder (as in Stable Diffusion 3's pipelines): text_encoder/ tokenizer/ (CLIP), text_encoder_2/ tokenizer_2/ (T5), vae/.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from rdtf_ds.errors import UserError
from rdtf_ds.seeding import torch_generator

# The words of the synthetic captions (a test compares): one token each in both tokenizers.
STICKER_WORDS: tuple[str, ...] = (
    *("a", "red", "yellow", "green", "cyan", "blue", "magenta"),
    *("circle", "square", "triangle", "star", "heart", "diamond"),
    *("slides", "left", "right", "rises", "falls", "grows", "shrinks", "#"),
)
DEFAULT_WIDTH = 64
_MIXING = 0.1  # share of a layer's output beside the token's own embedding: context shows, the word stays


def write_tiny_encoders(folder: str | Path, width: int = DEFAULT_WIDTH, vocabulary: Sequence[str] = STICKER_WORDS) -> None:
    """Writes CLIP, T5 and the autoencoder under ``folder``; the same arguments give the same weights on every call.

    Args:
        width: feature width of both text encoders, a multiple of 8.
        vocabulary: lower-case words that become one token each; any other text is spelt out in bytes (CLIP) or characters (T5).
    """
    root = Path(folder)
    clip, clip_tokenizer = tiny_clip(width, vocabulary)
    t5, t5_tokenizer = tiny_t5(width, vocabulary)
    parts: dict[str, Any] = {
        "text_encoder": clip, "tokenizer": clip_tokenizer, "text_encoder_2": t5, "tokenizer_2": t5_tokenizer, "vae": tiny_autoencoder(),
    }  # fmt: skip
    for name, part in parts.items():
        part.save_pretrained(str(root / name))


def tiny_width(source: str) -> int | None:
    """Width of the features that ``tiny`` or ``tiny:WIDTH`` asks for; None for any other source.

    Raises:
        UserError: a width that is no even number.
    """
    name, colon, width = source.partition(":")
    if name != "tiny":
        return None
    if colon and (not width.isdecimal() or int(width) < 2 or int(width) % 2):
        raise UserError(f"The encoder '{source}' cannot be made: write tiny or tiny:WIDTH with an even width, such as tiny:1024.")
    return int(width) if colon else DEFAULT_WIDTH


def tiny_clip(width: int = DEFAULT_WIDTH, vocabulary: Sequence[str] = STICKER_WORDS) -> tuple[Any, Any]:
    """A one-layer CLIPTextModel and its CLIPTokenizer, a byte-level BPE."""
    merges = _learn_merges(vocabulary)
    letters = sorted(_byte_letters().values())
    pieces = [*letters, *(letter + "</w>" for letter in letters), *(left + right for left, right in merges)]
    ids = {piece: number for number, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    backend_merges: Any = merges  # pairs are what the backend takes, whatever CLIPTokenizer's annotation says
    tokenizer = CLIPTokenizer(vocab=ids, merges=backend_merges, model_max_length=77)
    with torch.random.fork_rng(devices=[]):
        model: Any = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(ids), hidden_size=width, intermediate_size=2 * width, projection_dim=width, num_hidden_layers=1,
                num_attention_heads=2, max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            )
        )  # fmt: skip
    words = [token for word in vocabulary for token in tokenizer(word, add_special_tokens=False).input_ids]
    embeddings = {name: table for name, table in model.named_parameters() if "embedding" in name}
    _fill(model, "tiny clip")
    with torch.no_grad():
        for name, table in embeddings.items():
            if "position" in name:
                table.mul_(0.3)  # order shows without hiding the word
            else:
                _make_orthogonal(table, [*words, tokenizer.bos_token_id, tokenizer.eos_token_id], "tiny clip words")
    return model.eval(), tokenizer


def tiny_t5(width: int = DEFAULT_WIDTH, vocabulary: Sequence[str] = STICKER_WORDS) -> tuple[Any, Any]:
    """A one-layer T5EncoderModel of version 1.1 and its T5Tokenizer: whole words, else characters."""
    characters = sorted({chr(code) for code in range(33, 127)} | {letter for word in vocabulary for letter in word})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    pieces += [("▁" + word, -1.0) for word in vocabulary]
    pieces += [(character, -10.0) for character in characters]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)
    with torch.random.fork_rng(devices=[]):
        model: Any = T5EncoderModel(
            T5Config(
                vocab_size=len(pieces), d_model=width, d_kv=width // 2, d_ff=2 * width, num_layers=1, num_heads=2,
                feed_forward_proj="gated-gelu", is_encoder_decoder=False, pad_token_id=0, eos_token_id=1,
            )
        )  # fmt: skip
    words = [token for word in vocabulary for token in tokenizer(word, add_special_tokens=False).input_ids]
    _fill(model, "tiny t5")
    _make_orthogonal(model.shared.weight, [*words, 1], "tiny t5 words")
    return model.eval(), tokenizer


def tiny_autoencoder() -> Any:
    """An untrained AutoencoderKL of the real one's proportions: f = 8, 4 latent channels; scaled to latents of about unit variance."""
    with torch.random.fork_rng(devices=[]):
        vae: Any = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(8, 8, 16, 16),
            layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=64,
        )  # fmt: skip
    _fill(vae, "tiny autoencoder", mixing=1.0)
    vae = vae.eval()
    with torch.no_grad():
        # Flat patches, as in stickers; noise at pixel size would average out in the encoder.
        patches = torch.rand(8, 3, 8, 8, generator=torch_generator("tiny autoencoder", "patches"))
        latents = vae.encode(nn.functional.interpolate(2 * patches - 1, scale_factor=8)).latent_dist.mode()
    vae.register_to_config(scaling_factor=round(1 / float(latents.square().mean().sqrt()), 4))
    return vae


@torch.no_grad()
def _fill(model: nn.Module, seed: str, mixing: float = _MIXING) -> None:
    """Draws every weight with variance 1/fan-in; residual branches end scaled by ``mixing``; norms are 1, biases 0."""
    generator = torch_generator(seed)
    ends = ("out_proj.weight", "fc2.weight", ".o.weight", ".wo.weight")
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and "relative_attention_bias" not in name:
            parameter.zero_()
        elif parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            fan_in = 1 if "embed" in name or "shared" in name or "relative" in name else parameter[0].numel()
            scale = fan_in**-0.5 * (mixing if name.endswith(ends) else 1.0)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


@torch.no_grad()
def _make_orthogonal(table: torch.Tensor, rows: Sequence[int], seed: str) -> None:
    """Gives as many ``rows`` as the width allows orthogonal directions, all entries of unit variance."""
    width = table.shape[1]
    generator = torch_generator(seed)
    distinct = list(dict.fromkeys(rows))
    for start in range(0, len(distinct), width):
        part = distinct[start : start + width]
        basis, _ = torch.linalg.qr(torch.randn(width, width, generator=generator))
        table[part] = basis[: len(part)] * width**0.5


def _learn_merges(vocabulary: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, until every word is a single piece."""
    letters = _byte_letters()
    words = [[letters[byte] for byte in word.lower().encode()] for word in dict.fromkeys(vocabulary)]
    for word in words:
        word[-1] += "</w>"
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for word in words for pair in zip(word, word[1:], strict=False))
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = [_merged(word, best) for word in words]


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    position = 0
    while position < len(word):
        length = 2 if tuple(word[position : position + 2]) == pair else 1
        merged.append("".join(word[position : position + length]))
        position += length
    return merged


def _byte_letters() -> dict[int, str]:
    """The printable letter that byte-level BPE writes for each byte (GPT-2's table): Latin-1's printable ones, else from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) if byte in printable else chr(256 + hidden.index(byte)) for byte in range(256)}
