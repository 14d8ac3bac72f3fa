"""CLIP similarity: how well clips show what their captions say, plain and among candidates (Wu et al. 2021, GODIVA).

The plain figure is the mean cosine between a caption's features and those of each frame. It hangs much on the model and on how the
domain looks. Among candidates, every caption of the test set competes for each clip, and what counts is the share of the right one, a
softmax over all: the paper takes all texts of its test set as candidates.

Legend: n clips, F frames, D width of CLIP's common space, m candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPModel

from rdtf_ds.models.clip_pictures import load_whole, pixel_constants
from rdtf_ds.models.local_weights import local_folder
from rdtf_ds.models.missing import Part, load_part

CLIP_MODEL = Part("CLIP for similarity", "--clip", "openai/clip-vit-base-patch32", ("",))
_TOKENIZER = Part("CLIP tokenizer for similarity", "--clip", "openai/clip-vit-base-patch32", ("",), ("tokenizer.json", "vocab.json"))
_TEXTS_AT_ONCE = 64


@dataclass(frozen=True)
class Similarity:
    """Of n clips.

    Attributes:
        plain: Mean cosine of caption and frame, −1..1.
        among_candidates: Mean probability of a clip's own caption among all candidates, 0..1; 1/m is chance.
        first: Share of clips whose own caption is the likeliest.
        candidates: m.
        clips: n.
    """

    plain: float
    among_candidates: float
    first: float
    candidates: int
    clips: int


class ClipScorer:
    """CLIP as a judge of clips.

    Args:
        source: Folder or hub id of a CLIP model with its tokenizer. What is told of it, `source`, is a folder's name or the id.
        device: Where it runs.

    Raises:
        EncoderNotFound: It is not there, or cannot be read.
    """

    def __init__(self, source: str, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.source = Path(source).resolve().name if Path(source).is_dir() else source
        self._model = load_part(partial(load_whole, CLIPModel), source, CLIP_MODEL).requires_grad_(False).eval().to(self.device)
        self._tokenizer = load_part(AutoTokenizer.from_pretrained, source, _TOKENIZER)
        self._size = int(self._model.config.vision_config.image_size)
        constants = pixel_constants(local_folder(source, CLIP_MODEL), source, CLIP_MODEL)
        self._mean, self._deviation = (torch.tensor(values, device=self.device)[:, None, None] for values in constants)

    def score(self, clips: Iterable[np.ndarray], captions: Sequence[str], candidates: Sequence[str] | None = None) -> Similarity:
        """Score clips against their captions.

        Args:
            clips: uint8 (F, H, W, 3) each.
            captions: Of each clip.
            candidates: Captions that compete, each once; None: all of ``captions``.

        Raises:
            ValueError: No clips, as many captions as clips are not given, or a caption is no candidate.
        """
        texts = list(dict.fromkeys(captions if candidates is None else candidates))
        if absent := [caption for caption in captions if caption not in texts]:
            raise ValueError(f"{len(absent)} captions are no candidates, such as {absent[0]!r}")
        shown = [self._frame_features(clip) for clip in clips]
        if len(shown) != len(captions) or not shown:
            raise ValueError(f"{len(shown)} clips need as many captions, and at least one; got {len(captions)}")
        said = self._text_features(texts)
        own = torch.tensor([texts.index(caption) for caption in captions])
        cosines = torch.stack([(frames @ said.T).mean(dim=0) for frames in shown])  # (n, m)
        shares = (self._model.logit_scale.exp().double().cpu() * cosines).softmax(dim=1)
        rows = torch.arange(len(own))
        return Similarity(
            plain=float(cosines[rows, own].mean()),
            among_candidates=float(shares[rows, own].mean()),
            first=float((shares.argmax(dim=1) == own).double().mean()),
            candidates=len(texts),
            clips=len(own),
        )

    @torch.no_grad()
    def _frame_features(self, clip: np.ndarray) -> torch.Tensor:
        """Of each frame, of length 1: float64 (F, D) on the CPU."""
        pictures = [np.asarray(Image.fromarray(frame).resize((self._size, self._size), Image.Resampling.BICUBIC)) for frame in clip]
        pixels = torch.from_numpy(np.stack(pictures)).to(self.device).permute(0, 3, 1, 2).float() / 255
        vision = self._model.vision_model(pixel_values=(pixels - self._mean) / self._deviation)
        return _of_length_1(self._model.visual_projection(vision.pooler_output))

    @torch.no_grad()
    def _text_features(self, texts: Sequence[str]) -> torch.Tensor:
        """Of each text, of length 1: float64 (m, D) on the CPU."""
        features = []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            tokens = self._tokenizer(
                list(texts[start : start + _TEXTS_AT_ONCE]),
                padding=True,
                truncation=True,
                max_length=self._model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            ).to(self.device)
            told = self._model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
            features.append(_of_length_1(self._model.text_projection(told.pooler_output)))
        return torch.cat(features)


def _of_length_1(features: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(features.double(), dim=1).cpu()
