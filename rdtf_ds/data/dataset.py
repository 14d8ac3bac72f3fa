"""Turns a planned micro-batch into tensors: choose frames, decode them, hide words, drop conditions, draw timestep and noise.

Frames are chosen by the features that the index keeps of them, so only the chosen ones are decoded. With a feature cache none is: their
latents and the text's features are read instead, after the same draws.

Everything random is drawn from ``derive_seed(seed, sample number, purpose)``, so a sample is the same whichever worker, rank,
micro-batch or restart makes it. A sample that was passed over adds its attempt to each draw (`draw_key`).

Legend: B samples, F frames of the longest sample of the micro-batch, H W pixels, C h w latent channels and size.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import numpy as np
import torch

from rdtf_ds.data.batch import Batch, StoredFeatures
from rdtf_ds.data.clips.clip import ClipError, DecodeLimits
from rdtf_ds.data.clips.decoding import decode_clip
from rdtf_ds.data.clustering import choose_frames
from rdtf_ds.data.feature_cache import CachedClips, SampleFeatures, nearest_text
from rdtf_ds.data.indexing.index import ClipIndex
from rdtf_ds.data.indexing.problem import Problem
from rdtf_ds.data.sources.captions import NO_CAPTION, hide_words
from rdtf_ds.data.step_plan import SamplePlan, draw_key
from rdtf_ds.diffusion.masks import MAX_FRAMES, evenly_spaced, level, loss_mask
from rdtf_ds.errors import UserError
from rdtf_ds.seeding import derive_seed, numpy_generator, torch_generator

_STAND_IN_ATTEMPTS = 32


class NoUsableClip(UserError):
    """A sample's clip and all its stand-ins failed to decode."""


@dataclass(frozen=True, slots=True)
class DropRates:
    """Probabilities, of each sample, of hiding words and of dropping conditions for guidance. The last three exclude each other."""

    word_hide: float = 0.1
    no_text: float = 0.05
    no_image: float = 0.05
    neither: float = 0.05

    def __post_init__(self) -> None:
        rates = (self.word_hide, self.no_text, self.no_image, self.neither)
        if min(rates) < 0 or max(rates) > 1 or self.no_text + self.no_image + self.neither > 1 + 1e-9:
            raise ValueError(f"drop rates must be probabilities, the last three at most 1 together; got {rates}")


@dataclass(frozen=True, slots=True)
class LatentShape:
    """What noise looks like: ``channels`` × frames × ``size`` × ``size``."""

    channels: int
    size: int


@dataclass
class StickerDataset:
    """Maps a planned micro-batch to a :class:`Batch`; ``dataset[plans]``.

    Args:
        index: the clips.
        seed: of the run.
        latent: shape of the noise.
        image_size: side of the square frames, in pixels.
        background: RGB under transparent pixels and around letterboxed clips.
        limits: of decoding; the same as the index was made with.
        drops: for guidance.
        timesteps: of the noise schedule; drawn from 0 to this, exclusive.
        frames: the most frames of a sample, for which noise is drawn.
        dual_mask: False takes evenly spaced frames instead of one of each cluster (Table 3's arm).
        cached: features of every clip of the index, read in the place of the clips; None: clips are decoded.
    """

    index: ClipIndex
    seed: int
    latent: LatentShape
    image_size: int
    background: tuple[int, int, int] = (255, 255, 255)
    limits: DecodeLimits = field(default_factory=DecodeLimits)
    drops: DropRates = field(default_factory=DropRates)
    timesteps: int = 1000
    frames: int = MAX_FRAMES
    dual_mask: bool = True
    cached: CachedClips | None = None

    def __getitem__(self, micro_batch: Sequence[SamplePlan]) -> Batch:
        """The samples of a micro-batch with no clip barred; see `make`."""
        return self.make(micro_batch)

    def make(self, micro_batch: Sequence[SamplePlan], barred: AbstractSet[str] = frozenset()) -> Batch:
        """Make the samples of a micro-batch and pad them to the longest.

        Args:
            barred: contents that are not even tried: their samples take the stand-in they would have if decoding failed.

        Raises:
            NoUsableClip: a clip and 32 stand-ins failed to decode or are barred.
            UserError: what the index or the cache keeps of a clip is gone or damaged.
        """
        return collate([self._sample(plan, barred) for plan in micro_batch])

    def _sample(self, plan: SamplePlan, barred: AbstractSet[str]) -> _Sample:
        shown: np.ndarray | SampleFeatures
        problems: list[Problem] = []
        if self.cached is None:
            clip_id, shown, problems = self._decoded(plan, barred)
            caption, condition_mask = self._conditions(plan, self.index.caption(clip_id))
        else:
            clip_id, clip = plan.clip_id, self.cached.open(plan.clip_id)
            caption, condition_mask = self._conditions(plan, self.index.caption(clip_id))
            # A generator costs more than all the rest of this choice, and a text that is there needs none.
            text = clip.texts.index(caption) if caption in clip.texts else nearest_text(clip.texts, caption, self._rng(plan, "variant"))
            shown, caption = clip.take(self._choose(clip_id, plan).tolist(), text), clip.texts[text]
        timestep = int(self._rng(plan, "timestep").integers(self.timesteps))
        generator = torch_generator(self.seed, *draw_key(plan.sample_number, "noise", plan.attempt))
        noise = torch.randn(self.latent.channels, self.frames, self.latent.size, self.latent.size, generator=generator)
        return _Sample(plan, clip_id, shown, caption, condition_mask, timestep, noise[:, : plan.k], problems)

    def _rng(self, plan: SamplePlan, purpose: str) -> np.random.Generator:
        return numpy_generator(self.seed, *draw_key(plan.sample_number, purpose, plan.attempt))

    def _decoded(self, plan: SamplePlan, barred: AbstractSet[str]) -> tuple[int, np.ndarray, list[Problem]]:
        """The planned clip, or the first stand-in that decodes: its id, its chosen frames, and what failed before it."""
        problems: list[Problem] = []
        last = ""
        for failures in range(_STAND_IN_ATTEMPTS + 1):
            clip_id = plan.clip_id if failures == 0 else self._stand_in(plan, failures)
            content = self.index.content(clip_id)
            if content in barred:
                last = f"'{self.index.path(clip_id)}': it failed two samples before and is not tried any more"
                continue
            try:
                return clip_id, self._decode(clip_id, self._choose(clip_id, plan)), problems
            except ClipError as error:
                path = self.index.path(clip_id)
                problems.append(Problem(path, error.reason, plan.sample_number, content))
                last = f"'{path}': {error.reason}"
        raise NoUsableClip(
            f"sample {plan.sample_number}: {_STAND_IN_ATTEMPTS + 1} clips in a row cannot be decoded, the last one {last}. "
            f"Is the data folder '{self.index.root}' still there and readable?"
        )

    def _decode(self, clip_id: int, chosen: np.ndarray) -> np.ndarray:
        index = self.index
        return decode_clip(
            index.place(clip_id),
            self.image_size,
            self.background,
            self.limits,
            frames=chosen.tolist(),
            content=index.content(clip_id),
            window=index.window(clip_id),
        )

    def _stand_in(self, plan: SamplePlan, failures: int) -> int:
        """Another clip, from the seed alone: with enough frames for the planned mask if there is any."""
        ids = self.index.trainable[self.index.frame_counts >= plan.k]
        if not len(ids):
            ids = self.index.trainable
        key = draw_key(plan.sample_number, "stand-in", plan.attempt)
        return int(ids[derive_seed(self.seed, *key, failures) % len(ids)])

    def _choose(self, clip_id: int, plan: SamplePlan) -> np.ndarray:
        """Numbers of the frames used, rising; only a stand-in with fewer than k frames shows some twice."""
        features = self.index.frame_features(clip_id)
        if len(features) < plan.k:
            return np.arange(plan.k) * len(features) // plan.k
        if not self.dual_mask:
            return evenly_spaced(len(features), plan.k)
        return choose_frames(features, plan.k, self._rng(plan, "frames"))

    def _conditions(self, plan: SamplePlan, caption: str) -> tuple[str, np.ndarray]:
        """The caption and condition mask after the drops that guidance needs.

        A drop never takes the only condition a sample has: nothing at all is shown with probability ``neither`` and no other,
        but always where a clip without a caption meets the empty mask.
        """
        drops, draw = self.drops, self._rng(plan, "drops").random()
        no_text = draw < drops.no_text
        no_image = drops.no_text <= draw < drops.no_text + drops.no_image
        neither = drops.no_text + drops.no_image <= draw < drops.no_text + drops.no_image + drops.neither
        has_image, has_text = any(plan.mask), plan.text and bool(caption.strip())
        hide_all = neither or not has_text or (no_text and has_image)
        hide_image = neither or (no_image and has_text)
        words = hide_words(caption, 1.0 if hide_all else drops.word_hide, self._rng(plan, "words")) if caption.strip() else NO_CAPTION
        mask = np.array(plan.mask, bool)
        return words, np.zeros_like(mask) if hide_image else mask


@dataclass(frozen=True, slots=True)
class _Sample:
    """One sample before padding: shown is frames uint8 (k, H, W, 3) or features, condition_mask bool (k,), noise float32 (C, k, h, w)."""

    plan: SamplePlan
    clip_id: int
    shown: np.ndarray | SampleFeatures
    caption: str
    condition_mask: np.ndarray
    timestep: int
    noise: torch.Tensor
    problems: list[Problem]


def collate(samples: Sequence[_Sample]) -> Batch:
    """Stack samples, each padded at its end to the longest."""
    lengths = [len(sample.condition_mask) for sample in samples]
    longest = max(lengths)
    frames = [torch.from_numpy(sample.shown).permute(3, 0, 1, 2) for sample in samples if isinstance(sample.shown, np.ndarray)]
    features = [sample.shown for sample in samples if isinstance(sample.shown, SampleFeatures)]
    condition_mask = torch.zeros(len(samples), longest, dtype=torch.bool)
    for row, sample in enumerate(samples):
        condition_mask[row, : lengths[row]] = torch.from_numpy(sample.condition_mask)
    plans = [sample.plan for sample in samples]
    return Batch(
        frames=_padded(frames, longest) if frames else None,
        condition_mask=condition_mask,
        frame_mask=torch.tensor([loss_mask(length, longest) for length in lengths]),
        captions=[sample.caption for sample in samples],
        timestep=torch.tensor([sample.timestep for sample in samples], dtype=torch.int64),
        noise=_padded([sample.noise for sample in samples], longest),
        tasks=[plan.task for plan in plans],
        levels=[level(plan.mask) for plan in plans],
        sample_numbers=[plan.sample_number for plan in plans],
        clip_ids=[sample.clip_id for sample in samples],
        problems=[problem for sample in samples for problem in sample.problems],
        features=_stacked(features, longest) if features else None,
    )


def _padded(samples: Sequence[torch.Tensor], longest: int) -> torch.Tensor:
    """(C, k, H, W) each, k its own -> (B, C, longest, H, W), zero where there is nothing."""
    channels, _, height, width = samples[0].shape
    stacked = samples[0].new_zeros(len(samples), channels, longest, height, width)
    for row, sample in enumerate(samples):
        stacked[row, :, : sample.shape[1]] = sample
    return stacked


def _stacked(samples: Sequence[SampleFeatures], longest: int) -> StoredFeatures:
    pixels = [sample.pixels.transpose(0, 1) for sample in samples if sample.pixels is not None]
    return StoredFeatures(
        _padded([sample.latents.transpose(0, 1) for sample in samples], longest),
        _padded(pixels, longest) if pixels else None,
        torch.stack([sample.clip for sample in samples]),
        torch.stack([sample.t5 for sample in samples]),
    )
