"""A small model trained by 2 real ranks, its checkpoint brought to other numbers: ``python -m tests.checkpoints.resizing OUT``.

Every act is played by freshly forked processes in a process group of their own, and leaves files in OUT for the tests to look at.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.update({"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"})

import deepspeed  # noqa: E402, F401  forked with it loaded, an act takes a second and not ten
import torch  # noqa: E402
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint  # noqa: E402

from rdtf_ds.checkpoints.offline_reshard import reshard  # noqa: E402
from rdtf_ds.checkpoints.store import CheckpointStore  # noqa: E402
from rdtf_ds.training.checkpoint import Identity, resume_checkpoint, save_checkpoint  # noqa: E402
from rdtf_ds.training.ema import ShardedEMA  # noqa: E402
from rdtf_ds.training.engine import TrainingEngine, start_distributed, stop_distributed  # noqa: E402
from rdtf_ds.training.optimizer import split_parameters  # noqa: E402
from rdtf_ds.training.shard_files import read_shard  # noqa: E402
from tests.checkpoints.resizing_plan import BATCH, MICRO, MORE, SAVED  # noqa: E402
from tests.small_engines import ALIGNMENT, TwoLayers  # noqa: E402


class Run:
    """An engine with EMA on the ranks of the process group."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        model = TwoLayers()
        groups = split_parameters(model.named_parameters(), 1300, ALIGNMENT, {"output.weight"}, 8)
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        config = {
            "train_batch_size": BATCH,
            "train_micro_batch_size_per_gpu": MICRO,
            "gradient_accumulation_steps": BATCH // MICRO // world,
            "gradient_clipping": 0.5,
            "zero_optimization": {"stage": 2},
            "fp16": {"enabled": True, "initial_scale_power": 10, "hysteresis": 1},
        }
        self.rank, self.world = rank, world
        self.engine = TrainingEngine(model, groups, config, learning_rate=1e-2, warmup_steps=4)
        self.ema = ShardedEMA(dict(zip([group.name for group in groups], self.engine.masters, strict=True)), 0.9)

    def train(self, steps: range) -> list[float]:
        """Regression on samples that depend on step and place in the global batch alone; the losses."""
        losses = []
        for step in steps:
            for micro in range(BATCH // MICRO // self.world):
                first = (micro * self.world + self.rank) * MICRO
                x = torch.stack([torch.randn(32, generator=torch.Generator().manual_seed(1000 * step + first + i)) for i in range(MICRO)])
                error = self.engine.forward(x.to(self.engine.dtype)).float() - x[:, :4]
                self.engine.backward(error.square().mean(dim=1), torch.arange(first, first + MICRO))
            outcome = self.engine.step()
            assert outcome.applied and outcome.timesteps == tuple(range(BATCH))
            self.ema.update()
            losses.append(outcome.loss)
        return losses

    def save(self, folder: Path) -> Path:
        identity, description = Identity({"of": "tests"}, {}), {"model": {}}
        return save_checkpoint(self.engine, self.ema, CheckpointStore(folder), {"some": "state"}, identity, description).path

    def resume(self, folder: Path) -> int:
        resumed = resume_checkpoint(self.engine, self.ema, CheckpointStore(folder), Identity({"of": "tests"}, {}))
        assert resumed is not None and resumed.state == {"some": "state"}
        return resumed.step

    def live(self) -> dict[str, Any]:
        """All that training changes, on this rank."""
        optimizer = self.engine._ds.optimizer
        return {
            "masters": [master.detach().clone() for master in self.engine.masters],
            "moments": [{**optimizer.optimizer.state.get(master, {})} for master in self.engine.masters],
            "ema": self.ema.state_dict(),
            "model": self.engine.model.state_dict(),
            "counters": (self.engine.attempted_steps, self.engine.applied_steps, float(optimizer.loss_scale)),
        }


def train_and_save(out: Path) -> None:
    run = Run()
    run.save(out / "start")
    losses = run.train(range(SAVED))
    run.save(out / "two")
    torch.save(run.live(), out / f"saved_{run.rank}.pt")
    losses += run.train(range(SAVED, SAVED + MORE))
    torch.save(losses, out / f"losses_straight_{run.rank}.pt")


def resume_and_go_on(out: Path, source: str, name: str) -> None:
    """Takes what lies in ``source``, notes it, saves it again, and trains on."""
    run = Run()
    assert run.resume(out / source) == SAVED
    torch.save(run.live(), out / f"{name}_{run.rank}.pt")
    run.save(out / f"{name}_again")
    torch.save(run.train(range(SAVED, SAVED + MORE)), out / f"losses_{name}_{run.rank}.pt")


def back_to_the_start(out: Path) -> None:
    """A live run with moments takes a checkpoint of 2 ranks from before the first step."""
    run = Run()
    run.train(range(50, 52))
    assert run.resume(out / "start") == 0
    torch.save(run.live(), out / f"back_{run.rank}.pt")
    torch.save(run.train(range(SAVED)), out / f"losses_back_{run.rank}.pt")
    fresh = Run()
    torch.save(fresh.live(), out / f"fresh_{run.rank}.pt")
    torch.save(fresh.train(range(SAVED)), out / f"losses_fresh_{run.rank}.pt")


def reshard_offline(out: Path) -> None:
    """2 → 1 → 3 → 2, and DeepSpeed's own way to the weights of each."""
    path = CheckpointStore(out / "two").newest()[0]
    for number, (world, name) in enumerate([(2, "two"), (1, "to_one"), (3, "to_three"), (2, "to_two")]):
        if number:
            path = reshard(path, world, out / name, read_shard)
        torch.save(get_fp32_state_dict_from_zero_checkpoint(str(out / name), path.name), out / f"weights_of_{name}.pt")
    reshard(CheckpointStore(out / "start").newest()[0], 3, out / "start_of_three", read_shard)


def act(play: Callable[[Path], None], out: Path, ranks: int) -> None:
    """``play`` on so many ranks; 0 ranks: in one process without a process group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children = []
    for rank in range(max(ranks, 1)):
        child = os.fork()
        if child == 0:
            os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_PORT": port})
            try:
                if ranks:
                    start_distributed("cpu", verify_fp16_on_cpu=True)
                play(out)
                if ranks:
                    stop_distributed()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        raise SystemExit(f"{play}: exit codes {codes}")


def main(out: Path) -> None:
    act(train_and_save, out, ranks=2)
    act(reshard_offline, out, ranks=0)
    act(partial(resume_and_go_on, source="to_one", name="one"), out, ranks=1)
    act(partial(resume_and_go_on, source="two", name="one_at_once"), out, ranks=1)
    act(partial(resume_and_go_on, source="two", name="three_at_once"), out, ranks=3)
    act(back_to_the_start, out, ranks=1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
