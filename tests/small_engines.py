"""A process group of one rank, and small engines in it, for tests that need real DeepSpeed without a launch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from rdtf_ds.training.engine import TrainingEngine, start_distributed, stop_distributed
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


@pytest.fixture
def make_engine(process_group: None) -> EngineMaker:
    """Engine over `TwoLayers` with the weights of seed 0; keywords go to `TrainingEngine`."""

    def make(
        precision: str = "fp32", accumulation: int = 1, bits: int = 8, clipping: float = 0.0, scale_power: int = 10, **options: object
    ) -> TrainingEngine:
        torch.manual_seed(0)
        model = TwoLayers()
        groups = split_parameters(model.named_parameters(), 1300, ALIGNMENT, {"output.weight"}, bits)
        config = {
            "train_batch_size": 4 * accumulation,
            "train_micro_batch_size_per_gpu": 4,
            "gradient_clipping": clipping,
            "zero_optimization": {"stage": 2},
        }
        if precision == "fp16":
            config["fp16"] = {"enabled": True, "initial_scale_power": scale_power, "hysteresis": 1}
        elif precision == "bf16":
            config["bf16"] = {"enabled": True}
        return TrainingEngine(model, groups, config, **({"learning_rate": 1e-2, "warmup_steps": 4} | options))

    return make


@pytest.fixture
def train() -> Callable[..., list]:
    """Steps of regression on batches that depend on the step number alone; returns the outcomes."""

    def run(engine: TrainingEngine, steps: range, accumulation: int = 1, scale: float = 1.0) -> list:
        outcomes = []
        for step in steps:
            for micro in range(accumulation):
                generator = torch.Generator().manual_seed(100 * step + micro)
                x = torch.randn(4, 32, generator=generator).to(engine.dtype)
                error = engine.forward(x).float() - x[:, :4].float()
                engine.backward(scale * error.square().mean(dim=1), torch.arange(4) + 10 * micro)
            outcomes.append(engine.step())
        return outcomes

    return run
