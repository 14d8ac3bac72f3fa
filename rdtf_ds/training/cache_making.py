"""Fills a feature cache: every clip of an index through the frozen encoders, once.

Legend: F decoded frames of a clip, C h w latent channels and size, H W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from tqdm import tqdm

from rdtf_ds.data.clips.clip import ClipError
from rdtf_ds.data.feature_cache import ClipFeatures, FeatureCache, caption_texts
from rdtf_ds.data.indexing.index import ClipIndex
from rdtf_ds.data.indexing.problem import Problem
from rdtf_ds.diffusion.guidance import pixel_guidance
from rdtf_ds.errors import UserError
from rdtf_ds.models.autoencoder import FrameAutoencoder
from rdtf_ds.models.text_conditioning import TextEncoders, TextFeatures
from rdtf_ds.seeding import numpy_generator
from rdtf_ds.training.caching import clip_keys

# bf16 has fewer digits than fp16, and scaled latents need none of its range.
_LATENTS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.float16}
_TEXT = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class FeatureMaker:
    """Makes the features of clips with the encoders themselves.

    Attributes:
        autoencoder, text: Frozen.
        device: Where frames are encoded.
        precision: ``fp32``, ``fp16`` or ``bf16``, of the network; says what is stored. With fp32 nothing is rounded.
        with_pixels: Whether guidance is by pixels; at latent size they take less room than the latents, and no clip is ever decoded.
        word_hide, variants: As `caption_texts` takes them.
    """

    autoencoder: FrameAutoencoder
    text: TextEncoders
    device: torch.device
    precision: str
    with_pixels: bool
    word_hide: float
    variants: int

    @torch.no_grad()
    def __call__(self, frames: np.ndarray, caption: str) -> ClipFeatures:
        """Features of all frames of a clip, uint8 (F, H, W, 3), and of the texts of its caption.

        Raises:
            UserError: A feature that is not finite in the precision it is stored in.
        """
        pixels = rearrange(torch.from_numpy(frames).to(self.device, torch.float32) / 127.5 - 1.0, "f h w c -> 1 c f h w")
        latents, dtype = self.autoencoder.encode(pixels), _LATENTS[self.precision]
        texts = caption_texts(caption, self.word_hide, self.variants)
        encoded = self.text.encode(texts)
        text = TextFeatures(*(part.to(dtype=_TEXT[self.precision], device="cpu") for part in encoded))
        stored = rearrange(latents, "1 c f h w -> f c h w").to("cpu", dtype)
        if not all(part.isfinite().all() for part in (stored, *text)):
            raise UserError(f"features of the caption {caption!r} and its clip are not finite in {self.precision}: use another precision.")
        small = None
        if self.with_pixels:
            everything = torch.ones(1, len(frames), dtype=torch.bool, device=self.device)
            guidance = pixel_guidance(pixels, everything, (latents.shape[-2], latents.shape[-1]))[:, :3]
            small = rearrange(guidance, "1 c f h w -> f c h w").to("cpu", dtype)
        return ClipFeatures(stored, texts, text.clip, text.t5, small)


@dataclass(frozen=True)
class Filled:
    """What became of the clips: made now, found whole, not decodable, not decoded this time for a reason that may pass."""

    made: int
    kept: int
    broken: Sequence[Problem]
    put_off: Sequence[Problem] = ()


def fill_cache(cache: FeatureCache, index: ClipIndex, decode: Callable[[int], np.ndarray], make: FeatureMaker) -> Filled:
    """Make what the cache lacks of an index, or holds damaged; shows a bar on standard error.

    Several processes may work at once: each goes its own way through the clips, and none makes what is there when it gets to it.

    Args:
        decode: all kept frames of a clip by its id, uint8 (F, H, W, 3).

    Raises:
        CacheError: The cache cannot be written.
        UserError: Features that are not finite.
    """
    keys, first = np.unique(clip_keys(index), return_index=True)  # equal clips once
    made = 0
    broken: list[Problem] = []
    put_off: list[Problem] = []
    order = numpy_generator("order of a process", os.urandom(8).hex()).permutation(len(keys))  # numbers of processes repeat in containers
    for place in tqdm(order, desc="clips", unit="clip", smoothing=0.05):
        key, clip_id = keys[place].decode(), int(index.trainable[first[place]])
        if cache.flaw(key) is None:
            continue
        try:
            frames = decode(clip_id)
        except ClipError as error:
            problem = Problem(index.path(clip_id), error.reason, content=index.content(clip_id))
            if error.transient:  # marked, it would be left out of every run
                put_off.append(problem)
            else:
                cache.mark_broken(key, error.reason)
                broken.append(problem)
            continue
        cache.write(key, make(frames, index.caption(clip_id)))
        made += 1
    kept = len(keys) - made - len(broken) - len(put_off)
    return Filled(made, kept, *(sorted(problems, key=lambda problem: problem.path) for problems in (broken, put_off)))
