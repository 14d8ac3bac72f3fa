"""A DFGN, frozen parts and a pipeline small enough for unit tests, and a checkpoint of such a model as a run leaves it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rdtf_ds.models.autoencoder import HaarAutoencoder
from rdtf_ds.models.dfgn import DFGN
from rdtf_ds.models.tiny_encoders import tiny_clip, tiny_t5
from rdtf_ds.pipeline import RDTFPipeline
from rdtf_ds.samplers import make_sampler

SIDE, FACTOR, CHANNELS = 16, 2, 12  # Haar at f = 2: 3·2² channels


def text_parts(width: int = 16) -> dict[str, Any]:
    """CLIP and T5 with their tokenizers, under the pipeline's names."""
    clip, clip_tokenizer = tiny_clip(width)
    t5, t5_tokenizer = tiny_t5(width)
    return {"text_encoder": clip, "tokenizer": clip_tokenizer, "text_encoder_2": t5, "tokenizer_2": t5_tokenizer}


def small_dfgn(guidance: str = "latent", text_width: int = 16) -> DFGN:
    """A DFGN of two narrow levels that answers something, though conv_out starts at zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        unet = DFGN(
            in_channels=CHANNELS + (CHANNELS if guidance == "latent" else 4), out_channels=CHANNELS, block_out_channels=(16, 32),
            attention_levels=(True, False), layers_per_block=1, head_channels=8, norm_groups=8, context_dim=16,
            clip_dim=text_width, t5_dim=text_width, sti_heads=2, sti_head_dim=8, guidance=guidance, attention_backend="sdpa",
        )  # fmt: skip
        torch.nn.init.normal_(unet.conv_out.weight, std=0.3)
    return unet.eval()


def make_pipeline(encoders: dict[str, Any], unet: Any, **settings: Any) -> RDTFPipeline:
    scheduler = make_sampler("ddim", "linear", 1000, 0.00085, 0.012)
    settings = {"image_size": SIDE, "steps": 4, "text_scale": 3.0, "image_scale": 2.0, **settings}
    pipeline = RDTFPipeline(unet=unet, vae=HaarAutoencoder(FACTOR), scheduler=scheduler, **encoders, **settings)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def write_run(run: Path, model: DFGN, world_size: int, step: int = 5, group_size: int = 9000) -> Path:
    """A run folder with one checkpoint: the model's weights as masters, their doubles as EMA. Returns the step folder.

    The layout is DeepSpeed 0.19's and ours, with the objects of DeepSpeed's that a real shard holds.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    from rdtf_ds.checkpoints.durable import digest_file
    from rdtf_ds.checkpoints.manifest import write_manifest
    from rdtf_ds.checkpoints.store import Tag
    from rdtf_ds.training.checkpoint import describe_groups
    from rdtf_ds.training.optimizer import split_parameters

    groups = split_parameters(model.named_parameters(), group_size, alignment=768, zero_initialised=model.zero_initialised_parameters())
    folder = run / "checkpoints" / Tag(1, step).name
    folder.mkdir(parents=True)
    flats = [flatten([parameter for _, parameter in group.parameters], group.padding) for group in groups]
    for rank in range(world_size):
        mine = [flat.chunk(world_size)[rank].clone() for flat in flats]
        state = {
            "loss_scaler": DynamicLossScaler(2.0**16, 2.0, 1000, 1.0, 1, False, False),
            "zero_stage": ZeroStageEnum.gradients,
            "param_slice_mappings": [{"a": fragment_address(numel=3, start=0)}],
            "param_alignment_paddings": [[0] * len(group.parameters) for group in groups],
            "single_partition_of_fp32_groups": [shard.clone().requires_grad_() for shard in mine],  # as DeepSpeed's are
        }
        torch.save({"optimizer_state_dict": state}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        ema = {group.name: 2 * shard for group, shard in zip(groups, mine, strict=True)} | {"updates": torch.tensor(3)}
        save_file(ema, folder / f"ema_rank{rank:04d}.safetensors")
    files = {path.name: digest_file(path).to_json() for path in folder.iterdir()}
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    manifest = {"tag": folder.name, "step": step, "applied_steps": step - 1, "world_size": world_size, "model": config}
    write_manifest(folder, {**manifest, "groups": describe_groups(groups), "files": files})
    rdtf = {
        "data": {"image_size": SIDE, "synthetic_clips": 32},
        "encoders": {"autoencoder": f"haar:{FACTOR}", "clip": "tiny", "t5": "tiny"},
        "sampling": {"steps": 2, "eta": 0.5},
        "diffusion": {"schedule": "scaled_linear"},
    }
    (run / "config.json").write_text(json.dumps({"train_batch_size": 4, "rdtf": rdtf}))
    return folder


def flatten(parameters: list[Tensor], padding: int) -> Tensor:
    """One flat fp32 group, its padding filled with what must never be exported."""
    return torch.cat([*(parameter.detach().float().flatten() for parameter in parameters), torch.full((padding,), float("nan"))])


def load_tool(project_root: Path, name: str) -> ModuleType:
    """A command of tools/ as a module, to call its ``main`` in this process: a start of Python with torch takes seconds."""
    spec = importlib.util.spec_from_file_location(f"tool_{name}", project_root / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = tool  # where dataclasses look their annotations up
    spec.loader.exec_module(tool)
    return tool
