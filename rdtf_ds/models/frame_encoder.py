"""Frames described by a CLIP model's image features: what k-means tells them apart by when a model is given for it.

Legend: F frames of a clip, D width of CLIP's common space of pictures and texts.
"""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, CLIPConfig, CLIPVisionConfig, CLIPVisionModelWithProjection

from rdtf_ds.models.local_weights import KnownHashes, local_folder, weights_hash
from rdtf_ds.models.missing import EncoderNotFound, Part, load_part

IMAGE_ENCODER = Part("CLIP image encoder", "rdtf.data.frame_features", "openai/clip-vit-base-patch32", ("image_encoder", ""))
_PREPROCESSING = "preprocessor_config.json"
_AT_ONCE = 32
# OpenAI's, https://github.com/openai/CLIP, clip.py
_DEFAULTS = (("image_mean", (0.48145466, 0.4578275, 0.40821073)), ("image_std", (0.26862954, 0.26130258, 0.27577711)))


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
        constants = self._constants(folder)
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
                model = load_part(_load_model, self._source, IMAGE_ENCODER)
                self._model = model.requires_grad_(False).eval().to(self._device)
            return self._model

    def _constants(self, folder: Path) -> list[list[float]]:
        """Mean and deviation of the channels, as the model's own preprocessing has them, else OpenAI's."""
        path = folder / _PREPROCESSING
        try:
            given: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            constants = [[float(value) for value in given.get(key, default)] for key, default in _DEFAULTS]
            if any(len(values) != 3 for values in constants) or min(constants[1]) <= 0:
                raise ValueError(f"image_mean and image_std must be three numbers each, got {constants}")
            return constants
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise EncoderNotFound(IMAGE_ENCODER, self._source, f"'{path}' cannot be used ({error})") from error


def _read_config(source: str, subfolder: str = "") -> CLIPVisionConfig:
    config = AutoConfig.from_pretrained(source, subfolder=subfolder)
    config = config.vision_config if isinstance(config, CLIPConfig) else config
    if not isinstance(config, CLIPVisionConfig):
        raise ValueError(f"it is a {type(config).__name__}, not a CLIP model")
    return config


def _load_model(source: str, subfolder: str = "") -> CLIPVisionModelWithProjection:
    model, report = CLIPVisionModelWithProjection.from_pretrained(source, subfolder=subfolder, output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(f"the weights lack {len(report['missing_keys'])} tensors, such as {min(report['missing_keys'])}")
    return model
