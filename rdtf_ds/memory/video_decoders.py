"""The processes that decode WebM and MP4 for a rank (`rdtf_ds.data.clips.decoder_pool`): on the CPU, beside all that a plan counts.

Whether there are any hangs on the clips, which a plan knows nothing of. So they stand beside it, and no run is refused for them.
"""

from __future__ import annotations

RESIDENT_BYTES = 82_000_000
"""Of one that has decoded clips of 72 frames of 256×256 pixels, 8 of each chosen; 48 MB of it are libraries, which all of them share.
Measured (docs/memory.md)."""
LARGE_BYTES = 472_000_000
"""The most of one that decodes all 60 frames of 2048×2048 pixels, near the default of ``rdtf.data.max_total_pixels``. Measured."""


def video_decoders(workers: int, encoders: str) -> int:
    """How many a rank has once it has met videos: one for each process that loads clips.

    Args:
        workers: ``rdtf.data.workers``; 0: the rank loads them itself.
        encoders: As `rdtf_ds.memory.planner.Setup` has it; from a cache no clip is decoded.
    """
    return 0 if encoders == "cached" else max(1, workers)
