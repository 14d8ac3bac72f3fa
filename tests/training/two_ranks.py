"""Engines on 2 real ranks: ``python -m tests.training.two_ranks PLAY OUT`` leaves what each rank saw in OUT for the tests to look at."""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path

from tests.checkpoints.resizing import act  # sets the environment first

import torch  # noqa: E402  isort: skip

from rdtf_ds.training import engine as engine_module  # noqa: E402
from tests.small_engines import small_engine, train_steps  # noqa: E402


def _state(engine):
    moments = [dict(engine._ds.optimizer.optimizer.state[master]) for master in engine.masters]
    return [master.detach().clone() for master in engine.masters], moments, [p.detach().clone() for p in engine.model.parameters()]


def gradient_buffer(out: Path) -> None:
    """Training with the adapter and without, for each way of reducing."""
    cases = {}
    adapter = engine_module.use_one_buffer
    for precision, accumulation, more in (
        ("fp32", 2, {}),
        ("bf16", 1, {}),
        ("bf16", 4, {"reduce_bucket_size": 300}),
        ("fp16", 2, {"reduce_bucket_size": 200}),
        ("fp16", 2, {"reduce_scatter": False}),
        ("fp16", 2, {"overlap_comm": True, "reduce_bucket_size": 300}),
        ("bf16", 2, {"sums": "fp32", "reduce_bucket_size": 200}),
        ("fp16", 4, {"sums": "fp32"}),
    ):
        zero = {key: value for key, value in more.items() if key != "sums"}
        results = []
        for install in (adapter, lambda optimizer: None):
            engine_module.use_one_buffer = install
            engine = small_engine(precision, accumulation, clipping=0.5, zero=zero, sums=more.get("sums"))
            outcomes = train_steps(engine, range(3), accumulation)
            results.append((outcomes, *_state(engine)))
        cases[f"{precision} x {accumulation} {more}"] = tuple(results)
    torch.save(cases, out / f"gradient_buffer_{engine.rank}.pt")


def _offloaded(bits: int = 32):
    accumulation = 4 // torch.distributed.get_world_size()  # the same global batch on any number of ranks
    zero = {"offload_optimizer": {"device": "cpu"}}
    return small_engine("fp16", accumulation, bits, clipping=0.5, zero=zero), accumulation


def _losses(engine, steps, accumulation):
    """Whole steps on the same global batch whatever the number of ranks."""
    losses = []
    for step in steps:
        for micro in range(accumulation):
            place = micro * engine.world_size + engine.rank
            x = torch.randn(4, 32, generator=torch.Generator().manual_seed(100 * step + place))
            error = engine.forward(x.to(engine.dtype)).float() - x[:, :4]
            engine.backward(error.square().mean(dim=1), torch.arange(4))
        outcome = engine.step()
        assert outcome.applied
        losses.append(outcome.loss)
    return losses


def offload_and_save(out: Path) -> None:
    """The same steps with the optimizer on the CPU and on the device; a checkpoint of 2 ranks in the middle."""
    engine, accumulation = _offloaded()
    losses = _losses(engine, range(3), accumulation)
    folder = out / "of_two"
    folder.mkdir(exist_ok=True)
    torch.distributed.barrier()
    assert engine.save_shards(folder)[0] is None
    torch.save(_state(engine), out / f"state_saved_{engine.rank}.pt")
    torch.save(losses + _losses(engine, range(3, 6), accumulation), out / f"offloaded_{engine.rank}.pt")
    plain = small_engine("fp16", accumulation, 32, clipping=0.5)
    torch.save(_losses(plain, range(6), accumulation), out / f"on_device_{engine.rank}.pt")


def offload_and_resume(out: Path, source: str, written_by: int, name: str) -> None:
    """Take a checkpoint of another number of ranks, save it again, and go on."""
    engine, accumulation = _offloaded()
    assert engine.read_shards(out / source, written_by) is None
    engine.load_shards(out / source)
    torch.save(_state(engine), out / f"state_{name}_{engine.rank}.pt")
    (out / name).mkdir(exist_ok=True)
    torch.distributed.barrier()
    assert engine.save_shards(out / name)[0] is None
    torch.save(_losses(engine, range(3, 6), accumulation), out / f"{name}_{engine.rank}.pt")


VALIDATES = ("rdtf.validation.interval=2", "rdtf.validation.max_share=1.0", "rdtf.validation.held_out_clips=3", "rdtf.validation.clips=3")
STEPS, LOST = 6, 4
"""Steps of the runs that validate, and the step whose validation a kill cut short."""


def _train(out: Path, name: str, *settings: str, sabotage: bool = False) -> None:
    """A whole run of the tiny config in ``out/name``; leaves this rank's masters and mean weights."""
    from rdtf_ds.experiment import load_experiment
    from rdtf_ds.train import train
    from rdtf_ds.training.assembly import build_run
    from rdtf_ds.training.held_out import HeldOutLoss
    from rdtf_ds.training.interruptions import Interruptions
    from rdtf_ds.training.memory_watch import MemoryWatch
    from rdtf_ds.training.run_state import resume
    from rdtf_ds.training.telemetry import RunLog
    from rdtf_ds.training.validation_pipeline import RDTFPipeline

    folder = out / name
    config = Path(__file__).resolve().parents[2] / "ds_configs" / "tiny_cpu.json"
    common = ("rdtf.data.workers=0", "rdtf.data.validation_fraction=0.3", "rdtf.validation.steps=2", f"rdtf.checkpoint.interval={LOST}")
    experiment = load_experiment(config, (*common, *settings), output_dir=folder, max_steps=STEPS, seed=1)
    rank = torch.distributed.get_rank()
    folder.mkdir(exist_ok=True)
    torch.distributed.barrier()
    run = build_run(experiment, rank, torch.distributed.get_world_size(), torch.device("cpu"))
    resumed = resume(run)
    first = 0 if resumed is None else resumed.step
    untouched = RDTFPipeline.__call__, HeldOutLoss.measure
    if sabotage and rank == 1:
        RDTFPipeline.__call__ = HeldOutLoss.measure = _fails
    try:
        with Interruptions(folder) as interruptions, RunLog(folder, rank, first, STEPS, {}) as log:
            assert train(run, log, first, interruptions, MemoryWatch(None, {})) == 0
    finally:
        RDTFPipeline.__call__, HeldOutLoss.measure = untouched
    torch.save(([master.clone() for master in run.engine.masters], run.ema.state_dict()), out / f"{name}_{rank}.pt")


def _fails(*arguments: object, **options: object) -> None:
    raise RuntimeError("this rank cannot")


def _killed_amid_validation(out: Path) -> None:
    """What a kill amid the validation after step `LOST` leaves: the checkpoint of that step, and no word of the validation."""
    shutil.copytree(out / "with", out / "killed")
    for later in (out / "killed" / "checkpoints").glob(f"step{STEPS:08d}-*"):
        shutil.rmtree(later)
    lines = (out / "killed" / "validation.jsonl").read_text().splitlines(keepends=True)
    (out / "killed" / "validation.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] < LOST))


def validate(out: Path) -> None:
    """The same run without validation, with it, with a rank that fails at all of it, and killed amid one."""
    _train(out, "without", "rdtf.validation.interval=0")
    _train(out, "with", *VALIDATES)
    _train(out, "failing", *VALIDATES, sabotage=True)
    if torch.distributed.get_rank() == 0:
        _killed_amid_validation(out)
    torch.distributed.barrier()
    _train(out, "killed", *VALIDATES)


def validate_alone(out: Path) -> None:
    """On one rank the mean weights that two ranks had after `LOST` steps, measured again."""
    shutil.copytree(out / "with", out / "alone")
    for later in (out / "alone" / "checkpoints").glob(f"step{STEPS:08d}-*"):
        shutil.rmtree(later)
    (out / "alone" / "validation.jsonl").unlink()
    _train(out, "alone", *VALIDATES)


PLAYS = {
    "validation": [(validate, 2), (validate_alone, 1)],
    "gradient_buffer": [(gradient_buffer, 2)],
    "offload": [
        (offload_and_save, 2),
        (partial(offload_and_resume, source="of_two", written_by=2, name="on_one"), 1),
        (partial(offload_and_resume, source="on_one", written_by=1, name="on_two_again"), 2),
    ],
}

if __name__ == "__main__":
    for play, ranks in PLAYS[sys.argv[1]]:
        act(play, Path(sys.argv[2]), ranks=ranks)
