"""What ties a feature cache to an experiment: the keys that its features depend on, and how a run opens its own."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from rdtf_ds.config import EncodersSection
from rdtf_ds.data.cache_header import CacheError, CacheHeader
from rdtf_ds.data.feature_cache import CachedClips, FeatureCache, clip_key
from rdtf_ds.data.index import BROKEN, ClipIndex
from rdtf_ds.errors import UserError
from rdtf_ds.experiment import Experiment
from rdtf_ds.models.autoencoder import AUTOENCODER, FrameAutoencoder
from rdtf_ds.models.local_weights import is_here, weights_hash
from rdtf_ds.models.text_conditioning import CLIP, CLIP_TOKENIZER, T5, T5_TOKENIZER, TextEncoders

_log = logging.getLogger(__name__)
PARTS = {"autoencoder": (AUTOENCODER,), "clip": (CLIP, CLIP_TOKENIZER), "t5": (T5, T5_TOKENIZER)}
"""Of each source of ``rdtf.encoders``, what is loaded from it; the first has the weights."""


def cache_identity(experiment: Experiment) -> dict[str, Any]:
    """By dotted key, everything the features of a clip depend on beside the clip; see `CacheHeader`.

    ``precision`` stands for the encoders' and the stored features' dtypes. Limits of decoding that only refuse files are left out: what
    they let through is the same.
    """
    rdtf, sources = experiment.rdtf, experiment.rdtf.encoders
    identity: dict[str, Any] = {
        f"rdtf.encoders.{name}": {"source": (source := getattr(sources, name)), "weights": weights_hash(source, parts[0])}
        for name, parts in PARTS.items()
    }
    return identity | {
        "rdtf.encoders.text_length": sources.text_length,
        "rdtf.encoders.t5_dtype": sources.t5_dtype,
        "precision": experiment.precision,
        "rdtf.data.image_size": rdtf.data.image_size,
        "rdtf.data.background": list(rdtf.data.background),
        "rdtf.data.max_frames": rdtf.data.max_frames,
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


def clip_keys(index: ClipIndex) -> dict[int, str]:
    """Key of every trainable clip, by id. Reads all their bytes.

    Raises:
        CacheError: A clip is gone or cannot be read.
    """
    rows = [index.rows[clip_id] for clip_id in index.trainable.tolist()]

    def key(path: str, caption: str) -> str:
        try:
            return clip_key(index.root / path, caption)
        except OSError as error:
            raise CacheError(f"'{index.root / path}' cannot be read any more: {error.strerror or error}. Start again.") from error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing lets other threads run
        keys = pool.map(key, (row.path for row in rows), (row.caption for row in rows))
        return dict(zip((row.clip_id for row in rows), keys, strict=True))


def fitting_cache(experiment: Experiment) -> FeatureCache:
    """The cache that a run names.

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
    identity = cache_identity(experiment)
    cache.require(identity)
    known = {key for key, value in cache.header.identity.items() if isinstance(value, dict) and value["weights"]}
    if unseen := sorted(key for key in known if identity[key]["weights"] is None):
        _log.warning("%s: no weights here to compare with those of the feature cache; their names agree", ", ".join(unseen))
    return cache


def open_cache(experiment: Experiment, index: ClipIndex) -> tuple[CachedClips, ClipIndex]:
    """The run's cache, and the index without the clips that could not be decoded when it was made.

    Raises:
        CacheError: It lacks some clip of the index, or no clip of the index could be decoded.
        UserError: As `fitting_cache` says.
    """
    cache = fitting_cache(experiment)
    keys = clip_keys(index)
    absent = [clip_id for clip_id, key in keys.items() if not cache.path(key).is_file()]
    reasons = {clip_id: reason for clip_id in absent if (reason := cache.broken(keys[clip_id])) is not None}
    if missing := [clip_id for clip_id in absent if clip_id not in reasons]:
        raise CacheError(
            f"{len(missing)} of {len(keys)} clips are not in the feature cache '{cache.folder}', the first one "
            f"'{index.rows[missing[0]].path}'. Extend it: {cache.make_command(index.root)}"
        )
    if len(reasons) == len(keys):
        raise CacheError(f"nothing to train on: no clip of '{index.root}' could be decoded for the feature cache '{cache.folder}'.")
    rows = [
        replace(row, status=BROKEN, reason=reasons[row.clip_id]) if row.clip_id in reasons else row for row in index.rows
    ]
    return CachedClips(cache, keys), replace(index, rows=tuple(rows))
