"""Videos of every kind of coding that seeking may stumble over, encoded here, and their frames as PyAV decodes them from end to end."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

TICKS_PER_S = 12_800
SPEED = 25  # frames a second


def pictures(count: int, width: int = 160, height: int = 96) -> np.ndarray:
    """uint8 (F, H, W, 3): a textured background that drifts under a square that jumps, so that no frame looks like another."""
    rows, columns = np.mgrid[:height, :width]
    frames = np.empty((count, height, width, 3), np.uint8)
    for number in range(count):
        for channel, phase in enumerate((0, 2, 4)):
            wave = np.sin((columns + 3 * number) / 9 + phase) + np.cos((rows - 2 * number) / 7 + phase)
            frames[number, ..., channel] = 128 + 50 * wave
        top, left = 7 * number % (height - 20), 11 * number % (width - 20)
        frames[number, top : top + 20, left : left + 20] = (number * 5 % 256, 255 - number * 3 % 256, number * 13 % 256)
    return frames


def encode(path: Path, frames: np.ndarray, codec: str, ticks: Sequence[int] | None = None, **options: str) -> Path:
    """Write frames; ``ticks``: when each is shown, in 1/12,800 s, else 25 a second. Those before 0 are cut away by an edit list in MP4."""
    with av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as output:
        stream = output.add_stream(codec, rate=SPEED, options=options)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.time_base = Fraction(1, TICKS_PER_S)
        stream.codec_context.thread_count = 1
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = ticks[number] if ticks is not None else number * TICKS_PER_S // SPEED
            frame.time_base = Fraction(1, TICKS_PER_S)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def with_hidden_packets(source: Path, path: Path, every: int) -> Path:
    """A VP8 WebM with a picture that nobody sees before each ``every``-th one, as encoders put there for others to refer to."""
    with av.open(str(source)) as original, av.open(str(path), "w") as output:
        stream = output.add_stream_from_template(original.streams.video[0])
        for number, packet in enumerate(original.demux(video=0)):
            if packet.size == 0:
                continue
            if number % every == 0 and not packet.is_keyframe:
                data = bytearray(bytes(packet))
                data[0] &= ~0x10  # show_frame
                hidden = av.Packet(bytes(data))
                hidden.pts, hidden.dts, hidden.time_base, hidden.stream = packet.pts, packet.dts, packet.time_base, stream
                output.mux(hidden)
            packet.stream = stream
            output.mux(packet)
    return path


def all_frames(path: Path) -> np.ndarray:
    """uint8 (F, H, W, 3), from end to end."""
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
