"""The feature cache: what goes in comes out, rows alone, and no damage passes for features."""

from __future__ import annotations

import hashlib
import multiprocessing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from rdtf_ds.data.cache_header import CacheError, CacheHeader
from rdtf_ds.data.feature_cache import CachedClips, ClipFeatures, FeatureCache, caption_texts, clip_key, nearest_text
from rdtf_ds.data.sources.captions import NO_CAPTION

KEY = "3f" + "0" * 62
TEXTS = ("a red star", "# # #", "a # star")
HEAD = CacheHeader({"precision": "fp32"}, 8, 4, 2, 6, 5)


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    return FeatureCache.create(tmp_path / "cache", HEAD)


def features(frames: int = 5, dtype: torch.dtype = torch.float32, pixels: bool = True, seed: int = 0) -> ClipFeatures:
    """Three texts of 7 tokens, of which T5's last 3 are padding in all texts and its last 4 in most."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    t5 = draw(3, 7, 5)
    t5[:, 4:] = 0
    t5[1:, 3:] = 0
    small = draw(frames, 3, 2, 2).to(dtype) if pixels else None
    return ClipFeatures(draw(frames, 4, 2, 2).to(dtype), TEXTS, draw(3, 7, 6).to(dtype), t5.to(dtype), small)


def test_a_key_is_of_the_bytes_and_the_caption() -> None:
    first, other = hashlib.sha256(b"1"), hashlib.sha256(b"2")
    assert clip_key(first.hexdigest(), "star") == hashlib.sha256(first.digest() + b"star").hexdigest()
    assert len({clip_key(content.hexdigest(), caption) for content in (first, other) for caption in ("star", "moon", "")}) == 6


def test_the_texts_of_a_caption_hold_it_whole_hidden_and_drawn() -> None:
    caption = "one two three four five six seven eight nine ten"
    texts = caption_texts(caption, 0.3, 8)
    assert texts[:2] == (caption, " ".join("#" * 10)) and len(set(texts)) == len(texts) == 10
    assert texts == caption_texts(caption, 0.3, 8), "every process makes the same"
    assert texts[:6] == caption_texts(caption, 0.3, 4), "more draws leave the first ones as they were"
    hidden = [text.split().count("#") for text in caption_texts(" ".join("w" * 40), 0.3, 200)[2:]]
    assert len(hidden) == 200 and 11 < np.mean(hidden) < 13  # of 40 words
    assert caption_texts(caption, 0.0, 8) == texts[:2] and caption_texts(caption, 1.0, 8) == texts[:2]
    assert caption_texts("", 0.1, 8) == caption_texts("  ", 0.1, 8) == (NO_CAPTION,)
    assert caption_texts("!", 1.0, 1) == ("!", "#")


def test_a_drawn_text_is_stood_for_by_itself_or_by_one_of_the_draws() -> None:
    texts = ("a b c", "# # #", "a # c", "# b c", "a # #")
    rng = np.random.default_rng(0)
    assert [nearest_text(texts, text, rng) for text in texts] == [0, 1, 2, 3, 4]
    assert {nearest_text(texts, "# b #", rng) for _ in range(100)} == {2, 3, 4}
    assert nearest_text(texts, "# b #", np.random.default_rng(3)) == nearest_text(texts, "# b #", np.random.default_rng(3))
    assert nearest_text(texts[:2], "# b #", rng) == 0, "no draw hid a word: the whole caption is the nearest"
    assert nearest_text((NO_CAPTION,), NO_CAPTION, rng) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_come_back_bit_by_bit(cache: FeatureCache, dtype: torch.dtype) -> None:
    stored = features(dtype=dtype)
    cache.write(KEY, stored)
    clip = cache.open(KEY, "a.gif")
    assert clip.texts == TEXTS
    for text in range(3):
        taken = clip.take([0, 3, 4], text)
        assert torch.equal(taken.latents, stored.latents[[0, 3, 4]]) and taken.latents.dtype == dtype
        assert taken.pixels is not None and stored.pixels is not None and torch.equal(taken.pixels, stored.pixels[[0, 3, 4]])
        assert torch.equal(taken.clip, stored.clip[text]) and torch.equal(taken.t5, stored.t5[text])
    assert cache.flaw(KEY) is None
    assert cache.path(KEY) == cache.folder / "clips" / "3f" / f"{KEY}.safetensors"
    assert [path.name for path in cache.path(KEY).parent.iterdir()] == [f"{KEY}.safetensors"], "nothing temporary is left"


def stored_t5(cache: FeatureCache) -> list[int]:
    with safe_open(cache.path(KEY), framework="pt") as file:
        return list(file.get_slice("t5").get_shape())


def test_pixels_are_optional_and_padding_of_t5_takes_no_room(cache: FeatureCache) -> None:
    stored = features(pixels=False)
    cache.write(KEY, stored)
    assert cache.open(KEY, "a.gif").take([1], 0).pixels is None
    assert stored_t5(cache) == [3, 4, 5], "the last 3 tokens are zero in all texts"
    full = replace(stored, t5=torch.ones_like(stored.t5))
    cache.write(KEY, full)
    assert stored_t5(cache) == [3, 7, 5]
    assert torch.equal(cache.open(KEY, "a.gif").take([1], 2).t5, full.t5[2])
    nothing = replace(stored, t5=torch.zeros_like(stored.t5))
    cache.write(KEY, nothing)
    assert torch.equal(cache.open(KEY, "a.gif").take([1], 2).t5, nothing.t5[2])


class Index:
    """Of one clip."""

    def content(self, clip_id: int) -> str:
        return {7: "ab" * 32}[clip_id]

    def caption(self, clip_id: int) -> str:
        return {7: "a star"}[clip_id]

    def path(self, clip_id: int) -> str:
        return {7: "b/c.gif"}[clip_id]


def test_clips_are_found_by_content_and_caption(cache: FeatureCache) -> None:
    clips = CachedClips(cache, Index())
    assert clips.key(7) == clip_key("ab" * 32, "a star")
    stored = features()
    cache.write(clips.key(7), stored)
    assert torch.equal(clips.open(7).take([2], 1).latents, stored.latents[[2]])
    path = cache.path(clips.key(7))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CacheError, match="clip 'b/c.gif'"):
        clips.open(7)


def test_what_is_there_is_listed_without_being_opened(cache: FeatureCache) -> None:
    assert [len(names) for names in cache.stored()] == [0, 0]
    keys = sorted(hashlib.sha256(bytes([number])).hexdigest() for number in range(40))
    for key in keys[:30]:
        cache.path(key).parent.mkdir(parents=True, exist_ok=True)
        cache.path(key).write_bytes(b"")
    for key in keys[30:]:
        cache.mark_broken(key, "torn")
    (cache.path(keys[0]).parent / ".left.123.tmp").write_bytes(b"")
    stored, broken = cache.stored()
    assert stored.tolist() == [key[:32].encode() for key in keys[:30]]
    assert broken.tolist() == [key[:32].encode() for key in keys[30:]]


def test_a_clip_that_is_not_there_is_named_with_the_command(cache: FeatureCache) -> None:
    with pytest.raises(CacheError, match="clip 'b/c.gif' is not in the feature cache") as caught:
        CachedClips(cache, Index()).open(7)
    assert f"tools/cache_dataset.py --deepspeed_config CONFIG [--set ...] --data_dir DIR --out {cache.folder}" in str(caught.value)
    assert cache.flaw(KEY) is not None


def test_a_truncated_file_is_told_at_any_length(cache: FeatureCache) -> None:
    cache.write(KEY, features())
    path = cache.path(KEY)
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CacheError, match=f"{KEY}.*is damaged \\(clip 'a.gif'\\).*made anew: python tools/cache_dataset"):
            cache.open(KEY, "a.gif")
        assert cache.flaw(KEY) is not None
    cache.write(KEY, features())
    assert path.read_bytes() == whole and cache.flaw(KEY) is None


def test_no_flipped_bit_passes(cache: FeatureCache) -> None:
    stored = features()
    cache.write(KEY, stored)
    path = cache.path(KEY)
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    for position in rng.permutation(len(whole))[:400].tolist():
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        if cache.flaw(KEY) is None:  # white space, say
            clip = cache.open(KEY, "a.gif")
            taken = [clip.take(range(5), text) for text in range(3)]
            assert clip.texts == TEXTS, position
            assert all(torch.equal(each.latents, stored.latents) and torch.equal(each.pixels, stored.pixels) for each in taken), position
            assert torch.equal(torch.stack([each.clip for each in taken]), stored.clip), position
            assert torch.equal(torch.stack([each.t5 for each in taken]), stored.t5), position


def test_damage_is_met_where_it_is_read(cache: FeatureCache) -> None:
    """Training must not read a whole clip for eight frames of it; what it reads it checks."""
    stored = features()
    cache.write(KEY, stored)
    path = cache.path(KEY)
    data = bytearray(path.read_bytes())
    at = bytes(data).find(stored.latents[2].numpy().tobytes())
    data[at + 3] ^= 0x40
    path.write_bytes(data)
    clip = cache.open(KEY, "a.gif")
    assert torch.equal(clip.take([1, 3], 0).latents, stored.latents[[1, 3]])
    with pytest.raises(CacheError, match=r"checksum of latents\[2\] differs"):
        clip.take([1, 2], 0)
    assert "latents[2]" in (cache.flaw(KEY) or "")


def test_a_clip_that_could_not_be_decoded_is_remembered_until_it_can(cache: FeatureCache) -> None:
    assert cache.broken(KEY) is None
    cache.mark_broken(KEY, "truncated")
    assert cache.broken(KEY) == "truncated"
    cache.write(KEY, features())
    assert cache.broken(KEY) is None


def test_a_full_disk_is_a_users_error(cache: FeatureCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rdtf_ds.data.feature_cache.write_atomically", full)
    with pytest.raises(CacheError, match=r"cannot be written \(No space left on device\)"):
        cache.write(KEY, features())


def test_a_cache_of_another_run_is_refused(cache: FeatureCache) -> None:
    cache.require({"precision": "fp32"})
    with pytest.raises(CacheError, match='does not fit this run: precision is "bf16" here, but the cache was made with "fp32"'):
        FeatureCache(cache.folder).require({"precision": "bf16"})
    with pytest.raises(CacheError, match="is no feature cache"):
        FeatureCache(cache.folder / "elsewhere")


def _write_often(folder: Path, times: int) -> None:
    writer = FeatureCache(folder)
    for _ in range(times):
        writer.write(KEY, features())


def test_two_processes_may_write_one_clip_while_a_third_reads_it(cache: FeatureCache) -> None:
    cache.write(KEY, features())
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_often, args=(cache.folder, 150)) for _ in range(2)]
    for writer in writers:
        writer.start()
    reads = 0
    while any(writer.is_alive() for writer in writers):
        assert cache.flaw(KEY) is None
        reads += 1
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0] and reads > 5
    assert [path.name for path in cache.path(KEY).parent.iterdir()] == [f"{KEY}.safetensors"]
