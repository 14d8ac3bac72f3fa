"""The frozen autoencoder and text encoders of an exported model, loaded and written one after the other.

Never two of them are in memory: each gives its weights up as soon as they are written, and only what it is stays.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rdtf_ds.config import EncodersSection
from rdtf_ds.errors import UserError
from rdtf_ds.models.autoencoder import load_autoencoder
from rdtf_ds.models.dfgn import DFGN
from rdtf_ds.models.text_conditioning import load_clip, load_t5


def write_frozen_parts(folder: Path, unet: DFGN, encoders: EncodersSection, max_shard: int) -> dict[str, Any]:
    """Writes ``vae``, ``text_encoder``, ``tokenizer``, ``text_encoder_2`` and ``tokenizer_2`` below ``folder``, weights in fp32.

    Args:
        unet: what they must fit; may be without weights.
        max_shard: bytes above which a part's weights are shared out among files.

    Returns:
        The parts by the pipeline's names, without weights (on torch's device "meta").

    Raises:
        EncoderNotFound: a part is not where ``encoders`` says.
        UserError: a part that does not fit the model, or that cannot be written, as on a full disk.
    """
    autoencoder = load_autoencoder(encoders.autoencoder)
    _refuse_misfit("encoders.autoencoder", encoders.autoencoder, "latent channels", autoencoder.channels, unet.config.out_channels)
    parts = {"vae": _written(folder, "vae", autoencoder.vae, max_shard)}
    del autoencoder
    clip, tokenizer = load_clip(encoders.clip)
    _refuse_misfit("encoders.clip", encoders.clip, "features a token", clip.config.hidden_size, unet.config.clip_dim)
    positions = clip.config.max_position_embeddings
    if positions < encoders.text_length:
        raise UserError(
            f"encoders.clip is '{encoders.clip}', which has {positions} positions, and the model was trained on captions of "
            f"{encoders.text_length} tokens (encoders.text_length). Name the CLIP text encoder of its training."
        )
    parts["text_encoder"] = _written(folder, "text_encoder", clip, max_shard)
    parts["tokenizer"] = _written(folder, "tokenizer", tokenizer)
    t5, tokenizer = load_t5(encoders.t5)
    _refuse_misfit("encoders.t5", encoders.t5, "features a token", t5.config.d_model, unet.config.t5_dim)
    parts["text_encoder_2"] = _written(folder, "text_encoder_2", t5, max_shard)
    parts["tokenizer_2"] = _written(folder, "tokenizer_2", tokenizer)
    return parts


def _refuse_misfit(key: str, source: str, what: str, found: int, expected: int) -> None:
    if found != expected:
        raise UserError(f"{key} is '{source}', which has {found} {what}, but the model was trained with {expected}. Name that one.")


def _written(folder: Path, name: str, part: Any, max_shard: int | None = None) -> Any:
    """The part, saved; a model without its weights from then on."""
    try:
        if max_shard is None:
            part.save_pretrained(str(folder / name))
            return part
        part.save_pretrained(str(folder / name), max_shard_size=max_shard)
    except Exception as error:  # safetensors and tokenizers have no common error for a disk that is full
        raise UserError(f"cannot write '{folder / name}': {error}. Choose another folder, or make room.") from error
    return part.to("meta")
