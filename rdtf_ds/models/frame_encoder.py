"""Frames described by a CLIP model's image features: what k-means tells them apart by when a model is given for it.

Legend: F frames of a clip, D width of CLIP's common space of pictures and texts.
"""

from __future__ import annotations

import hashlib
import json
import threading
from functools import partial

import numpy as np
import torch
from transformers import AutoConfig, CLIPConfig, CLIPVisionConfig, CLIPVisionModelWithProjection

from rdtf_ds.models.clip_pictures import load_whole, pixel_constants
from rdtf_ds.models.local_weights import KnownHashes, local_folder, weights_hash
from rdtf_ds.models.missing import EncoderNotFound, Part, load_part

IMAGE_ENCODER = Part("CLIP image encoder", "rdtf.data.frame_features", "openai/clip-vit-base-patch32", ("image_encoder", ""))
_AT_ONCE = 32


class CLIPFrames:
    """Describes frames by their CLIP image features, scaled to length 1. A `FrameDescriber`.

    Only the config is read at first, and the weights are hashed: they are loaded when the first frames come.

    Args:
        source: folder or hub id.
        device: where frames are encoded.
        hashes: remembers the weights' hash.

    Attributes:
        identity: the weights' hash and the numbers pictures are normalised by.
        size: side of the square frames the model takes, in pixels.
        dim: D.

    Raises:
        EncoderNotFound: nothing there, or what is there cannot be read or is no CLIP model.
    """

    def __init__(self, source: str, device: torch.device, hashes: KnownHashes | None = None) -> None:
        self._source, self._device = source, device
        config = load_part(_read_config, source, IMAGE_ENCODER)
        self.size, self.dim = int(config.image_size), int(config.projection_dim)
        folder = local_folder(source, IMAGE_ENCODER)
        weights = weights_hash(source, IMAGE_ENCODER, hashes)
        self._model: CLIPVisionModelWithProjection | None = None
        self._lock = threading.Lock()
        if folder is None or weights is None:  # on the hub: loading brings it here
            self._load()
            folder, weights = local_folder(source, IMAGE_ENCODER), weights_hash(source, IMAGE_ENCODER, hashes)
        if folder is None or weights is None:
            raise EncoderNotFound(IMAGE_ENCODER, source, "its weights are not there")
        constants = pixel_constants(folder, source, IMAGE_ENCODER)
        self.identity = f"clip:{hashlib.sha256(json.dumps([weights, self.size, *constants]).encode()).hexdigest()}"
        self._mean, self._std = (torch.tensor(values, dtype=torch.float32, device=device)[:, None, None] for values in constants)

    @torch.no_grad()
    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """uint8 (F, size, size, 3) -> float16 (F, D)."""
        model = self._load()
        features = []
        for part in np.split(frames, range(_AT_ONCE, len(frames), _AT_ONCE)):
            pixels = torch.from_numpy(part).to(self._device).permute(0, 3, 1, 2).float() / 255
            embedding = model(pixel_values=(pixels - self._mean) / self._std).image_embeds
            features.append(torch.nn.functional.normalize(embedding.float(), dim=1).cpu())
        return torch.cat(features).numpy().astype(np.float16)

    def _load(self) -> CLIPVisionModelWithProjection:
        with self._lock:  # frames may come from several threads
            if self._model is None:
                model = load_part(partial(load_whole, CLIPVisionModelWithProjection), self._source, IMAGE_ENCODER)
                self._model = model.requires_grad_(False).eval().to(self._device)
            return self._model


def _read_config(source: str, subfolder: str = "") -> CLIPVisionConfig:
    config = AutoConfig.from_pretrained(source, subfolder=subfolder)
    config = config.vision_config if isinstance(config, CLIPConfig) else config
    if not isinstance(config, CLIPVisionConfig):
        raise ValueError(f"it is a {type(config).__name__}, not a CLIP model")
    return config
