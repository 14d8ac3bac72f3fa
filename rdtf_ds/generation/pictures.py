"""Pictures that are to be frames of a clip: opened from files, brought to the model's size, and named by a hash."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from rdtf_ds.clip_requests import picture_pixels
from rdtf_ds.errors import UserError

MOST_PIXELS = 40_000_000
"""A small file may say that it has so many that they fill the memory."""


def open_pictures(pictures: Mapping[int, Path | np.ndarray | Image.Image]) -> dict[int, Image.Image | np.ndarray]:
    """The same pictures with files read, by rising number.

    Raises:
        UserError: a file that is absent, is no picture, or is an animation.
    """
    return {number: open_picture(one) if isinstance(one, Path) else one for number, one in sorted(pictures.items())}


def open_picture(path: Path) -> Image.Image:
    """A picture as it is looked at: upright where a camera's EXIF says how it was held.

    Raises:
        UserError: a file that is absent, is no picture, has more than :data:`MOST_PIXELS`, or is an animation.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise UserError(f"the picture '{path}' has {width} x {height} pixels; save it with {MOST_PIXELS // 10**6} million at most.")
            count = getattr(image, "n_frames", 1)
            if count == 1:
                image.load()
                return ImageOps.exif_transpose(image)
    except UserError:
        raise
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, ValueError and more for a broken picture
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else f"{error}"
        raise UserError(f"the picture '{path}' cannot be read: {reason}.") from error
    raise UserError(f"the picture '{path}' is an animation of {count} frames; save the one you mean as a picture of its own.")


def as_frames(pictures: Mapping[int, Image.Image], config: Any, fit: bool) -> dict[int, np.ndarray]:
    """Pictures as the model sees them, uint8 (H, W, 3) by number. ``pictures`` are a ClipRequest's, ``config`` the pipeline's.

    Raises:
        UserError: one of another size or with transparent pixels, unless ``fit``.
    """
    side, background = config.image_size, tuple(config.background)
    return {number: picture_pixels(picture, number, side, background, fit) for number, picture in pictures.items()}


def picture_hash(frame: np.ndarray) -> str:
    """SHA-256 over the bytes of uint8 (H, W, 3), row by row: the same whatever format the picture was stored in."""
    return hashlib.sha256(np.ascontiguousarray(frame).tobytes()).hexdigest()
