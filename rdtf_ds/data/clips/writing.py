"""Writes animations (GIF, WebP, APNG, MP4, WebM) and contact sheets, each file whole or not at all.

Shapes: frames are uint8 (F, H, W, 3) RGB or (F, H, W, 4) RGBA, alpha not premultiplied.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import av
import numpy as np
from av import Packet
from av.container import OutputContainer
from av.video.stream import VideoStream
from PIL import Image, ImageDraw, ImageFont

from rdtf_ds.data.clips.containers import LONGEST_MS, join_apng, join_gif, join_webp
from rdtf_ds.data.clips.metadata import gif_block, png_block, to_comment, webp_block
from rdtf_ds.errors import UserError

OPAQUE_FROM = 128  # GIF knows only opaque and transparent
PAPER = (232, 232, 236)  # what a sheet is made of: clips are mostly white at their edges
LABEL_WIDTH, LABEL_MARGIN, LABEL_LINE, CELL_GAP = 200, 6, 16, 2


def write_clip(
    frames: np.ndarray, path: str | Path, durations_ms: int | Sequence[int] = 100, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write an animation; the suffix chooses the format, and the file holds exactly as many frames as are given.

    GIF gets its own palette for each frame (exact up to 256 colours), WebP and APNG are lossless, WebM is VP9 and keeps alpha,
    MP4 is H.264 and puts alpha on white. The file appears under its name only when it is complete.

    Args:
        frames: uint8 (F, H, W, 3|4), F ≥ 1.
        path: ends in .gif .webp .png .apng .mp4 or .webm; the folder is made if it is missing.
        durations_ms: milliseconds each frame is shown, 1 to :data:`LONGEST_MS`: one number for all, or F of them.
        metadata: what the file says of itself, JSON-able; `read_metadata` of metadata.py reads it.
    Raises:
        UserError: unknown suffix.
        ValueError: frames of another shape or type, or durations that do not fit.
        TypeError, ValueError: metadata that JSON has no form for.
    """
    path = Path(path)
    encode = _ENCODERS.get(path.suffix.lower())
    if encode is None:
        raise UserError(f"cannot write '{path}': the suffix '{path.suffix}' is not one of {', '.join(_ENCODERS)}.")
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] not in (3, 4) or 0 in frames.shape:
        raise ValueError(f"frames must be uint8 (F, H, W, 3 or 4) with F ≥ 1, not {frames.dtype} {frames.shape}")
    durations = [durations_ms] * len(frames) if isinstance(durations_ms, int) else [int(duration) for duration in durations_ms]
    if len(durations) != len(frames) or min(durations) < 1 or max(durations) > LONGEST_MS:
        raise ValueError(f"durations_ms must be {len(frames)} numbers from 1 to {LONGEST_MS}, not {durations_ms}")
    write_atomically(path, encode(frames, durations, "" if metadata is None else to_comment(metadata)))


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` beside ``path``, then rename, so that a reader or a killed run never leaves half a file under the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch(exist_ok=False)
    except FileExistsError:  # by a process of the same number: one that was killed, or one at work in another container, on another node
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid4().hex}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def contact_sheet(clips: Sequence[np.ndarray], labels: Sequence[str], path: str | Path) -> None:
    """Write one PNG: a row for each clip (its label, then its frames), a column for each frame number.

    Args:
        clips: uint8 (F, H, W, 3|4) each, of any frame counts; the cell size is that of the largest frame.
        labels: one for each clip, wrapped to the label column and cut to the height of its row.
    """
    if len(clips) != len(labels) or not clips:
        raise ValueError(f"{len(clips)} clips need as many labels, and at least one; got {len(labels)}")
    columns = max(len(clip) for clip in clips)
    cell_h = max(48, max(clip.shape[1] for clip in clips))  # three lines of label
    cell_w = max(clip.shape[2] for clip in clips)
    font = ImageFont.load_default(size=13)
    sheet = Image.new("RGB", (LABEL_WIDTH + columns * (cell_w + CELL_GAP), len(clips) * (cell_h + CELL_GAP)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, (clip, label) in enumerate(zip(clips, labels, strict=True)):
        top = row * (cell_h + CELL_GAP)
        lines = (cell_h - LABEL_MARGIN) // LABEL_LINE
        text = wrap(label, LABEL_WIDTH - 2 * LABEL_MARGIN, lines, lambda line: draw.textlength(line, font=font))
        draw.multiline_text((LABEL_MARGIN, top + LABEL_MARGIN), text, fill="black", font=font, spacing=1)
        for column, frame in enumerate(on_white(clip)):
            sheet.paste(Image.fromarray(frame), (LABEL_WIDTH + column * (cell_w + CELL_GAP), top))
    buffer = BytesIO()
    sheet.save(buffer, "PNG")
    write_atomically(Path(path), buffer.getvalue())


def wrap(text: str, width: float, most_lines: int, length: Callable[[str], float]) -> str:
    """Text broken into lines of at most ``width``, between words where that is possible; what is over ends in ``…``.

    Args:
        length: of a line, in the unit of ``width``.
    """
    lines = [""]
    for word in text.split():
        candidate = f"{lines[-1]} {word}".lstrip()
        if length(candidate) <= width:
            lines[-1] = candidate
            continue
        lines += [""] if lines[-1] else []
        for letter in word:  # a word that is wider than a line, or of a script without spaces
            if lines[-1] and length(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
        if len(lines) > most_lines:
            break
    if len(lines) > most_lines:
        last = lines[most_lines - 1]
        while last and length(f"{last}…") > width:
            last = last[:-1]
        lines = [*lines[: most_lines - 1], f"{last}…"]
    return "\n".join(lines)


def on_white(frames: np.ndarray) -> np.ndarray:
    """Frames without alpha, uint8 (F, H, W, 3): over white, rounded to nearest. RGB is handed back as it is, not copied."""
    if frames.shape[-1] == 3:
        return frames
    alpha = frames[..., 3:].astype(np.uint16)
    return ((frames[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _encode_gif(frames: np.ndarray, durations: Sequence[int], comment: str) -> bytes:
    stills = []
    for frame in frames:
        hidden = frame[..., 3] < OPAQUE_FROM if frame.shape[-1] == 4 else np.zeros(frame.shape[:2], bool)
        transparent = bool(hidden.any())
        indices, palette = _palettize(np.ascontiguousarray(frame[..., :3]), 255 if transparent else 256, hidden)
        if transparent:
            indices[hidden] = len(palette)
            palette = np.concatenate([palette, np.zeros((1, 3), np.uint8)])
        image = Image.fromarray(indices)
        image.putpalette(palette.tobytes())
        index = {"transparency": len(palette) - 1} if transparent else {}
        buffer = BytesIO()
        image.save(buffer, "GIF", optimize=False, interlace=0, **index)
        stills.append(buffer.getvalue())
    return join_gif(stills, durations, gif_block(comment))


def _palettize(rgb: np.ndarray, limit: int, ignored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices (H, W) and palette (n ≤ limit, 3) uint8 of an (H, W, 3) picture: exact if it has at most ``limit`` colours."""
    packed = rgb.astype(np.uint32) @ np.array([65536, 256, 1], np.uint32)
    colours = np.unique(packed[~ignored])
    if len(colours) == 0:
        colours = np.zeros(1, np.uint32)
    if len(colours) <= limit:
        indices = np.searchsorted(colours, packed).clip(0, len(colours) - 1).astype(np.uint8)
        return indices, np.stack([colours >> 16, colours >> 8 & 255, colours & 255], axis=1).astype(np.uint8)
    quantized = Image.fromarray(rgb).quantize(limit, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    palette = np.array(quantized.getpalette(), np.uint8).reshape(-1, 3)[:limit]
    return np.array(quantized, np.uint8), palette


def _encode_png(frames: np.ndarray, durations: Sequence[int], comment: str) -> bytes:
    return join_apng([_still(frame, "PNG") for frame in frames], durations, png_block(comment))


def _encode_webp(frames: np.ndarray, durations: Sequence[int], comment: str) -> bytes:
    stills = [_still(frame, "WEBP", lossless=True, exact=True) for frame in frames]
    size = (frames.shape[2], frames.shape[1])
    return join_webp(stills, durations, size, alpha=frames.shape[-1] == 4, metadata=webp_block(comment))


def _still(frame: np.ndarray, format: str, **options: bool) -> bytes:
    buffer = BytesIO()
    Image.fromarray(np.ascontiguousarray(frame)).save(buffer, format, **options)
    return buffer.getvalue()


def _encode_mp4(frames: np.ndarray, durations: Sequence[int], comment: str) -> bytes:
    # x264's vector code made other pixels in about every second process from the same small frames; its plain code does not.
    options = {"crf": "16", "preset": "fast", "x264-params": "asm=0"}
    return _encode_video(on_white(frames), durations, "mp4", ("libx264", "yuv420p", options), comment)


def _encode_webm(frames: np.ndarray, durations: Sequence[int], comment: str) -> bytes:
    pixel_format = "yuva420p" if frames.shape[-1] == 4 else "yuv420p"
    options = {"crf": "20", "b": "0", "deadline": "good", "cpu-used": "5", "auto-alt-ref": "0"}  # alt-ref frames exclude alpha
    return _encode_video(frames, durations, "webm", ("libvpx-vp9", pixel_format, options), comment)


def _encode_video(
    frames: np.ndarray, durations: Sequence[int], container: str, encoding: tuple[str, str, dict[str, str]], comment: str
) -> bytes:
    """``encoding``: codec, pixel format and the codec's options."""
    codec, pixel_format, options = encoding
    # 4:2:0 needs even sides: the last row and column are repeated
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    starts = np.concatenate([[0], np.cumsum(durations)])
    lasts = dict(zip(starts.tolist(), durations, strict=False))
    buffer = BytesIO()
    with av.open(buffer, "w", format=container, options={"fflags": "+bitexact"}) as output:  # else WebM gets random numbers
        if comment:
            output.metadata["comment"] = comment
        rate = Fraction(1000 * len(durations), int(starts[-1])).limit_denominator(1001)
        stream = cast(VideoStream, output.add_stream(codec, rate=rate, options=options))
        stream.height, stream.width = frames.shape[1], frames.shape[2]
        stream.pix_fmt = pixel_format
        stream.codec_context.time_base = Fraction(1, 1000)
        stream.codec_context.thread_count = 1  # the same bytes on any machine
        for picture, start, duration in zip(frames, starts[:-1], durations, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgba" if picture.shape[-1] == 4 else "rgb24")
            frame = frame.reformat(format=pixel_format)
            frame.pts, frame.duration, frame.time_base = int(start), int(duration), Fraction(1, 1000)
            _mux(output, stream.encode(frame), lasts)
        _mux(output, stream.encode(None), lasts)
    return buffer.getvalue()


def _mux(output: OutputContainer, packets: Sequence[Packet[Any]], lasts: Mapping[int, int]) -> None:
    """Encoders forget how long the last frame is shown; ``lasts`` has it for every start, both in milliseconds."""
    for packet in packets:
        if packet.pts is not None and packet.pts in lasts:
            packet.duration = lasts[packet.pts]
        output.mux(packet)


_ENCODERS: dict[str, Callable[[np.ndarray, Sequence[int], str], bytes]] = {
    ".gif": _encode_gif,
    ".webp": _encode_webp,
    ".png": _encode_png,
    ".apng": _encode_png,
    ".mp4": _encode_mp4,
    ".webm": _encode_webm,
}
