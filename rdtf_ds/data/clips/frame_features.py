"""What frames are told apart by when k of them are chosen: small thumbnails, or the features of a model that is given.

They are made once, when a clip is indexed, and kept beside the index, so that choosing frames decodes none.

Legend: F frames of a clip, D features of a frame.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from PIL import Image

THUMBNAIL = 8
THUMBNAIL_DIM = 3 * THUMBNAIL**2
THUMBNAIL_IDENTITY = f"thumbnail:{THUMBNAIL}"


class FrameDescriber(Protocol):
    """Makes the features of frames.

    Attributes:
        identity: All that the features depend on beside the frames; features of another are not comparable.
        size: Side of the square frames it is given, in pixels.
        dim: D.
    """

    identity: str
    size: int
    dim: int

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """uint8 (F, size, size, 3) -> float16 (F, D)."""
        ...


def thumbnail(frame: Image.Image) -> np.ndarray:
    """An RGB picture averaged to 8×8, whatever its shape: uint8 (D,)."""
    return np.asarray(frame.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)).reshape(-1)


def as_float(stored: np.ndarray) -> np.ndarray:
    """Features as they are stored, uint8 or float16 (F, D), as k-means takes them: float32, thumbnails in [0, 1]."""
    return stored.astype(np.float32) / 255 if stored.dtype == np.uint8 else stored.astype(np.float32)
