"""Samples and micro-batches: what is in them, and what they do not depend on."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rdtf_ds.data import dataset as module
from rdtf_ds.data.batch import Batch
from rdtf_ds.data.cache_header import CacheError, CacheHeader
from rdtf_ds.data.clips.clip import DecodeLimits
from rdtf_ds.data.clips.decoding import decode_clip
from rdtf_ds.data.clustering import choose_frames
from rdtf_ds.data.dataset import DropRates, NoUsableClip
from rdtf_ds.data.feature_cache import CachedClips, ClipFeatures, FeatureCache, caption_texts
from rdtf_ds.data.indexing.problem import Problem
from rdtf_ds.data.sources.captions import NO_CAPTION
from rdtf_ds.data.step_plan import SamplePlan
from rdtf_ds.diffusion.masks import Task
from rdtf_ds.errors import UserError
from rdtf_ds.seeding import derive_seed, numpy_generator
from tests.data.folders import SIDE, dataset, numbered_clips, plan


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return numbered_clips(tmp_path_factory.mktemp("numbered"), [20, 3, 12, 5])


def frame_numbers(batch: Batch, row: int = 0) -> list[int]:
    real = batch.frame_mask[row]
    return (batch.frames[row, 0, real, 0, 0] // 10).tolist()


def same(first: Batch, second: Batch) -> bool:
    for name in Batch.__dataclass_fields__:
        mine, other = getattr(first, name), getattr(second, name)
        if not (torch.equal(mine, other) if isinstance(mine, torch.Tensor) else mine == other):
            return False
    return True


def test_a_micro_batch_is_padded_to_its_longest_and_says_where(root: Path) -> None:
    plans = (plan(7, 0, "##..#", task=Task.INTERPOLATION), plan(8, 1, ".#.", text=False))
    batch = dataset(root)[plans]
    assert batch.frames.shape == (2, 3, 5, SIDE, SIDE) and batch.frames.dtype == torch.uint8
    assert batch.noise.shape == (2, 4, 5, 2, 2) and batch.noise.dtype == torch.float32
    assert batch.frame_mask.tolist() == [[True] * 5, [True, True, True, False, False]]
    assert batch.condition_mask.tolist() == [[True, True, False, False, True], [False, True, False, False, False]]
    assert batch.condition_mask.dtype == batch.frame_mask.dtype == torch.bool and batch.timestep.dtype == torch.int64
    assert (batch.frames[1, :, 3:] == 0).all() and (batch.noise[1, :, 3:] == 0).all() and (batch.noise[1, :, :3] != 0).all()
    assert (batch.frames[0, 1] == 0).all() and (batch.frames[1, 1, :3] == 20).all() and (batch.frames[:, 2] == 0).all()
    assert frame_numbers(batch, 1) == [0, 1, 2]
    chosen = frame_numbers(batch, 0)
    assert len(chosen) == 5 and (np.diff(chosen) > 0).all()
    assert batch.captions == ["one two three four", "# # # #"]
    assert (batch.tasks, batch.levels) == ([Task.INTERPOLATION, Task.GENERATION], [2, 2])
    assert (batch.sample_numbers, batch.clip_ids, batch.problems) == ([7, 8], [0, 1], [])


def test_a_sample_is_the_same_alone_and_together(root: Path) -> None:
    plans = [plan(number, number % 4, "#..") for number in range(8)]
    drops = DropRates(0.5, 0.2, 0.2, 0.2)
    together = dataset(root, drops=drops)[tuple(plans)]
    data = dataset(root, drops=drops)
    for at, one in reversed(list(enumerate(plans))):
        alone = data[(one,)]
        assert torch.equal(alone.frames[0], together.frames[at]) and torch.equal(alone.noise[0], together.noise[at])
        assert torch.equal(alone.condition_mask[0], together.condition_mask[at])
        assert (alone.captions[0], alone.timestep[0]) == (together.captions[at], together.timestep[at])


def test_only_frames_chosen_by_the_stored_features_are_decoded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, decode = [], module.decode_clip
    monkeypatch.setattr(module, "decode_clip", lambda *args, **named: (asked.append(named), decode(*args, **named))[1])
    data = dataset(root)
    batch = data[(plan(4, 0, "#....."),)]
    expected = choose_frames(data.index.frame_features(0), 6, numpy_generator(5, 4, "frames")).tolist()
    assert frame_numbers(batch) == expected and len(set(expected)) == 6
    digest = hashlib.sha256((root / "0.png").read_bytes()).hexdigest()
    assert asked == [{"frames": expected, "content": digest, "window": None}]


def test_everything_random_depends_on_the_seed_and_the_sample_number(root: Path) -> None:
    def draws(seed: int, number: int) -> tuple[str, ...]:
        batch = dataset(root, seed, drops=DropRates(0.5, 0, 0, 0))[(plan(number, 0, "#" + "." * 7),)]
        return str(frame_numbers(batch)), str(batch.noise.sum().item()), str(batch.timestep.item()), batch.captions[0]

    assert draws(5, 3) == draws(5, 3)
    for position in range(4):
        assert len({draws(seed, 3)[position] for seed in range(12)}) > 5
        assert len({draws(5, number)[position] for number in range(12)}) > 5


def share_of_changes(root: Path, make_plan: Callable[[int], SamplePlan], attempts: tuple[int, int], **options: Any) -> dict[str, float]:
    """Of 40 samples, how many differ between two attempts, by field of the batch that does."""
    data, changes = dataset(root, **options), Counter[str]()
    for number in range(40):
        first, second = (data[(replace(make_plan(number), attempt=attempt),)] for attempt in attempts)
        assert same(first, data[(replace(make_plan(number), attempt=attempts[0]),)])
        for name in Batch.__dataclass_fields__:
            mine, other = getattr(first, name), getattr(second, name)
            changes[name] += not (torch.equal(mine, other) if isinstance(mine, torch.Tensor) else mine == other)
    return {name: count / 40 for name, count in changes.items() if count}


@pytest.mark.parametrize("attempts", [(0, 1), (1, 2)])
def test_a_sample_passed_over_draws_all_anew(root: Path, attempts: tuple[int, int]) -> None:
    """Even of the same clip under the same mask: each draw is watched where no other can change its field."""
    every = share_of_changes(root, lambda number: plan(number, 0, "#......."), attempts, drops=DropRates(0.5, 0, 0, 0))
    assert set(every) == {"frames", "captions", "timestep", "noise"}
    assert min(every.values()) > 0.8

    drops = share_of_changes(root, lambda number: plan(number, 1, "#.."), attempts, drops=DropRates(0, 0, 0.5, 0))
    assert set(drops) == {"condition_mask", "timestep", "noise"} and 0.25 < drops["condition_mask"] < 0.75


@pytest.mark.parametrize("attempts", [(0, 1), (1, 2)])
def test_a_sample_passed_over_has_other_stand_ins(tmp_path: Path, attempts: tuple[int, int]) -> None:
    data = dataset(numbered_clips(tmp_path, [3] * 13))
    (tmp_path / "0.png").unlink()
    ids = [[data[(replace(plan(number, 0), attempt=attempt),)].clip_ids[0] for attempt in attempts] for number in range(40)]
    assert sum(first != second for first, second in ids) > 30


def test_draws_of_an_attempt_are_named_by_it(root: Path) -> None:
    data = dataset(root)
    for attempt, key in ((0, ()), (1, (1,)), (2, (2,))):
        batch = data[(replace(plan(3, 0, "#......."), attempt=attempt),)]
        generator = torch.Generator().manual_seed(derive_seed(5, 3, "noise", *key))
        assert torch.equal(batch.noise[0], torch.randn(4, 8, 2, 2, generator=generator))
        assert int(batch.timestep) == numpy_generator(5, 3, "timestep", *key).integers(1000)


def test_noise_is_drawn_for_eight_frames_and_cut(root: Path) -> None:
    data = dataset(root)
    whole = data[(plan(3, 0, "#......."),)].noise
    short = data[(plan(3, 0, "#.."),)].noise
    assert torch.equal(short, whole[:, :, :3])
    expected = torch.randn(4, 8, 2, 2, generator=torch.Generator().manual_seed(derive_seed(5, 3, "noise")))
    assert torch.equal(whole[0], expected)


def test_timesteps_cover_the_schedule_and_nothing_else(root: Path) -> None:
    data = dataset(root, timesteps=4)
    drawn = [int(data[(plan(number, 1),)].timestep) for number in range(60)]
    assert set(drawn) == {0, 1, 2, 3}


def test_without_the_dual_mask_frames_are_evenly_spaced(root: Path) -> None:
    data = dataset(root, dual_mask=False)
    assert frame_numbers(data[(plan(0, 0, "#......."),)]) == [0, 3, 5, 8, 11, 14, 16, 19]
    assert frame_numbers(data[(plan(1, 3, "#...."),)]) == [0, 1, 2, 3, 4]


def outcomes(root: Path, drops: DropRates, visible: str, text: bool, count: int = 400) -> dict[tuple[bool, bool], float]:
    """How often (text shown, image shown)."""
    data = dataset(root, drops=drops)
    batch = data[tuple(plan(number, 1, visible, text) for number in range(count))]
    shown = [(caption != "# # # #", bool(mask.any())) for caption, mask in zip(batch.captions, batch.condition_mask, strict=True)]
    return {outcome: shown.count(outcome) / count for outcome in set(shown)}


def test_drops_have_their_own_shares_and_exclude_each_other(root: Path) -> None:
    rates = outcomes(root, DropRates(0, 0.1, 0.2, 0.3), "#..", text=True)
    for outcome, share in {(False, True): 0.1, (True, False): 0.2, (False, False): 0.3, (True, True): 0.4}.items():
        assert abs(rates[outcome] - share) < 0.075  # three standard deviations of 400 draws


@pytest.mark.parametrize(("visible", "text", "kept"), [("...", True, (True, False)), ("#..", False, (False, True))])
def test_a_drop_never_takes_the_only_condition(root: Path, visible: str, text: bool, kept: tuple[bool, bool]) -> None:
    rates = outcomes(root, DropRates(0, 0.3, 0.3, 0.2), visible, text)
    assert set(rates) == {kept, (False, False)}
    assert abs(rates[(False, False)] - 0.2) < 0.06


@pytest.mark.parametrize("caption", ["", " \n"])
def test_a_clip_without_a_caption_says_so_and_keeps_its_frames(tmp_path: Path, caption: str) -> None:
    root = numbered_clips(tmp_path, [4, 4], caption)
    data = dataset(root, drops=DropRates(0.5, 0.3, 0.4, 0.2))
    batch = data[tuple(plan(number, 1, "#..", text=number % 2 == 0) for number in range(200))]
    assert set(batch.captions) == {NO_CAPTION} == {"# # # #"}
    hidden = [not mask.any() for mask in batch.condition_mask]
    assert abs(sum(hidden) / 200 - 0.2) < 0.085  # "neither" alone, within three standard deviations
    unconditional = dataset(root)[(plan(0, 1, "..."),)]
    assert unconditional.captions == [NO_CAPTION] and not unconditional.condition_mask.any()


def test_drops_leave_level_and_frames_alone(root: Path) -> None:
    all_dropped = dataset(root, drops=DropRates(0, 0, 0, 1))[(plan(0, 0, "##..."),)]
    none_dropped = dataset(root)[(plan(0, 0, "##..."),)]
    assert all_dropped.levels == none_dropped.levels == [3]
    assert torch.equal(all_dropped.frames, none_dropped.frames) and torch.equal(all_dropped.noise, none_dropped.noise)
    assert not all_dropped.condition_mask.any() and all_dropped.captions == ["# # # #"]
    assert all_dropped.frame_mask.all()


@pytest.mark.parametrize("rates", [(0, 0.5, 0.4, 0.2), (1.5, 0, 0, 0), (0, -0.1, 0, 0)])
def test_impossible_drop_rates(rates: tuple[float, float, float, float]) -> None:
    with pytest.raises(ValueError, match="drop rates"):
        DropRates(*rates)


def test_a_clip_that_breaks_is_replaced_by_the_same_clip_everywhere(tmp_path: Path) -> None:
    numbered_clips(tmp_path, [6, 3, 6, 6, 6, 6])
    plans = tuple(plan(number, 0, "#....") for number in range(10))
    first, second = dataset(tmp_path), dataset(tmp_path)
    (tmp_path / "0.png").unlink()
    together = first[plans]
    assert 0 not in together.clip_ids and 1 not in together.clip_ids  # clip 1 is too short for the mask
    assert len(set(together.clip_ids)) > 2
    assert [clip_id * 20 for clip_id in together.clip_ids] == together.frames[:, 1, 0, 0, 0].tolist()
    assert [problem for problem in together.problems if problem.path != "0.png"] == []
    # stand-ins may draw the broken clip again: each failure is told
    assert {problem.sample_number for problem in together.problems} == set(range(10)) and len(together.problems) >= 10
    content = first.index.content(0)
    assert together.problems[0] == Problem("0.png", together.problems[0].reason, 0, content) and len(content) == 64
    assert "No such file" in together.problems[0].reason
    assert all(same(second[(one,)], alone) for one, alone in zip(plans, [first[(one,)] for one in plans], strict=True))
    unbroken = dataset(numbered_clips(tmp_path / "whole", [6, 3, 6, 6, 6, 6]))[plans]
    assert torch.equal(unbroken.noise, together.noise) and torch.equal(unbroken.timestep, together.timestep)


def test_a_file_that_changed_since_it_was_indexed_is_a_problem(tmp_path: Path) -> None:
    numbered_clips(tmp_path, [8, 8])
    data = dataset(tmp_path)
    numbered_clips(tmp_path, [5])
    batch = data[(plan(0, 0),)]
    assert batch.clip_ids == [1]
    assert "changed since it was indexed" in batch.problems[0].reason


def test_with_no_long_enough_stand_in_a_short_one_repeats_frames(tmp_path: Path) -> None:
    numbered_clips(tmp_path, [8, 3])
    data = dataset(tmp_path)
    (tmp_path / "0.png").unlink()
    data.index = data.index.without({0: "gone"})  # none has 8 any more
    batch = data[(plan(0, 0, "##......"),)]
    assert batch.clip_ids == [1] and frame_numbers(batch) == [0, 0, 0, 1, 1, 1, 2, 2]


def test_a_barred_clip_has_the_stand_in_it_would_have_if_it_failed_and_is_not_tried(tmp_path: Path) -> None:
    numbered_clips(tmp_path, [6, 3, 6, 6, 6, 6])
    plans = tuple(plan(number, number % 6 if number % 6 != 1 else 0, "#....") for number in range(18))
    data = dataset(tmp_path)
    whole, barred = data[plans], data.make(plans, frozenset({data.index.content(0)}))
    assert barred.problems == [] and 0 in whole.clip_ids and 0 not in barred.clip_ids
    (tmp_path / "0.png").unlink()
    failed = data[plans]
    assert {problem.path for problem in failed.problems} == {"0.png"}
    assert same(replace(failed, problems=[]), barred)
    again = data.make(plans, frozenset({data.index.content(0), data.index.content(2)}))
    assert not {0, 2} & set(again.clip_ids)
    chosen = [(mine, other) for mine, other in zip(again.clip_ids, barred.clip_ids, strict=True) if other != 2]
    assert chosen and all(mine == other for mine, other in chosen), "what neither plans nor replaces a barred clip is left alone"


def test_when_all_are_barred_it_says_so(tmp_path: Path) -> None:
    data = dataset(numbered_clips(tmp_path, [4, 4]))
    with pytest.raises(NoUsableClip, match=r"33 clips in a row.*'[01].png': it failed two samples before"):
        data.make((plan(0, 0),), {data.index.content(0), data.index.content(1)})


def test_when_nothing_can_be_read_it_stops_and_says_so(tmp_path: Path) -> None:
    numbered_clips(tmp_path, [4, 4])
    data = dataset(tmp_path)
    for path in tmp_path.glob("*.png"):
        path.unlink()
    with pytest.raises(NoUsableClip, match=r"33 clips in a row.*No such file") as caught:
        data[(plan(0, 0),)]
    assert isinstance(caught.value, UserError) and str(tmp_path) in str(caught.value)


def test_to_moves_all_tensors(root: Path) -> None:
    moved = dataset(root)[(plan(0, 0),)].to("meta")
    assert {value.device.type for value in (moved.frames, moved.condition_mask, moved.frame_mask, moved.timestep, moved.noise)} == {"meta"}


@pytest.fixture(scope="module")
def cached(root: Path, tmp_path_factory: pytest.TempPathFactory) -> CachedClips:
    """Of `root`'s clips: a frame's latents are 100 times its clip and its number, pixels their negative; a text's features its length."""
    cache = FeatureCache.create(tmp_path_factory.mktemp("cache"), CacheHeader({}, 4, 4, 2, 6, 5))
    data = dataset(root)
    clips = CachedClips(cache, data.index)
    for clip_id in data.index.trainable.tolist():
        row = data.index.rows[clip_id]
        frames = decode_clip(root / row.path, SIDE, (255, 255, 255), DecodeLimits())
        texts = caption_texts(row.caption, 0.5, 4)
        numbers = 100.0 * clip_id + torch.arange(len(frames))[:, None, None, None]
        lengths = torch.tensor([float(len(text)) for text in texts])[:, None, None]
        features = ClipFeatures(
            numbers.expand(-1, 4, 2, 2), texts,
            lengths.expand(-1, 7, 6), -lengths.expand(-1, 7, 5), -numbers.expand(-1, 3, 2, 2),
        )  # fmt: skip
        cache.write(clips.key(clip_id), features)
    return clips


def test_a_cached_batch_is_of_the_same_draws(root: Path, cached: CachedClips, monkeypatch: pytest.MonkeyPatch) -> None:
    drops = DropRates(0.0, 0.2, 0.2, 0.2)
    plans = tuple(plan(number, number % 4, "#.." if number % 2 else "##.", text=number % 3 > 0) for number in range(24))
    plans = (*plans, plan(24, 0, "#......."))
    plain = dataset(root, drops=drops)[plans]
    monkeypatch.setattr("rdtf_ds.data.dataset.decode_clip", lambda *arguments, **named: pytest.fail("a cached sample decodes nothing"))
    made = dataset(root, drops=drops, cached=cached)[plans]
    assert made.frames is None and plain.features is None and made.features is not None and plain.frames is not None
    for name in set(Batch.__dataclass_fields__) - {"frames", "features"}:
        mine, other = getattr(plain, name), getattr(made, name)
        assert torch.equal(mine, other) if isinstance(mine, torch.Tensor) else mine == other, name
    real = plain.frame_mask
    numbers = plain.frames[:, 0, :, 0, 0] / 10 + 100.0 * torch.tensor(plain.clip_ids)[:, None]
    expected = torch.where(real, numbers, 0.0)[:, None, :, None, None]
    assert torch.equal(made.features.latents, expected.expand(-1, 4, -1, 2, 2))
    assert made.features.pixels is not None and torch.equal(made.features.pixels, -expected.expand(-1, 3, -1, 2, 2))
    lengths = torch.tensor([float(len(caption)) for caption in plain.captions])[:, None, None]
    assert torch.equal(made.features.clip, lengths.expand(-1, 7, 6)) and torch.equal(made.features.t5, -lengths.expand(-1, 7, 5))


def test_hidden_words_of_a_cached_sample_are_among_the_variants(root: Path, cached: CachedClips) -> None:
    drops = DropRates(0.5, 0, 0, 0)
    texts = caption_texts("one two three four", 0.5, 4)
    plans = tuple(plan(number, 0) for number in range(200))
    plain, made = dataset(root, drops=drops)[plans].captions, dataset(root, drops=drops, cached=cached)[plans].captions
    assert set(made) == set(texts)
    assert all(mine == other for mine, other in zip(plain, made, strict=True) if mine in texts)
    assert sum(mine == other for mine, other in zip(plain, made, strict=True)) < 200
    again = [dataset(root, drops=drops, cached=cached)[(one,)].captions[0] for one in plans]
    assert again == made
    whole = torch.tensor([float(len(caption)) for caption in made])
    features = dataset(root, drops=drops, cached=cached)[plans].features
    assert features is not None and torch.equal(features.clip[:, 0, 0], whole), "a caption is told as what its features are of"


def test_cached_features_are_lost_aloud(root: Path, cached: CachedClips, tmp_path: Path) -> None:
    shutil.copytree(cached.cache.folder, tmp_path / "copy")
    moved = CachedClips(FeatureCache(tmp_path / "copy"), cached.index)
    data = dataset(root, cached=moved)
    assert data[(plan(0, 1),)].clip_ids == [1]
    path = moved.cache.path(moved.key(1))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CacheError, match=r"damaged \(clip '1.png'\)"):
        data[(plan(0, 1),)]
    path.unlink()
    with pytest.raises(CacheError, match="clip '1.png' is not in the feature cache"):
        data[(plan(0, 1),)]


def test_to_moves_stored_features(root: Path, cached: CachedClips) -> None:
    moved = dataset(root, cached=cached)[(plan(0, 0),)].to("meta")
    assert moved.frames is None and moved.features is not None and moved.features.pixels is not None
    parts = (moved.features.latents, moved.features.pixels, moved.features.clip, moved.features.t5, moved.noise)
    assert {part.device.type for part in parts} == {"meta"}
