"""A pipeline that answers at once, in colours that its seeds and prompts decide; it remembers its calls."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from rdtf_ds.pipeline import RDTFPipeline
from rdtf_ds.samplers import make_sampler
from rdtf_ds.seeding import numpy_generator

SIDE = 16


class QuickPipeline:
    """Has what generation asks of an RDTFPipeline: ``config``, ``settings`` and a call."""

    settings = RDTFPipeline.settings

    def __init__(self, stop_at: int | None = None) -> None:
        self.config = SimpleNamespace(
            image_size=SIDE, max_frames=8, background=(255, 255, 255), steps=50, eta=1.0, text_scale=7.5, image_scale=7.5, frame_ms=120
        )
        self.scheduler = make_sampler("ddim", "linear", 1000, 0.00085, 0.012)
        self.calls: list[dict[str, Any]] = []
        self.stop_at = stop_at

    def __call__(self, prompts: list[str | None], frames: list[dict[int, Any]], **options: Any) -> Any:
        """Raises KeyboardInterrupt in call number ``stop_at``. What a clip looks like depends on its neighbours, as rounding does."""
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        self.calls.append({"prompts": prompts, "frames": frames, **options})
        count = options["num_frames"] or self.config.max_frames
        seeds = options["seeds"]
        made = [
            numpy_generator(seed, str(prompt), len(prompts), place).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
            for place, (seed, prompt) in enumerate(zip(seeds, prompts, strict=True))
        ]
        return SimpleNamespace(frames=np.stack(made))
