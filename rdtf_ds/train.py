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

if __name__ == "__main__":
    # Before anything heavy is imported: the parent stays behind and watches, this process is its child from here on.
    from rdtf_ds.training.supervisor import supervise

    supervise()

import argparse  # noqa: E402
import logging  # noqa: E402
import os  # noqa: E402
from contextlib import closing  # noqa: E402

# What these report while they are imported concerns other uses of theirs than ours; tools/doctor.py checks what we need.
for chatty in ("xformers", "bitsandbytes"):
    logging.getLogger(chatty).setLevel(logging.ERROR)

import torch  # noqa: E402

from rdtf_ds.data.batch import Batch  # noqa: E402
from rdtf_ds.exit_codes import DONE  # noqa: E402
from rdtf_ds.experiment import Experiment, load_experiment  # noqa: E402
from rdtf_ds.memory.report import Report, tensors_by_phase  # noqa: E402
from rdtf_ds.models.attention import resolve_backend  # noqa: E402
from rdtf_ds.training.assembly import Run, build_run, prepare_folder, write_config  # noqa: E402
from rdtf_ds.training.checkpoint import Resumed, Saved, SaveFailed  # noqa: E402
from rdtf_ds.training.collectives import any_rank, gather_objects, on_rank_zero  # noqa: E402
from rdtf_ds.training.command_line import parse_arguments  # noqa: E402
from rdtf_ds.training.dry_run import describe  # noqa: E402
from rdtf_ds.training.engine import start_distributed, stop_distributed  # noqa: E402
from rdtf_ds.training.failures import exit_code_of  # noqa: E402
from rdtf_ds.training.incidents import NumbersWentBad  # noqa: E402
from rdtf_ds.training.interruptions import Interruptions, ignore_stops  # noqa: E402
from rdtf_ds.training.memory_check import check_memory, keep_plan  # noqa: E402
from rdtf_ds.training.memory_watch import MemoryWatch, StepWatch  # noqa: E402
from rdtf_ds.training.recovery import name_what_went_bad, send_back  # noqa: E402
from rdtf_ds.training.run_lock import RunLock  # noqa: E402
from rdtf_ds.training.run_state import describe_save, resume, save  # noqa: E402
from rdtf_ds.training.supervisor import heartbeat, leave  # noqa: E402
from rdtf_ds.training.telemetry import RunLog, StepRecord  # noqa: E402
from rdtf_ds.training.validation_assembly import build_validation  # noqa: E402


def train_step(run: Run, step: int, batches: list[Batch], watch: StepWatch) -> StepRecord:
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
    if outcome.applied:
        run.last_applied = plan
        if run.ema is not None:
            run.ema.update()
    watch.lap("step")

    # A skipped step is attempted, not applied: plans move on, schedule and PID do not.
    signal = outcome.loss if outcome.applied else None
    run.queue.push(run.curriculum.observe(run.queue.state, signal, outcome.sample_losses, outcome.timesteps))
    return StepRecord(plan, outcome, snapshot, *watch.read())


def train(run: Run, log: RunLog, first_step: int, interruptions: Interruptions, memory: MemoryWatch) -> int:
    """All steps from ``first_step`` on, with checkpoints and validation between them, until the last or until asked to stop.

    Returns:
        The exit code.

    Raises:
        NumbersWentBad: Too many steps in a row had numbers that are not finite.
        SaveFailed: The last state of all is not on disk.
    """
    rdtf, rank = run.experiment.rdtf, run.engine.rank

    def asked() -> list[bool]:
        """Whether any rank was asked to save, and to stop."""
        return any_rank(*interruptions.poll(rank))

    def keep(must: bool) -> bool:
        """Save; whether that worked."""
        heartbeat().beat("save")
        with memory.phase("save"):
            saved = save(run, log)
        memory.report(log, run.engine.attempted_steps)
        if must and isinstance(saved, SaveFailed):
            raise saved
        interruptions.done_saving()
        return isinstance(saved, Saved)

    if asked()[1]:
        return stopped(run, log, interruptions)  # while it started
    validation = build_validation(run, log, memory, interruptions.noticed)
    validation.make_up(first_step)
    if first_step >= rdtf.max_steps:
        return DONE
    steps = run.loader.steps(first_step, rdtf.max_steps)
    with closing(steps):  # type: ignore[type-var]  # a generator; closed, it ends its workers
        heartbeat().beat("step")
        watch = StepWatch(memory)
        for step, batches in steps:
            record = train_step(run, step, batches, watch)
            log.step(record)
            memory.report(log, step + 1)
            if record.outcome.bad:
                name_what_went_bad(run, log, batches, record)
            run.bad_steps.observe(record.plan, record.outcome)
            done = step + 1
            last = done == rdtf.max_steps

            problems = [problem for batch in batches for problem in batch.problems]
            broken, to_save, to_stop = any_rank(bool(problems), *interruptions.poll(rank))
            if broken:
                run.merge_problems(problems, step)
            # Amid bad steps there is nothing worth keeping, and it would become what the run goes back to.
            due = done % rdtf.checkpoint.interval == 0 and not run.bad_steps.count
            kept = False
            if due or to_save or to_stop or last:
                kept = keep(to_stop or last)
                to_stop = asked()[1] and (to_stop or kept)  # asked while it saved, there is nothing more to save
            if not to_stop and validation.due(done):
                validation(done)  # after the save: a kill amid it costs no step
                to_save, to_stop = asked()
                if to_save or to_stop:
                    kept = kept or keep(to_stop)
                    interruptions.done_saving()
            if to_stop and not last:
                return stopped(run, log, interruptions)
            heartbeat().beat("step")
            watch = StepWatch(memory)
    return DONE


def stopped(run: Run, log: RunLog, interruptions: Interruptions) -> int:
    """Say why the run ends before its last step; the exit code, the same on all ranks."""
    answers = gather_objects((interruptions.exit_code, interruptions.stopped_by))
    code, reason = min(answer for answer in answers if answer[1])
    log.say(f"Stopped by {reason} after {run.engine.attempted_steps} steps, which are saved. The same command goes on from here.")
    return int(code)


def announce(log: RunLog, run: Run, resumed: Resumed | None) -> None:
    """What is about to be trained, and from where."""
    log.say(run.index.summary())
    parameters = sum(group.numel for group in run.engine.groups)
    engine = run.engine
    log.say(f"DFGN with {parameters:,} parameters in {len(engine.groups)} groups, {engine.world_size} rank(s), {run.experiment.precision}")
    log.say(describe_save(run))
    log.say(f"STI attention runs on {resolve_backend(run.experiment.rdtf.model.attention_backend, engine.device.type)}")
    for warning in run.experiment.warnings:
        log.say(f"Warning: {warning}")
    if resumed is not None:
        for note in resumed.notes:
            log.say(note)
        log.say(f"Resumed after {resumed.step} steps.")


def main(options: argparse.Namespace, experiment: Experiment) -> int:
    """Build the run, train it, leave cleanly; the exit code."""
    rdtf = experiment.rdtf
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", options.local_rank))) if cuda else torch.device("cpu")
    if options.dry_run:
        if plan := describe(experiment, world_size, device):
            print(plan)
        return DONE
    experiment.check_device(cuda, world_size, torch.cuda.get_device_capability(device) if cuda else None)
    folder = Path(rdtf.output_dir)
    heartbeat().watch(folder, rdtf.watchdog.start_timeout_s, rdtf.watchdog.stall_timeout_s)
    rank, world_size = start_distributed(device.type, rdtf.verify_fp16_on_cpu)
    try:
        on_rank_zero(lambda: prepare_folder(folder))
        with RunLock(folder, on_rank_zero=on_rank_zero):
            heartbeat().claim()
            plan = check_memory(experiment, world_size, device, options.ignore_memory_plan)
            memory = MemoryWatch.on(device, rank, {} if plan is None else tensors_by_phase(plan))
            with memory.phase("initialise"):
                run = build_run(experiment, rank, world_size, device, options.reindex)
            resumed = resume(run)
            memory.lap("resume" if resumed is not None else "")
            with Interruptions(folder) as interruptions:  # before there is a state of its own, a signal may just end it
                return rounds(run, resumed, interruptions, plan, memory)
    finally:
        ignore_stops()
        stop_distributed()


def rounds(run: Run, resumed: Resumed | None, interruptions: Interruptions, plan: Report | None, memory: MemoryWatch) -> int:
    """Train; once numbers went bad, again from the last checkpoint, without the samples they went bad with."""
    rdtf = run.experiment.rdtf
    while True:
        on_rank_zero(lambda: write_config(run.folder, run.experiment))
        first_step = 0 if resumed is None else resumed.step
        with RunLog(run.folder, run.engine.rank, first_step, rdtf.max_steps, run.experiment.resolved()) as log:
            announce(log, run, resumed)
            keep_plan(plan, run.folder, log, first_step)
            try:
                if resumed is None and isinstance(failed := save(run, log), SaveFailed):
                    raise failed  # better now than at the first checkpoint
                code = train(run, log, first_step, interruptions, memory)
            except NumbersWentBad as bad:
                log.alarm(send_back(run, bad))
                heartbeat().beat("resume")
                with memory.phase("resume"):
                    resumed = resume(run, gone_bad=bad)
                continue
            log.say_share_of_validation(rdtf.validation.max_share)
            if run.engine.attempted_steps >= rdtf.max_steps:
                log.say(f"Done: {run.engine.attempted_steps} steps are in {run.folder}. A --max_steps above that goes on from here.")
            return code


def run_command(arguments: list[str]) -> int:
    """The command with its exit code; see `exit_code_of`."""
    options = parse_arguments(arguments, __doc__)
    folder: list[Path] = []

    def command() -> int:
        """Read the config, then train: only from then on is it known where checkpoints and a crash's traceback are."""
        given = {key: getattr(options, key) for key in ("data_dir", "output_dir", "max_steps", "seed")}
        experiment = load_experiment(options.deepspeed_config, options.set, **given)
        folder.append(Path(experiment.rdtf.output_dir))
        return main(options, experiment)

    return exit_code_of(command, lambda: folder[0] if folder else None, options.traceback)


if __name__ == "__main__":
    leave(run_command(sys.argv[1:]))
