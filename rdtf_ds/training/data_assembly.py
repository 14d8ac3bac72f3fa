"""The data of a run, put together from an experiment: the index that one rank builds for all, the features of a cache, the dataset."""

from __future__ import annotations

import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from rdtf_ds.config import RDTFSection
from rdtf_ds.data.clips.clip import DecodeLimits
from rdtf_ds.data.dataset import DropRates, LatentShape, StickerDataset
from rdtf_ds.data.feature_cache import CachedClips, FeatureCache
from rdtf_ds.data.indexing.index import ClipIndex
from rdtf_ds.data.indexing.index_building import build_index
from rdtf_ds.data.indexing.split_check import split_doubts
from rdtf_ds.data.quarantine import Quarantine, TooManyBadFiles
from rdtf_ds.data.synthetic import write_stickers
from rdtf_ds.errors import UserError, on_every_rank
from rdtf_ds.experiment import Experiment
from rdtf_ds.models.frame_encoder import CLIPFrames
from rdtf_ds.models.local_weights import KnownHashes
from rdtf_ds.training.caching import open_cache
from rdtf_ds.training.collectives import gather_objects, patiently_on_rank_zero
from rdtf_ds.training.heartbeat import START, heartbeat
from rdtf_ds.training.kept_index import Named, index_keys, reopen_or_build

T = TypeVar("T")
_log = logging.getLogger(__name__)
STICKERS, INDEX, THUMBNAIL = "stickers", "index", "thumbnail"


def decode_limits(rdtf: RDTFSection) -> DecodeLimits:
    """What ``rdtf.data`` lets a clip cost when it is examined or decoded: pixels, frames, bytes, seconds."""
    return DecodeLimits(**rdtf.data.limits())


def index_folder(rdtf: RDTFSection, folder: Path) -> Path:
    """Where the index is kept: a folder that runs share, or one in the run folder.

    Raises:
        UserError: It is the folder of the feature cache.
    """
    if rdtf.data.index_dir is None:
        return folder / INDEX
    kept, cache = Path(rdtf.data.index_dir), rdtf.memory.cache_dir
    if cache and kept.resolve() == Path(cache).resolve():
        raise UserError(f"rdtf.data.index_dir and rdtf.memory.cache_dir are one folder, '{kept}'. Give the index and features one each.")
    return kept


def make_index(
    rdtf: RDTFSection, folder: Path, device: torch.device, on_progress: Callable[[int, int], None] | None = None
) -> ClipIndex:
    """Index of the clips an experiment names, or of stickers made on the spot when it names none; by one process.

    Args:
        folder: of the run.
        device: where frames are described, if a model does that.

    Raises:
        UserError: no clips to train on, or a model that is not there.
    """
    root = _ready_root(rdtf, folder)
    return index_clips(rdtf, root, index_folder(rdtf, folder), device, on_progress)


def data_root(rdtf: RDTFSection, folder: Path) -> str:
    """Where the clips are: what the experiment names, or else stickers in the run's folder."""
    return str(folder / STICKERS) if rdtf.data.data_dir is None else rdtf.data.data_dir


def _ready_root(rdtf: RDTFSection, folder: Path) -> str:
    """`data_root`; stickers are made if they are not there."""
    root = data_root(rdtf, folder)
    if rdtf.data.data_dir is None and not (Path(root) / "metadata.jsonl").is_file():  # written last
        shutil.rmtree(root, ignore_errors=True)
        write_stickers(Path(root), rdtf.data.synthetic_clips, rdtf.seed, rdtf.data.image_size)
    return root


def index_clips(
    rdtf: RDTFSection,
    root: str,
    kept: Path,
    device: torch.device,
    on_progress: Callable[[int, int], None] | None = None,
    retry: bool = False,
) -> ClipIndex:
    """Index of a folder, shards or a manifest with an experiment's keys, kept in ``kept``; ``retry`` as in `build_index`."""
    data = rdtf.data
    describer = None if data.frame_features == THUMBNAIL else CLIPFrames(data.frame_features, device, KnownHashes(kept))
    index = build_index(
        root,
        decode_limits(rdtf),
        kept,
        describer=describer,
        on_progress=on_progress,
        retry=retry,
        **data.index_options(),
    )
    if describer is not None and device.type == "cuda":
        del describer
        torch.cuda.empty_cache()  # training has a plan for that memory
    return index


def open_data(
    experiment: Experiment, folder: Path, device: torch.device, named: Named | None = None, reindex: bool = False
) -> tuple[ClipIndex, CachedClips | None]:
    """Index of the clips, and their features if the run trains from a cache. Called by all ranks: rank 0 builds, the others open.

    Args:
        named: The index that the run's checkpoint was trained on, which is opened again but for what `reopen_or_build` says.
        reindex: Build a new one all the same.

    Raises:
        UserError: what `make_index` or `open_cache` refuses, or a rank that cannot open what rank 0 built; on all ranks alike.
    """
    made: list[ClipIndex] = []

    def build(progress: Callable[[], None]) -> bytes:
        """Rank 0's part: the run's index, for a cache without the clips that it could not take, pickled for the others."""
        rdtf = experiment.rdtf
        keys = index_keys(rdtf, _ready_root(rdtf, folder))
        index = reopen_or_build(folder, named, keys, reindex, lambda: make_index(rdtf, folder, device, lambda done, total: progress()))
        for doubt in split_doubts(index):
            _log.warning("%s", doubt)
        if experiment.rdtf.memory.encoders == "cached":
            index = open_cache(experiment, index)
        made.append(index)
        return pickle.dumps(index)  # its place and what it leaves out, no rows

    pickled = patiently_on_rank_zero(build, lambda: heartbeat().beat(START))
    index = _on_every_rank(
        lambda: made[0] if made else pickle.loads(pickled), "rdtf.data.index_dir (without it, rdtf.output_dir)"
    )
    if experiment.rdtf.memory.encoders != "cached":
        return index, None
    return index, _on_every_rank(lambda: CachedClips(FeatureCache(experiment.rdtf.memory.cache_dir or ""), index), "rdtf.memory.cache_dir")


def _on_every_rank(open_it: Callable[[], T], key: str) -> T:
    """Open what rank 0 could open, or raise on all ranks what any of them says."""
    opened: list[T] = []
    fault = None
    try:
        opened.append(open_it())
    except UserError as error:
        fault = str(error)
    for rank, told in enumerate(gather_objects(fault)):
        if told is not None:
            raise on_every_rank(UserError(f"rank {rank} cannot open what rank 0 built: {told} Every node must see the folder of {key}."))
    return opened[0]


def build_dataset(rdtf: RDTFSection, index: ClipIndex, latent: LatentShape, cached: CachedClips | None = None) -> StickerDataset:
    """Makes the planned micro-batches, of clips or of their cached features."""
    data = rdtf.data
    drops = DropRates(data.word_hide_probability, data.no_text_probability, data.no_image_probability, data.neither_probability)
    return StickerDataset(
        index,
        rdtf.seed,
        latent,
        data.image_size,
        background=data.background,
        limits=decode_limits(rdtf),
        drops=drops,
        timesteps=rdtf.diffusion.steps,
        frames=data.frames,
        dual_mask=data.dual_mask,
        cached=cached,
    )


def build_quarantine(rdtf: RDTFSection, folder: Path, index: ClipIndex, write: bool, anew: bool = False) -> Quarantine:
    """The bad files of a run, with what the index calls broken; ``anew`` forgets what training met before.

    Raises:
        TooManyBadFiles: that is more than the run allows.
    """
    total, delay = len(index.rows), rdtf.curriculum.delay
    quarantine = Quarantine(folder / "quarantine.jsonl", rdtf.data.max_bad_fraction, total, write=write, delay=delay, anew=anew)
    quarantine.enter_index(index.problems)
    return quarantine


def why_refused(rdtf: RDTFSection, folder: Path, index: ClipIndex) -> str | None:
    """What a run that starts with this index says of its broken clips when they are too many; None where it starts."""
    try:
        build_quarantine(rdtf, folder, index, write=False, anew=True)
    except TooManyBadFiles as error:
        return str(error)
    return None
