"""Thumbnails, by which frames are told apart."""

from __future__ import annotations

import numpy as np
from PIL import Image

from rdtf_ds.data.clips.frame_features import THUMBNAIL_DIM, as_float, thumbnail


def test_a_thumbnail_holds_the_area_means_of_an_8_by_8_grid() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (32, 16, 3), dtype=np.uint8)
    expected = frame.reshape(8, 4, 8, 2, 3).astype(float).mean(axis=(1, 3)).reshape(THUMBNAIL_DIM)
    features = thumbnail(Image.fromarray(frame))
    assert features.dtype == np.uint8 and features.shape == (192,)
    assert np.abs(features - expected).max() <= 1.01  # Pillow rounds to whole levels, across and then down


def test_stored_features_become_float32() -> None:
    assert as_float(np.array([[0, 51, 255]], np.uint8)).tolist() == [[0.0, np.float32(0.2), 1.0]]
    halves = as_float(np.array([[0.5, -2]], np.float16))
    assert halves.dtype == np.float32 and halves.tolist() == [[0.5, -2.0]]
