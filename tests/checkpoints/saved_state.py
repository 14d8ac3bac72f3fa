"""Saved state of a run made up of noise, as any number of ranks would have written it: cut in numpy, for comparison with our cuts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScalerBase
from deepspeed.utils.tensor_fragment import fragment_address
from safetensors.torch import save_file

from rdtf_ds.checkpoints.durable import digest_file
from rdtf_ds.checkpoints.store import CheckpointStore

BLOCK = 256
QUANT = "__bnb_optimizer_quant_state__"


class Whole:
    """The state of a run as it would be on one rank, in numpy.

    Args:
        blocks: Length of each group, in blocks of 256 values; the last group has 32-bit moments.
        sizes: Of the parameters at the start of every group; a padding follows.
        started: Whether there are moments.
        offloaded: The moments are those of torch's AdamW.
    """

    def __init__(self, blocks: list[int], sizes: list[int], started: bool = True, seed: int = 0, offloaded: bool = False) -> None:
        rng = np.random.default_rng(seed)
        self.names = [f"weights_{number:03d}" for number in range(len(blocks) - 1)] + ["no_decay_000"]
        self.masters = [rng.standard_normal(BLOCK * n, dtype=np.float32) for n in blocks]
        self.averages = [rng.standard_normal(BLOCK * n, dtype=np.float32) for n in blocks]
        self.moments: list[dict[str, Any]] = []
        qmaps = [rng.standard_normal(BLOCK, dtype=np.float32) for _ in range(2)]
        for n in blocks[:-1] if started else []:
            bytes_ = {key: rng.integers(0, 256, BLOCK * n, dtype=np.uint8) for key in ("state1", "state2")}
            scales = {key: rng.random(n, dtype=np.float32) for key in ("absmax1", "absmax2")}
            self.moments.append({"step": 7, QUANT: {**bytes_, **scales, "qmap1": qmaps[0], "qmap2": qmaps[1]}})
        if started:
            wide = {key: rng.standard_normal(BLOCK * blocks[-1], dtype=np.float32) for key in ("state1", "state2")}
            self.moments.append({"step": 7, QUANT: wide})
        if offloaded:
            self.moments = [{key: rng.standard_normal(BLOCK * n, dtype=np.float32) for key in ("exp_avg", "exp_avg_sq")} for n in blocks]
        self.owners = []  # which parameter each value of a group belongs to
        for n in blocks:
            numbers = np.repeat(np.arange(len(sizes)), sizes)[: BLOCK * n]
            self.owners.append(np.concatenate([numbers, np.full(BLOCK * n - len(numbers), len(sizes))]))

    def written_by(self, world: int) -> list[dict[str, Any]]:
        """Every rank's file."""
        return [self._shard(rank, world) for rank in range(world)]

    def averages_of(self, world: int) -> list[dict[str, torch.Tensor]]:
        """Every rank's EMA."""
        parts = [np.split(flat, world) for flat in self.averages]
        return [
            {name: torch.from_numpy(part[rank].copy()) for name, part in zip(self.names, parts, strict=True)} | {"updates": torch.tensor(4)}
            for rank in range(world)
        ]

    def _shard(self, rank: int, world: int) -> dict[str, Any]:
        def part(flat: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.split(flat, world)[rank].copy())

        def written(entry: dict[str, Any]) -> dict[str, Any]:
            if QUANT not in entry:
                return {"step": torch.tensor(7.0), **{key: part(v) for key, v in entry.items()}}
            nested = {key: torch.from_numpy(v.copy()) if key.startswith("qmap") else part(v) for key, v in entry[QUANT].items()}
            return {"step": entry["step"], QUANT: nested}

        state = {number: written(entry) for number, entry in enumerate(self.moments)}
        fragments = []
        for owners in self.owners:
            mine = np.split(owners, world)[rank]
            fragments.append({f"p{p}": fragment_address(int((mine == p).sum()), int(np.argmax(mine == p))) for p in np.unique(mine)})
        content = {
            "loss_scaler": DynamicLossScaler(1024.0, 2.0, 1000, 1.0, 1, False, True),
            "overflow": False,
            "clip_grad": 0.5,
            "base_optimizer_state": {
                "state": state,
                "param_groups": [{"name": name, "lr": 0.1, "params": [number]} for number, name in enumerate(self.names)],
            },
            "single_partition_of_fp32_groups": [part(flat).requires_grad_() for flat in self.masters],
            "group_paddings": [0] * len(self.names),
            "param_alignment_paddings": [[0, 0] for _ in self.names],
            "partition_count": [world] * len(self.names),
            "ds_version": "0.19.8",
            "param_slice_mappings": fragments,
        }
        ds_config = {"train_batch_size": 60, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 60 // world}
        return {"optimizer_state_dict": content, "ds_config": ds_config, "ds_version": "0.19.8"}


def same(one: Any, other: Any) -> bool:
    """Bit for bit, types and order of keys included."""
    if isinstance(one, torch.Tensor):
        plain = [(tensor.dtype, tuple(tensor.shape), tensor.requires_grad) for tensor in (one, other)]
        return plain[0] == plain[1] and one.detach().cpu().numpy().tobytes() == other.detach().cpu().numpy().tobytes()
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    if is_dataclass(one) or isinstance(one, LossScalerBase):
        return type(one) is type(other) and vars(one) == vars(other)
    return type(one) is type(other) and bool(one == other)


def write_checkpoint(run: Path, whole: Whole, world: int, step: int = 5, prefix: str = "", key: bytes | None = None) -> Path:
    """Commits to a run folder what ``world`` ranks would have; returns the checkpoint."""
    store = CheckpointStore(run / "checkpoints", keep_every=1, key=key)
    partial = store.begin(step, 0)
    shards = whole.written_by(world)
    for rank, (shard, averages) in enumerate(zip(shards, whole.averages_of(world), strict=True)):
        torch.save(shard, partial / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        save_file(averages, partial / f"ema_rank{rank:04d}.safetensors")
    model = {"module": {"w": torch.ones(3)}, "dp_world_size": world, "global_steps": step, "ds_config": shards[0]["ds_config"]}
    torch.save(model, partial / "mp_rank_00_model_states.pt")
    (partial / "curriculum.json").write_text(json.dumps({"plans": [step]}))
    files = {path.name: digest_file(path).to_json() for path in partial.iterdir()}
    final = store.commit(partial, {"step": step, "world_size": world, "may_differ": {}, "files": files})
    config = {**shards[0]["ds_config"], "rdtf": {"seed": 3}}
    del config["gradient_accumulation_steps"]
    (run / "config.json").write_text(json.dumps(config))
    return final
