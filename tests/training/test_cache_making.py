"""Making the features of clips, and filling a cache with them: each once, again what is damaged, without what cannot be decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rdtf_ds.data.cache_header import CacheError, CacheHeader
from rdtf_ds.data.clips.clip import ClipError, DecodeLimits
from rdtf_ds.data.clips.decoding import decode_clip
from rdtf_ds.data.feature_cache import FeatureCache
from rdtf_ds.data.indexing.index_building import build_index
from rdtf_ds.data.sources.captions import NO_CAPTION
from rdtf_ds.diffusion.guidance import pixel_guidance
from rdtf_ds.errors import UserError
from rdtf_ds.models.autoencoder import FrameAutoencoder, load_autoencoder
from rdtf_ds.models.text_conditioning import TextEncoders, TextFeatures
from rdtf_ds.training.cache_making import FeatureMaker, fill_cache
from rdtf_ds.training.caching import clip_keys
from tests.data.folders import SIDE, numbered_clips

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoders() -> tuple[FrameAutoencoder, TextEncoders]:
    return load_autoencoder("tiny"), TextEncoders.from_pretrained("tiny:16", "tiny:32")


def maker(encoders: tuple[FrameAutoencoder, TextEncoders], precision: str = "fp32", with_pixels: bool = False) -> FeatureMaker:
    return FeatureMaker(*encoders, CPU, precision, with_pixels, word_hide=0.5, variants=3)


def clip(frames: int = 11) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (frames, SIDE, SIDE, 3), np.uint8)


def test_features_are_what_the_encoders_give(encoders):
    autoencoder, text = encoders
    frames = clip()
    made = maker(encoders, with_pixels=True)(frames, "a red star rises")
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    assert torch.equal(made.latents, autoencoder.encode(pixels)[0].transpose(0, 1))
    assert made.texts[:2] == ("a red star rises", "# # # #") and len(made.texts) > 2
    encoded = text.encode(made.texts)
    assert torch.equal(made.clip, encoded.clip) and torch.equal(made.t5, encoded.t5)
    small = pixel_guidance(pixels, torch.ones(1, 11, dtype=torch.bool), (2, 2))[0, :3].transpose(0, 1)
    assert made.pixels is not None and torch.equal(made.pixels, small) and made.pixels.shape == (11, 3, 2, 2)
    assert maker(encoders)(frames, "").texts == (NO_CAPTION,) and maker(encoders)(frames, "").pixels is None


@pytest.mark.parametrize(
    ("precision", "latents", "text"),
    [("fp32", torch.float32, torch.float32), ("fp16", torch.float16, torch.float16), ("bf16", torch.float16, torch.bfloat16)],
)
def test_what_is_stored_follows_the_networks_precision(encoders, precision, latents, text):
    made, exact = maker(encoders, precision, with_pixels=True)(clip(), "a star"), maker(encoders, with_pixels=True)(clip(), "a star")
    assert (made.latents.dtype, made.pixels.dtype, made.clip.dtype, made.t5.dtype) == (latents, latents, text, text)
    assert torch.equal(made.latents, exact.latents.to(latents)) and torch.equal(made.t5, exact.t5.to(text))


def test_features_that_overflow_are_refused(encoders, monkeypatch):
    autoencoder, text = encoders
    monkeypatch.setattr(text, "encode", lambda texts: TextFeatures(torch.zeros(len(texts), 3, 2), torch.full((len(texts), 3, 2), 1e5)))
    assert maker(encoders)(clip(), "a").t5.max() == 1e5
    with pytest.raises(UserError, match="'a' and its clip are not finite in fp16"):
        maker(encoders, "fp16")(clip(), "a")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = numbered_clips(tmp_path / "clips", [5, 3, 8, 4])
    (root / "4.png").write_bytes((root / "2.png").read_bytes())
    (root / "4.txt").write_text((root / "2.txt").read_text())  # the same clip again
    (root / "5.png").write_bytes((root / "2.png").read_bytes())
    (root / "5.txt").write_text("another caption")
    return root


def fill(folder: Path, encoders: Any, decode: Any = None) -> tuple[Any, FeatureCache, dict[int, str]]:
    index = build_index(folder, DecodeLimits(), folder.parent / "index", drop_duplicates=False, workers=1)
    out = folder.parent / "cache"
    cache = FeatureCache(out) if (out / "cache.json").exists() else FeatureCache.create(out, CacheHeader({}, 3, 4, 2, 16, 32))
    plain = lambda clip_id: frames_of(index.place(clip_id).path)  # noqa: E731
    keys = [key.decode() for key in clip_keys(index)]
    return fill_cache(cache, index, decode or plain, maker(encoders)), cache, dict(zip(index.trainable.tolist(), keys, strict=True))


def frames_of(path: Path) -> np.ndarray:
    return decode_clip(path, SIDE, (255, 255, 255), DecodeLimits())


def test_every_clip_is_made_once_and_damaged_ones_again(folder, encoders):
    filled, cache, keys = fill(folder, encoders)
    assert (filled.made, filled.kept, filled.broken) == (5, 0, [])
    assert keys[2] == keys[4] != keys[5] and all(cache.flaw(key) is None for key in keys.values())
    for clip_id, frames in enumerate([5, 3, 8, 4]):
        clip = cache.open(keys[clip_id], "")
        assert clip.take([frames - 1], 0).latents.shape == (1, 4, 2, 2)
        with pytest.raises(CacheError):
            clip.take([frames], 0)
    assert cache.open(keys[5], "").texts[0] == "another caption"
    stamps = {key: cache.path(key).stat().st_mtime_ns for key in keys.values()}
    path = cache.path(keys[1])
    path.write_bytes(path.read_bytes()[:-2])
    (folder / "3.txt").write_text("renamed")
    filled, _, again = fill(folder, encoders)
    assert (filled.made, filled.kept) == (2, 3)
    assert cache.flaw(keys[1]) is None and cache.open(again[3], "").texts[0] == "renamed"
    assert {key for key in stamps if cache.path(key).stat().st_mtime_ns != stamps[key]} == {keys[1]}


def test_what_may_pass_marks_no_clip_and_the_next_fill_makes_it(folder, encoders):
    def decode(clip_id: int) -> np.ndarray:
        if clip_id == 1:
            raise ClipError("anything", "missed the deadline", transient=True)
        return frames_of(folder / f"{clip_id}.png")

    filled, cache, keys = fill(folder, encoders, decode)
    assert (filled.made, filled.kept, filled.broken) == (4, 0, [])
    assert [(problem.path, problem.reason) for problem in filled.put_off] == [("1.png", "missed the deadline")]
    assert cache.broken(keys[1]) is None
    filled, cache, keys = fill(folder, encoders)
    assert (filled.made, filled.kept, filled.put_off) == (1, 4, []) and cache.flaw(keys[1]) is None


def test_a_clip_that_cannot_be_decoded_is_listed_and_tried_again(folder, encoders):
    def decode(clip_id: int) -> np.ndarray:
        if clip_id in (0, 3):
            raise ClipError("anything", {0: "has changed since it was indexed", 3: "timed out"}[clip_id])
        return frames_of(folder / f"{clip_id}.png")

    filled, cache, keys = fill(folder, encoders, decode)
    assert (filled.made, filled.kept) == (3, 0)
    assert [problem.path for problem in filled.broken] == ["0.png", "3.png"]
    assert filled.broken[0].reason == "has changed since it was indexed" and len(filled.broken[0].content) == 64
    assert cache.broken(keys[3]) == "timed out" and cache.broken(keys[1]) is None
    filled, _, _ = fill(folder, encoders)
    assert (filled.made, filled.kept, filled.broken) == (2, 3, []) and cache.broken(keys[3]) is None
