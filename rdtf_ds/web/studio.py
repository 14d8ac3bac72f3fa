"""The model behind the page: one clip at a time for any number of people, each a GIF with its settings inside."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from rdtf_ds.errors import UserError
from rdtf_ds.generation.jobs import Job
from rdtf_ds.generation.loading import identity_of, load_pipeline
from rdtf_ds.generation.making import make_clips
from rdtf_ds.generation.pictures import open_picture
from rdtf_ds.models.devices import choose_device
from rdtf_ds.pipeline import RDTFPipeline

UPLOADED = {"_type": "gradio.FileData"}
OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Made:
    """A clip that is done: its file, how long it took, and what a person should know of it."""

    path: Path
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass
class Studio:
    """An exported model and the folder its clips go to.

    Attributes:
        pipeline: loaded, on its device.
        folder: exists; the clips of all visitors.
        identity: what every clip's metadata say of the model, see `identity_of`.
    """

    pipeline: RDTFPipeline
    folder: Path
    identity: Mapping[str, Any]
    _busy: threading.Lock = field(default_factory=threading.Lock)
    _made: int = 0

    @property
    def uploads(self) -> Path:
        """Where the page keeps what is uploaded."""
        return self.folder / "uploads"

    def make(self, job: Job, on_step: OnStep = lambda step, steps: None) -> Made:
        """Make one clip; who comes while another is made waits. ``on_step(done, all)`` is called after each sampling step.

        Whatever the pipeline raises goes through; the next call starts afresh.
        """
        with self._busy:
            self._made += 1
            started = time.perf_counter()
            watched = _Watched(self.pipeline, job.steps or self.pipeline.config.steps, on_step)
            numbered = self.folder / f"{self._made:05d}"
            made = make_clips(watched, [job], numbered, batch=1, suffix=".gif", identity=self.identity, fit=True)
            (path,) = (*made.made, *made.kept)
            return Made(Path(path), time.perf_counter() - started, self._fitted(job))

    def _fitted(self, job: Job) -> tuple[str, ...]:
        size = self.pipeline.config.image_size
        notes = []
        for number, picture in job.pictures.items():
            if not isinstance(picture, Image.Image):
                continue
            changes = [f"it was {picture.width} × {picture.height} pixels"] if picture.size != (size, size) else []
            changes += ["it has transparent pixels"] if _transparent(picture) else []
            if changes:
                notes.append(f"Frame {number} was fitted into {size} × {size} on the background: {' and '.join(changes)}.")
        return tuple(notes)


class _Watched:
    """The pipeline, with every call's steps reported."""

    def __init__(self, pipeline: RDTFPipeline, steps: int, on_step: OnStep) -> None:
        self._pipeline, self._steps, self._on_step = pipeline, steps, on_step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._pipeline(*arguments, **options, callback_on_step_end=self._step_done)

    def _step_done(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self._on_step(step + 1, self._steps)
        return tensors


def open_studio(model: Path, folder: Path, device: str = "auto", dtype: str = "auto") -> Studio:
    """Load an exported model for the page; ``folder`` is where clips go.

    Raises:
        UserError: no model there or a damaged one, no GPU, or one without the memory for it.
    """
    device, dtype = choose_device(device, dtype)
    pipeline = load_pipeline(model, device, dtype)
    pipeline.set_progress_bar_config(disable=True)  # the page shows how far a clip is
    return Studio(pipeline, folder, identity_of(model, dtype))


def open_upload(upload: Any, number: int, uploads: Path) -> Image.Image:
    """The picture that was uploaded into slot ``number``.

    Args:
        upload: what the browser sends back: a mapping with the ``path`` that the upload got, and gradio's mark in ``meta``.
        uploads: the folder of all uploads. Nothing else is opened, nor is told whether it exists: a request can be made by hand.

    Raises:
        UserError: it was not uploaded, is no picture, a damaged one, or an animation. The message has the file's name, not where the
            server keeps it.
    """
    path = _uploaded(upload, uploads)
    if path is None:
        raise UserError(f"Frame {number}: its picture was not uploaded here. Choose the file again.")
    try:
        return open_picture(path)
    except UserError as error:
        raise UserError(f"Frame {number}: {error}".replace(str(path), path.name)) from error


def _uploaded(upload: Any, uploads: Path) -> Path | None:
    """The file in ``uploads`` that a request names, links followed; None for anything else."""
    if not isinstance(upload, Mapping) or upload.get("meta") != UPLOADED or not isinstance(upload.get("path"), str):
        return None
    try:
        path = Path(upload["path"]).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):  # absent or too long; with a null byte; links in a circle
        return None
    return path if path.is_relative_to(uploads.resolve()) and path.is_file() else None


def _transparent(picture: Image.Image) -> bool:
    if not picture.has_transparency_data:
        return False
    lowest: Any = picture.convert("RGBA").getchannel("A").getextrema()[0]
    return bool(lowest < 255)
