"""A process group of one rank, and small engines in it, for tests that need real DeepSpeed without a launch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from rdtf_ds.training.engine import StepOutcome, TrainingEngine, start_distributed, stop_distributed
from rdtf_ds.training.optimizer import split_parameters

ALIGNMENT = 256 * 6
EngineMaker = Callable[..., TrainingEngine]


@pytest.fixture(scope="session")
def process_group() -> Iterator[None]:
    start_distributed("cpu", verify_fp16_on_cpu=True)
    del os.environ["MASTER_PORT"]  # in use from here on: runs that tests start must find one of their own
    yield
    stop_distributed()


class TwoLayers(nn.Module):
    """Weights, a norm, biases, and an output that starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 40)
        self.norm = nn.LayerNorm(40)
        self.second = nn.Linear(40, 4)
        self.output = nn.Linear(4, 4, bias=False)
        nn.init.zeros_(self.output.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.second(self.norm(self.first(x)).relu())
        return hidden + self.output(hidden)


def small_engine(
    precision: str = "fp32",
    accumulation: int = 1,
    bits: int = 8,
    clipping: float = 0.0,
    scale_power: int = 10,
    zero: Mapping[str, Any] | None = None,
    sums: str | None = None,
    **options: Any,
) -> TrainingEngine:
    """Engine over `TwoLayers` with the weights of seed 0; keywords go to `TrainingEngine`.

    Args:
        zero: More keys of ``zero_optimization``.
        sums: ``data_types.grad_accum_dtype``.
    """
    torch.manual_seed(0)
    model = TwoLayers()
    groups = split_parameters(model.named_parameters(), 1300, ALIGNMENT, {"output.weight"}, bits)
    config: dict[str, Any] = {
        "train_batch_size": 4 * accumulation * dist.get_world_size(),
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": clipping,
        "zero_optimization": {"stage": 2, **(zero or {})},
        "data_types": {"grad_accum_dtype": sums},
    }
    if precision == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": scale_power, "hysteresis": 1}
    elif precision == "bf16":
        config["bf16"] = {"enabled": True}
    return TrainingEngine(model, groups, config, **({"learning_rate": 1e-2, "warmup_steps": 4} | options))


@pytest.fixture
def make_engine(process_group: None) -> EngineMaker:
    """`small_engine` on one rank."""
    return small_engine


def micro_batch(engine: TrainingEngine, step: int, micro: int, scale: float = 1.0) -> None:
    """Forward and backward of regression on samples that depend on step, micro-batch and rank alone."""
    generator = torch.Generator().manual_seed(100 * step + micro + 10_000 * engine.rank)
    x = torch.randn(4, 32, generator=generator).to(engine.dtype)
    error = engine.forward(x).float() - x[:, :4].float()
    engine.backward(scale * error.square().mean(dim=1), torch.arange(4) + 10 * micro)


def train_steps(engine: TrainingEngine, steps: range, accumulation: int = 1, scale: float = 1.0) -> list[StepOutcome]:
    """Whole steps of `micro_batch`; the outcomes."""
    outcomes = []
    for step in steps:
        for micro in range(accumulation):
            micro_batch(engine, step, micro, scale)
        outcomes.append(engine.step())
    return outcomes


@pytest.fixture
def train() -> Callable[..., list[StepOutcome]]:
    """`train_steps`."""
    return train_steps
