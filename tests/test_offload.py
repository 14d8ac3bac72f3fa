"""Model offload: accelerate's hooks, as `enable_model_cpu_offload` sets them, are all that brings a part to the device.

There may be no GPU here, so "away from the device" is played by weights that are empty: a call that goes around its hook computes with
nothing and fails, and a part that is not sent away again is seen.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from accelerate.hooks import CpuOffload, UserCpuOffloadHook, add_hook_to_module
from torch import nn

from rdtf_ds.models.devices import compute_device
from rdtf_ds.models.tiny_encoders import tiny_autoencoder
from rdtf_ds.pipeline import RDTFPipeline
from tests.small_models import SIDE, make_pipeline, small_dfgn, text_parts

RED = np.full((SIDE, SIDE, 3), (200, 30, 30), np.uint8)


class AwayHook(CpuOffload):
    """accelerate's CpuOffload with the CPU as the device and nothing as the place to wait in."""

    def __init__(self, module: nn.Module, prev_module_hook: Any, log: list[str], name: str) -> None:
        super().__init__(torch.device("cpu"), prev_module_hook)
        self.log, self.name = log, name
        self.tensors = list(chain(module.parameters(), module.buffers()))
        self.kept = [tensor.data for tensor in self.tensors]

    @property
    def away(self) -> bool:
        return not any(tensor.numel() for tensor in self.tensors)

    def leave(self) -> None:
        for tensor in self.tensors:
            tensor.data = tensor.data.new_empty(0)

    def come(self) -> None:
        for tensor, data in zip(self.tensors, self.kept, strict=True):
            tensor.data = data

    def init_hook(self, module: nn.Module) -> nn.Module:
        self.leave()
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.prev_module_hook is not None and not self.prev_module_hook.hook.away:
            self.prev_module_hook.offload()
        if self.away:
            self.log.append(self.name)
            self.come()
        return args, kwargs

    def detach_hook(self, module: nn.Module) -> nn.Module:
        self.come()
        return module


class AwayHandle(UserCpuOffloadHook):
    def offload(self) -> None:
        self.hook.leave()


@pytest.fixture
def arrivals(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which parts came to the device, in order, once a pipeline of this test has model offload."""
    log: list[str] = []

    def offload_with_hook(module: nn.Module, device: Any, prev_module_hook: Any = None) -> tuple[nn.Module, AwayHandle]:
        hook = AwayHook(module, prev_module_hook, log, type(module).__name__)
        add_hook_to_module(module, hook, append=True)
        return module, AwayHandle(module, hook)

    monkeypatch.setattr(accelerate, "cpu_offload_with_hook", offload_with_hook)
    return log


def test_every_part_comes_by_its_hook_and_leaves_again(arrivals):
    expected = make_pipeline(text_parts(), small_dfgn())
    pipeline = make_pipeline(text_parts(), small_dfgn())
    pipeline.enable_model_cpu_offload(device="cpu")
    hooks = [handle.hook for handle in pipeline._all_hooks]
    assert len(hooks) == 4 and all(hook.away for hook in hooks)
    options = {"prompt": ["a red star", None], "frames": {0: RED}, "num_inference_steps": 3, "seeds": [4, 5]}
    present: list[list[str]] = []

    def look(owner: RDTFPipeline, number: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        present.append([hook.name for hook in hooks if not hook.away])
        return {}

    clips = pipeline(**options, callback_on_step_end=look).frames
    assert np.array_equal(clips, expected(**options).frames)
    # CLIP and T5 one after the other, then the autoencoder for the given frame; the network stays for all steps.
    assert arrivals == ["CLIPTextModel", "T5EncoderModel", "HaarAutoencoder", "DFGN"]
    assert all("CLIPTextModel" not in names and "T5EncoderModel" not in names and "DFGN" in names for names in present)
    assert len(present) == 3 and all(handle.hook.away for handle in pipeline._all_hooks)
    assert np.array_equal(pipeline(**options).frames, clips), "a second call"


def test_a_learned_autoencoder_too(arrivals):
    vae = tiny_autoencoder()
    channels = vae.config.latent_channels
    parts = text_parts()
    unet = small_dfgn()
    config = {**{key: value for key, value in unet.config.items() if not key.startswith("_")}}
    torch.manual_seed(0)
    unet = type(unet)(**{**config, "in_channels": 2 * channels, "out_channels": channels}).eval()
    size = 4 * 2 ** (len(vae.config.block_out_channels) - 1)
    pictures = {0: np.full((size, size, 3), 90, np.uint8)}
    plain = make_pipeline(parts, unet, image_size=size)
    plain.register_modules(vae=vae)
    options = {"prompt": "a star", "frames": pictures, "num_inference_steps": 2, "seeds": 1}
    expected = plain(**options).frames
    plain.enable_model_cpu_offload(device="cpu")
    assert np.array_equal(plain(**options).frames, expected)
    assert arrivals.count("AutoencoderKL") == 1 and arrivals.count("DFGN") == 1


def test_where_a_module_computes():
    module = nn.Linear(2, 2)
    assert compute_device(module) == torch.device("cpu")
    add_hook_to_module(module, CpuOffload(torch.device("meta")))  # waits on the CPU, computes elsewhere
    assert module.weight.device == torch.device("cpu")
    assert compute_device(module) == torch.device("meta") == compute_device(nn.Sequential(module))
    with pytest.raises(ValueError, match="on no device"):
        compute_device(nn.Identity())
