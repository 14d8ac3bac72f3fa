"""What all uses of a CLIP model's eye share: loading it whole, and the numbers that its pictures are normalised by."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rdtf_ds.models.missing import EncoderNotFound, Part

_PREPROCESSING = "preprocessor_config.json"
# OpenAI's, https://github.com/openai/CLIP, clip.py
_DEFAULTS = (("image_mean", (0.48145466, 0.4578275, 0.40821073)), ("image_std", (0.26862954, 0.26130258, 0.27577711)))


def load_whole(kind: Any, source: str, subfolder: str = "") -> Any:
    """A pretrained model of a transformers class.

    Raises:
        ValueError: weights that lack tensors, which transformers would fill with random numbers.
    """
    model, report = kind.from_pretrained(source, subfolder=subfolder, output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(f"the weights lack {len(report['missing_keys'])} tensors, such as {min(report['missing_keys'])}")
    return model


def pixel_constants(folder: Path | None, source: str, part: Part) -> list[list[float]]:
    """Mean and deviation of the three channels of pixels 0..1, as the model's own preprocessing has them, else OpenAI's.

    Args:
        folder: where the model lies on this machine, if that is known.
        source, part: what was asked for, for the message.

    Raises:
        EncoderNotFound: the file is there and cannot be used.
    """
    path = None if folder is None else folder / _PREPROCESSING
    try:
        given: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else {}
        constants = [[float(value) for value in given.get(key, default)] for key, default in _DEFAULTS]
        if any(len(values) != 3 or not all(map(math.isfinite, values)) for values in constants) or min(constants[1]) <= 0:
            raise ValueError(f"image_mean and image_std must be three numbers each, got {constants}")
        return constants
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise EncoderNotFound(part, source, f"'{path}' cannot be used ({error})") from error
