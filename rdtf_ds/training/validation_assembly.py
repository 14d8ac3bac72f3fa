"""Validation of a run, put together from its experiment: which clips it is about, and what makes and measures them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import numpy as np
import torch

from rdtf_ds.config import RDTFSection
from rdtf_ds.data.clips.clip import ClipError
from rdtf_ds.data.clips.decoding import decode_clip
from rdtf_ds.data.indexing.index import ClipIndex
from rdtf_ds.diffusion.masks import evenly_spaced
from rdtf_ds.errors import UserError, on_every_rank
from rdtf_ds.pipeline import RDTFPipeline
from rdtf_ds.seeding import numpy_generator
from rdtf_ds.training.assembly import Run
from rdtf_ds.training.collectives import gather_objects, on_rank_zero
from rdtf_ds.training.data_assembly import decode_limits
from rdtf_ds.training.encoders import encoder_dtype, load_encoders
from rdtf_ds.training.held_out import HeldOutClip, HeldOutLoss
from rdtf_ds.training.memory_watch import MemoryWatch
from rdtf_ds.training.objective import FrozenEncoders
from rdtf_ds.training.telemetry import RunLog
from rdtf_ds.training.validation import Validation
from rdtf_ds.training.validation_clips import Request, make_requests
from rdtf_ds.training.validation_fvd import RealClip, TrainingFVD, fvd_weights
from rdtf_ds.training.validation_pipeline import LatePipeline, around
from rdtf_ds.training.validation_units import attempt
from rdtf_ds.training.visiting_pipeline import visiting_pipeline

_log = logging.getLogger(__name__)


def build_validation(run: Run, log: RunLog, memory: MemoryWatch, hurry: Callable[[], bool]) -> Validation:
    """Validation as the experiment asks for it; one that is never due where it asks for none. Called by all ranks.

    Args:
        hurry: Whether any rank was asked to stop, without a collective.

    Raises:
        UserError: FVD is asked for, and its weights are not here or there are not enough clips; on all ranks alike.
    """
    rdtf, keys = run.experiment.rdtf, run.experiment.rdtf.validation
    pipeline, requests, losses, fvd = None, list[Request](), None, None
    if keys.interval:
        encoders = run_encoders(run)
        pipeline, requests, losses = build_pipeline(run, encoders), validation_requests(run), _build_losses(run, encoders)
        pipeline.set_progress_bar_config(disable=True)
        fvd = _build_fvd(run, log) if keys.fvd_interval else None
    return Validation(
        run.engine,
        run.ema,
        log,
        memory,
        run.folder,
        pipeline,
        requests,
        keys.steps,
        losses,
        fvd,
        keys.fvd_interval,
        held_out=len(run.index.held_out) > 0,
        interval=keys.interval,
        last=rdtf.max_steps,
        max_share=keys.max_share,
        hurry=hurry,
    )


def _build_losses(run: Run, encoders: Callable[[], FrozenEncoders]) -> HeldOutLoss | None:
    keys, engine = run.experiment.rdtf.validation, run.engine
    clips = held_out_clips(run)
    if not clips:
        return None
    return HeldOutLoss(clips, keys.timesteps, run.experiment.rdtf.seed, run.objective, encoders, engine.rank, engine.world_size)


class LateEncoders:
    """The frozen encoders of a run that trains from a cache: loaded on the CPU when validation first needs them, and kept.

    If that fails, every later call says so again without another try.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._loaded: FrozenEncoders | None = None
        self._failure: Exception | None = None

    def __call__(self) -> FrozenEncoders:
        """Text is encoded on the CPU, and kept; the autoencoder visits the network's device.

        Raises:
            UserError: They cannot be loaded.
        """
        if self._failure is not None:
            raise self._failure
        if self._loaded is None:
            if self._run.engine.rank == 0:
                _log.warning("Validation needs the frozen encoders, which training from the cache does not: loading them on the CPU")
            try:
                self._loaded = self._load()
            except Exception as error:
                self._failure = error
                raise
        return self._loaded

    def _load(self) -> FrozenEncoders:
        device = self._run.engine.device
        autoencoder, text = load_encoders(self._run.experiment.rdtf, torch.float32, torch.device("cpu"))
        return FrozenEncoders(autoencoder.to(dtype=encoder_dtype(self._run.experiment, device)).visit(device), text)


def run_encoders(run: Run) -> Callable[[], FrozenEncoders]:
    """The encoders a run trains with; of one that has none, ones loaded late."""
    encoding = run.objective.encoding
    return (lambda: encoding) if isinstance(encoding, FrozenEncoders) else LateEncoders(run)


def build_pipeline(run: Run, encoders: Callable[[], FrozenEncoders] | None = None) -> RDTFPipeline | LatePipeline:
    """The generation pipeline around the live network, for validation.

    Args:
        encoders: From `run_encoders`, to be shared; None: its own.
    """
    rdtf, network = run.experiment.rdtf, run.engine.model
    encoders = encoders or run_encoders(run)
    if isinstance(encoders, LateEncoders):

        def make() -> RDTFPipeline:
            """Takes encoders from whoever loaded them first, or loads them (UserError); text stays on the CPU."""
            late = encoders()
            return visiting_pipeline(network, late.autoencoder, late.text, rdtf)

        return LatePipeline(make)
    build = visiting_pipeline if rdtf.memory.encoders == "cpu" else around
    return build(network, encoders().autoencoder, encoders().text, rdtf)


def validation_ids(index: ClipIndex) -> np.ndarray:
    """Ids of the clips that validation is about: held-out ones, if there are any, else those trained on."""
    return index.held_out if len(index.held_out) else index.trainable


def validation_requests(run: Run) -> list[Request]:
    """The same clips to make at every validation of a run, read once, by rank 0; called by all ranks."""
    rdtf, index = run.experiment.rdtf, run.index

    def decode(clip_id: int) -> np.ndarray | None:
        """All kept frames, uint8 (F, H, W, 3), or None if the clip cannot be read."""
        return _frames(rdtf, index, clip_id)

    # What every rank read for itself could differ, were a file slow or unreadable for one of them.
    return on_rank_zero(
        lambda: make_requests(rdtf.seed, rdtf.validation.clips, validation_ids(index), index.caption, decode, rdtf.data.frames)
    )


def held_out_clips(run: Run) -> list[HeldOutClip]:
    """The clips whose loss is measured, read once, by rank 0; called by all ranks."""
    rdtf, index = run.experiment.rdtf, run.index

    def clips() -> Iterator[HeldOutClip]:
        """All of them that can be read, in an order drawn with the seed, each read when it is asked for."""
        for clip_id in numpy_generator(rdtf.seed, "held-out clips").permutation(validation_ids(index)).tolist():
            frames = _frames(rdtf, index, clip_id)
            if frames is not None:
                chosen = frames[evenly_spaced(len(frames), min(rdtf.data.frames, len(frames)))]
                yield HeldOutClip(index.path(clip_id), index.caption(clip_id), chosen)

    return on_rank_zero(lambda: [clip for _, clip in zip(range(rdtf.validation.held_out_clips), clips(), strict=False)])


def _frames(rdtf: RDTFSection, index: ClipIndex, clip_id: int) -> np.ndarray | None:
    """All kept frames of a clip, uint8 (F, H, W, 3); None if it cannot be read: training will meet it and quarantine it."""
    try:
        return decode_clip(
            index.place(clip_id),
            rdtf.data.image_size,
            rdtf.data.background,
            decode_limits(rdtf),
            content=index.content(clip_id),
            window=index.window(clip_id),
        )
    except ClipError:
        return None


def _build_fvd(run: Run, log: RunLog) -> TrainingFVD:
    """By all ranks, each of which loads I3D; what one of them refuses, all do."""
    rdtf, index = run.experiment.rdtf, run.index
    wanted, frames = rdtf.validation.fvd_clips, rdtf.data.frames
    ids = on_rank_zero(lambda: _clips_of(index, rdtf.seed, wanted, frames))

    def read(number: int) -> RealClip:
        """The real clip at place ``number`` of ``ids``, ``frames`` evenly spaced frames of it.

        Raises:
            UserError: It cannot be read any more, or became shorter.
        """
        pixels = _frames(rdtf, index, ids[number])
        if pixels is None or len(pixels) < frames:
            raise UserError(f"'{index.path(ids[number])}' can no longer be read.")
        return RealClip(index.caption(ids[number]), pixels[evenly_spaced(len(pixels), frames)])

    built = attempt(
        lambda: TrainingFVD(
            fvd_weights(rdtf),
            len(ids),
            read,
            num_frames=frames,
            side=rdtf.data.image_size,
            steps=rdtf.validation.steps,
            seed=rdtf.seed,
            rank=run.engine.rank,
            world_size=run.engine.world_size,
        )
    )
    for rank, told in enumerate(gather_objects(built.failure)):
        if told is not None:
            raise on_every_rank(UserError(f"rdtf.validation.fvd_interval asks for FVD, which rank {rank} cannot measure: {told}"))
    fvd = built.value
    assert fvd is not None, "no rank failed"
    whose = "held-out clips" if len(index.held_out) else "clips that are trained on"
    log.say(f"FVD every {rdtf.validation.fvd_interval} steps, of {len(ids)} {whose} ({wanted} were asked for): {fvd.variant}")
    return fvd


def _clips_of(index: ClipIndex, seed: int, count: int, frames: int) -> list[int]:
    """Ids of ``count`` clips that have so many frames, or of as many as there are; on rank 0."""
    found: list[int] = []
    for clip_id in numpy_generator(seed, "fvd clips").permutation(validation_ids(index)).tolist():
        if len(found) == count:
            break
        if index.rows[clip_id].kept >= frames:
            found.append(clip_id)
    if len(found) < 2:
        raise UserError(
            f"rdtf.validation.fvd_interval asks for FVD, which compares clips of {frames} frames, and {len(found)} of these are at hand. "
            f"Set it to 0, or hold more clips out (rdtf.data.validation_fraction)."
        )
    return found
