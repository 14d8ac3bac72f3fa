"""Train DFGN: ``deepspeed rdtf_ds/train.py --deepspeed_config ds_configs/v100.json``. The same command again resumes.

One process on a CPU works too: ``python rdtf_ds/train.py --deepspeed_config ds_configs/tiny_cpu.json``.
"""

from __future__ import annotations

import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == PACKAGE:
    # Started as a script, Python puts this folder first: its modules must not be found without the package's name.
    sys.path[0] = str(PACKAGE.parent)

import argparse  # noqa: E402
import logging  # noqa: E402
import os  # noqa: E402
from contextlib import closing  # noqa: E402

# What these report while they are imported concerns other uses of theirs than ours; tools/doctor.py checks what we need.
for chatty in ("xformers", "bitsandbytes"):
    logging.getLogger(chatty).setLevel(logging.ERROR)

import torch  # noqa: E402

from rdtf_ds.data.dataset import Batch  # noqa: E402
from rdtf_ds.experiment import Experiment, load_experiment  # noqa: E402
from rdtf_ds.models.attention import resolve_backend  # noqa: E402
from rdtf_ds.training import checkpoint  # noqa: E402
from rdtf_ds.training.assembly import Run, build_pipeline, build_run, validation_requests, write_config  # noqa: E402
from rdtf_ds.training.dry_run import describe  # noqa: E402
from rdtf_ds.training.engine import on_rank_zero, start_distributed, stop_distributed  # noqa: E402
from rdtf_ds.training.failures import exit_code_of  # noqa: E402
from rdtf_ds.training.telemetry import RunLog, StepRecord, Stopwatch  # noqa: E402
from rdtf_ds.training.validation import Validation  # noqa: E402


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line; options beat the file's keys."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", required=True, metavar="JSON", help="one experiment, such as ds_configs/v100.json")
    parser.add_argument("--data_dir", metavar="DIR", help="folder of clips (rdtf.data.data_dir)")
    parser.add_argument("--output_dir", metavar="DIR", help="run folder (rdtf.output_dir)")
    parser.add_argument("--max_steps", type=int, metavar="N", help="attempted steps of the whole run (rdtf.max_steps)")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of everything random (rdtf.seed)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key, dotted; repeat for more")
    parser.add_argument("--dry_run", action="store_true", help="print the resolved plan of the run and stop")
    parser.add_argument("--traceback", action="store_true", help="show tracebacks of errors")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher adds it
    return parser.parse_args(arguments)


def train_step(run: Run, step: int, batches: list[Batch], watch: Stopwatch) -> StepRecord:
    """One attempted optimizer step (Algorithm 1): learn from the planned batch, then let its loss move the curriculum."""
    plan, snapshot = run.queue.plan(step), run.curriculum.snapshot(run.queue.state)
    watch.lap("data")

    for batch in batches:
        encoded = run.objective.encode(batch)
        watch.lap("encode")
        losses = run.objective.losses(run.engine.forward, encoded)
        watch.lap("forward")
        run.engine.backward(losses, batch.timestep)
        watch.lap("backward")

    outcome = run.engine.step()
    if outcome.applied and run.ema is not None:
        run.ema.update()
    watch.lap("step")

    # A skipped step is attempted, not applied: plans move on, schedule and PID do not.
    signal = outcome.loss if outcome.applied else None
    run.queue.push(run.curriculum.observe(run.queue.state, signal, outcome.sample_losses, outcome.timesteps))
    run.merge_problems([problem for batch in batches for problem in batch.problems])
    return StepRecord(plan, outcome, snapshot, watch.read())


def train(run: Run, log: RunLog, first_step: int) -> None:
    """All steps from ``first_step`` on, with checkpoints and validation between them."""
    rdtf = run.experiment.rdtf
    validate = Validation(build_pipeline(run), validation_requests(run), rdtf.validation.steps) if rdtf.validation.interval else None
    steps = run.loader.steps(first_step, rdtf.max_steps)
    with closing(steps):  # type: ignore[type-var]  # a generator; closed, it ends its workers
        watch = Stopwatch()
        for step, batches in steps:
            log.step(train_step(run, step, batches, watch))
            done = step + 1
            if validate is not None and (done % rdtf.validation.interval == 0 or done == rdtf.max_steps):
                validate(run.engine, run.ema, run.folder, log, done)
            if done % rdtf.checkpoint.interval == 0 or done == rdtf.max_steps:
                save(run, log)
            watch = Stopwatch()


def save(run: Run, log: RunLog) -> None:
    """Commit a checkpoint; the log before it is on disk first, so that a resume finds every earlier line."""
    log.flush()
    state = {"attempted_steps": run.engine.attempted_steps, "applied_steps": run.engine.applied_steps, "plans": run.queue.state_dict()}
    folder = run.folder / "checkpoints"
    checkpoint.save(run.engine, run.ema, folder, state, run.identity, run.description, run.experiment.rdtf.checkpoint.keep)


def announce(log: RunLog, run: Run, resumed: checkpoint.Resumed | None) -> None:
    """What is about to be trained, and from where."""
    log.say(run.index.summary())
    parameters = sum(group.numel for group in run.engine.groups)
    engine = run.engine
    log.say(f"DFGN with {parameters:,} parameters in {len(engine.groups)} groups, {engine.world_size} rank(s), {run.experiment.precision}")
    log.say(f"STI attention runs on {resolve_backend(run.experiment.rdtf.model.attention_backend, engine.device.type)}")
    for warning in run.experiment.warnings:
        log.say(f"Warning: {warning}")
    if resumed is not None:
        for note in resumed.notes:
            log.say(note)
        log.say(f"Resumed after {resumed.step} steps.")


def main(options: argparse.Namespace, experiment: Experiment) -> None:
    """Build or resume the run, train it, leave cleanly."""
    rdtf = experiment.rdtf
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", options.local_rank))) if cuda else torch.device("cpu")
    if options.dry_run:
        if plan := describe(experiment, world_size, device):
            print(plan)
        return
    experiment.check_device(cuda, world_size, torch.cuda.get_device_capability(device) if cuda else None)
    rank, world_size = start_distributed(device.type, rdtf.verify_fp16_on_cpu)
    try:
        run = build_run(experiment, rank, world_size, device)
        resumed = checkpoint.resume(run.engine, run.ema, run.folder / "checkpoints", run.identity)
        if resumed is not None:
            run.queue.load_state_dict(resumed.state["plans"])
        on_rank_zero(lambda: write_config(run.folder, experiment))
        first_step = 0 if resumed is None else resumed.step
        with RunLog(run.folder, rank, first_step, rdtf.max_steps, experiment.resolved()) as log:
            announce(log, run, resumed)
            if first_step < rdtf.max_steps:
                train(run, log, first_step)
            log.say(f"Done: {run.engine.attempted_steps} steps are in {run.folder}. --max_steps above {rdtf.max_steps} goes on from here.")
    finally:
        stop_distributed()


def run_command(arguments: list[str]) -> int:
    """The command with its exit code; see `exit_code_of`."""
    options = parse_arguments(arguments)
    folder: list[Path] = []

    def command() -> None:
        experiment = load_experiment(
            options.deepspeed_config,
            options.set,
            data_dir=options.data_dir,
            output_dir=options.output_dir,
            max_steps=options.max_steps,
            seed=options.seed,
        )
        folder.append(Path(experiment.rdtf.output_dir))
        main(options, experiment)

    return exit_code_of(command, lambda: folder[0] if folder else None, options.traceback)


if __name__ == "__main__":
    sys.exit(run_command(sys.argv[1:]))
