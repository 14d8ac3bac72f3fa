"""What of a run is saved beside the shards, how it comes back, and how long a save will take."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import numpy as np

from rdtf_ds.checkpoints.durable import UNFINISHED, digest_file, write_file
from rdtf_ds.data.quarantine import NOTHING
from rdtf_ds.training.assembly import Run
from rdtf_ds.training.checkpoint import Resumed, Saved, SaveFailed, WeightsNotFinite, resume_checkpoint, save_checkpoint
from rdtf_ds.training.collectives import gather_objects
from rdtf_ds.training.incidents import Diverged, NumbersWentBad
from rdtf_ds.training.interruptions import ctrl_c_waits
from rdtf_ds.training.telemetry import RunLog

_PROBE_BYTES = 1 << 26


def save(run: Run, log: RunLog) -> Saved | SaveFailed:
    """Commit a checkpoint; a disk that refuses it is an alarm, and the run goes on from memory. Called by all ranks.

    The log before it is on disk first, so that a resume finds every earlier line.

    Raises:
        NumbersWentBad: The weights are not finite.
    """
    done = run.engine.attempted_steps
    state: dict[str, Any] = {
        "attempted_steps": done,
        "applied_steps": run.engine.applied_steps,
        "plans": run.queue.state_dict(),
        "quarantine": run.quarantine.to_json(),
        "incidents": run.incidents.to_json(),
        "bad_steps": run.bad_steps.to_json(),
    }
    try:
        with ctrl_c_waits():
            saved = save_checkpoint(run.engine, run.ema, run.store, state, run.identity, run.description, log.flush())
    except SaveFailed as failure:
        run.failed_saves += 1
        log.alarm(f"{failure} Until then training goes on from memory.")
        log.scalar("checkpoint/failed_saves", run.failed_saves, done)
        return failure
    except WeightsNotFinite as error:
        run.went_bad_at, run.weights_went_bad = str(error), False  # the samples of the update are named right here
        # No bad step was seen, so it is the last update that did it.
        samples = run.last_applied.samples if run.last_applied is not None else ()
        numbers, clips = [sample.sample_number for sample in samples], [sample.clip_id for sample in samples]
        raise NumbersWentBad(str(error), max(done - 1, 0), max(done - 1, 0), numbers, clips) from error
    run.reindexed = False
    if saved.trouble:
        log.alarm(saved.trouble)
    log.scalar("checkpoint/seconds", saved.seconds, done)
    log.scalar("checkpoint/bytes", saved.bytes, done)
    return saved


def resume(run: Run, gone_bad: NumbersWentBad | None = None) -> Resumed | None:
    """Bring the newest checkpoint that verifies into the run, or find none. Called by all ranks; see `resume_checkpoint`.

    Args:
        gone_bad: Why a run that was under way goes back. It begins a new row of bad steps, and must find something to go back to.

    Raises:
        Diverged: It finds nothing.
    """
    resumed = resume_checkpoint(run.engine, run.ema, run.store, run.identity)
    if resumed is None and gone_bad is not None:
        raise Diverged(f"{gone_bad} There is no checkpoint to go back to.")
    if resumed is not None:
        run.queue.load_state_dict(resumed.state["plans"])
        run.quarantine.restore(NOTHING if run.reindexed else resumed.state["quarantine"])
        run.incidents.merge(resumed.state["incidents"])
        run.bad_steps.restore(resumed.state["bad_steps"])
    if gone_bad is not None:
        run.bad_steps.reset()
        run.last_applied = None
    run.queue.passed_over = run.incidents.passed_over
    return resumed


def describe_save(run: Run) -> str:
    """How large a checkpoint is and how long it is predicted to take. Called by all ranks.

    Each rank writes, syncs, and reads again a probe of at most 64 MiB, all at once, as they do in a save.
    """
    mine = run.engine.shard_bytes() + (run.ema.nbytes if run.ema is not None else 0)
    everyones = gather_objects((mine, _seconds_a_byte(run, min(mine, _PROBE_BYTES))))
    total, paces = sum(size for size, _ in everyones), [pace for _, pace in everyones]
    if None in paces:
        return f"A checkpoint is {total / 1e9:.2f} GB; how long it takes is not known, for a probe of the disk could not be written."
    seconds = max(size * pace for size, pace in everyones)
    words = f"A checkpoint is {total / 1e9:.2f} GB, predicted to take {seconds:.1f} s at the speed this disk shows now"
    grace = run.experiment.rdtf.checkpoint.grace_s
    if seconds > grace:
        words = (
            f"Warning: {words}: more than the {grace:g} s (rdtf.checkpoint.grace_s) that a stopped run has. A stop would lose the steps "
            f"since the last checkpoint: use a faster disk or more GPUs, ask the scheduler for a longer notice, or lower "
            f"rdtf.checkpoint.interval (now {run.experiment.rdtf.checkpoint.interval})"
        )
    return f"{words}."


def _seconds_a_byte(run: Run, size: int) -> float | None:
    probe = run.folder / f".probe_rank{run.engine.rank:04d}{UNFINISHED}"
    noise = np.random.default_rng(0).bytes(size)  # a disk that compresses must not gain by it
    started = time.perf_counter()
    try:
        probe.unlink(missing_ok=True)
        write_file(probe, lambda file: file.write(noise))
        digest_file(probe)
        return (time.perf_counter() - started) / max(size, 1)
    except OSError:
        return None  # the save itself will say what is wrong
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
