"""What ties a feature cache to an experiment: the keys that its features depend on, and how a run opens its own."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from rdtf_ds.config import EncodersSection
from rdtf_ds.data.cache_header import CacheError, CacheHeader
from rdtf_ds.data.feature_cache import SHORT, FeatureCache, clip_key
from rdtf_ds.data.indexing.index import ClipIndex
from rdtf_ds.errors import UserError
from rdtf_ds.experiment import Experiment
from rdtf_ds.models.autoencoder import AUTOENCODER, FrameAutoencoder
from rdtf_ds.models.local_weights import KnownHashes, is_here, tokenizer_hash, weights_hash
from rdtf_ds.models.text_conditioning import CLIP, CLIP_TOKENIZER, T5, T5_TOKENIZER, TextEncoders

_log = logging.getLogger(__name__)
PARTS = {"autoencoder": (AUTOENCODER,), "clip": (CLIP, CLIP_TOKENIZER), "t5": (T5, T5_TOKENIZER)}
"""Of each source of ``rdtf.encoders``, what is loaded from it; the first has the weights."""


def cache_identity(experiment: Experiment, write: bool = True) -> dict[str, Any]:
    """By dotted key, everything the features of a clip depend on beside the clip; see `CacheHeader`.

    ``precision`` stands for the encoders' and the stored features' dtypes. Limits of decoding that only refuse files are left out: what
    they let through is the same. What frames are chosen by is named although it is in the index: samples made with the cache hang on it.

    Args:
        write: Whether hashes of the encoders' weights may be remembered in the cache's folder.
    """
    rdtf, sources = experiment.rdtf, experiment.rdtf.encoders
    hashes = KnownHashes(rdtf.memory.cache_dir, write)
    identity: dict[str, Any] = {}
    for name, parts in PARTS.items():
        source = getattr(sources, name)
        identity[f"rdtf.encoders.{name}"] = {"source": source, "weights": weights_hash(source, parts[0], hashes)}
        for tokenizer in parts[1:]:
            identity[f"rdtf.encoders.{name}"]["tokenizer"] = tokenizer_hash(source, tokenizer)
    return identity | {
        "rdtf.encoders.text_length": sources.text_length,
        "rdtf.encoders.t5_dtype": sources.t5_dtype,
        "precision": experiment.precision,
        "rdtf.data.image_size": rdtf.data.image_size,
        "rdtf.data.background": list(rdtf.data.background),
        "rdtf.data.max_frames": rdtf.data.max_frames,
        "rdtf.data.frame_features": rdtf.data.frame_features,
        "rdtf.data.word_hide_probability": rdtf.data.word_hide_probability,
        "rdtf.model.guidance": rdtf.model.guidance,
    }


def make_header(experiment: Experiment, autoencoder: FrameAutoencoder, text: TextEncoders, variants: int) -> CacheHeader:
    """Header of a cache that these encoders fill for this experiment."""
    side = experiment.rdtf.data.image_size // autoencoder.factor
    return CacheHeader(cache_identity(experiment), variants, autoencoder.channels, side, text.clip_dim, text.t5_dim)


def absent_encoders(sources: EncodersSection) -> list[str]:
    """Keys of the encoders that cannot be loaded from this machine alone."""
    return [f"rdtf.encoders.{name}" for name, parts in PARTS.items() if not is_here(getattr(sources, name), *parts)]


def clip_keys(index: ClipIndex) -> np.ndarray:
    """`clip_key` of every trainable clip, S64, aligned with ``index.trainable``. Reads nothing but the index."""
    keys = np.empty(len(index.trainable), "S64")
    for place, clip_id in enumerate(index.trainable):
        keys[place] = clip_key(index.content(clip_id), index.caption(clip_id))
    return keys


def fitting_cache(experiment: Experiment, write: bool = True) -> FeatureCache:
    """The cache that a run names.

    Args:
        write: As `cache_identity` has it.

    Raises:
        CacheError: No cache, or one of another experiment.
        UserError: The run validates, and the encoders that it then needs are not here.
    """
    rdtf = experiment.rdtf
    if rdtf.validation.interval and (absent := absent_encoders(rdtf.encoders)):
        raise UserError(
            f"{', '.join(absent)} cannot be loaded from this machine. Training from a feature cache needs no encoders, but the clips of "
            "validation do: train without them, --set rdtf.validation.interval=0, or put the encoders here."
        )
    cache = FeatureCache(rdtf.memory.cache_dir or "")
    identity = cache_identity(experiment, write)
    cache.require(identity)
    known = {key for key, value in cache.header.identity.items() if isinstance(value, dict) and value["weights"]}
    if unseen := sorted(key for key in known if identity[key]["weights"] is None):
        _log.warning("%s: no weights here to compare with those of the feature cache; their names agree", ", ".join(unseen))
    return cache


def open_cache(experiment: Experiment, index: ClipIndex) -> ClipIndex:
    """See that the run's cache has its clips; the index without those that could not be decoded when it was made.

    Raises:
        CacheError: It lacks some clip of the index, or no clip of the index could be decoded.
        UserError: As `fitting_cache` says.
    """
    return clips_of_cache(fitting_cache(experiment), index)


def clips_of_cache(cache: FeatureCache, index: ClipIndex) -> ClipIndex:
    """The index as a run from this cache takes it: what could not be decoded for it is broken.

    Raises:
        CacheError: As `open_cache`.
    """
    keys = clip_keys(index)
    stored, broken = (_are_in(keys.astype(f"S{SHORT}"), names) for names in cache.stored())
    if len(missing := np.flatnonzero(~stored & ~broken)):
        raise CacheError(
            f"{len(missing)} of {len(keys)} clips are not in the feature cache '{cache.folder}', the first one "
            f"'{index.path(index.trainable[missing[0]])}'. Extend it: {cache.make_command(index.source)}"
        )
    if not stored.any():
        raise CacheError(f"nothing to train on: no clip of '{index.source}' could be decoded for the feature cache '{cache.folder}'.")
    gone = np.flatnonzero(~stored)
    return index.without({int(index.trainable[at]): cache.broken(keys[at].decode()) or "could not be decoded" for at in gone})


def _are_in(wanted: np.ndarray, names: np.ndarray) -> np.ndarray:
    """Whether each is among the sorted names."""
    if not len(names):
        return np.zeros(len(wanted), bool)
    found: np.ndarray = names[np.minimum(np.searchsorted(names, wanted), len(names) - 1)] == wanted
    return found
