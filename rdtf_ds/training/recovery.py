"""What a run does when its numbers go bad: say where, and go back to the last checkpoint past the samples it happened with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from rdtf_ds.data.batch import Batch
from rdtf_ds.training.assembly import Run
from rdtf_ds.training.collectives import gather_objects
from rdtf_ds.training.diagnosis import first_nonfinite, nonfinite_weight
from rdtf_ds.training.incidents import Diverged, NumbersWentBad, go_back
from rdtf_ds.training.telemetry import RunLog, StepRecord

UNNAMED = "a second look found everything finite"


class Finding(NamedTuple):
    """Where numbers first stopped being finite, and whether that is in the weights: then the update before is to blame."""

    what: str
    in_weights: bool


def name_what_went_bad(run: Run, log: RunLog, batches: Sequence[Batch], record: StepRecord) -> None:
    """Look where the numbers of a bad step first stopped being finite, and say it; called by all ranks, after the step.

    Each rank looks at its own micro-batches again, with the bare network: no collective is in it that a finding could leave waiting.
    """
    found: Finding | None = None
    for batch in batches:
        found = found or _look(run, batch, record.outcome.loss_scale / len(batches))
    told = [Finding(f"{one.what} on rank {rank}", one.in_weights) for rank, one in enumerate(gather_objects(found)) if one]
    run.went_bad_at, run.weights_went_bad = told[0] if told else Finding(UNNAMED, False)
    log.alarm(f"Step {record.plan.step} was skipped, its loss or gradients are not finite: {run.went_bad_at}.")


def _look(run: Run, batch: Batch, scale: float) -> Finding | None:
    def losses() -> Tensor:
        """(B,) with graph: the micro-batch encoded and put through the bare network once more."""
        return run.objective.losses(run.engine.model, run.objective.encode(batch))

    try:
        if bad_weight := nonfinite_weight(run.engine.model):
            return Finding(bad_weight, True)
        what = first_nonfinite(run.engine.model, losses, scale)
        return None if what is None else Finding(what, False)
    except Exception as error:  # looking must not be what ends the run; out of memory, say
        return Finding(f"the look at it failed ({type(error).__name__})", False)


def send_back(run: Run, bad: NumbersWentBad) -> str:
    """Record that the run goes back to its newest checkpoint; a line about it. Called by all ranks.

    Raises:
        Diverged: It did so before from there.
    """
    newest = gather_objects(run.store.newest_step() if run.engine.rank == 0 else None)[0]
    if newest is None:
        raise Diverged(f"{bad} There is no checkpoint to go back to.")
    if run.weights_went_bad and run.last_applied is not None:
        # What was skipped is not to blame: the update before it had left these weights.
        samples = run.last_applied.samples
        numbers, clips = [sample.sample_number for sample in samples], [sample.clip_id for sample in samples]
        bad = NumbersWentBad(str(bad), run.last_applied.step, bad.last_step, [*numbers, *bad.sample_numbers], [*clips, *bad.clip_ids])
    incident = go_back(run.incidents, bad, newest, run.went_bad_at or str(bad), run.index.path)
    return (
        f"{bad} Going back to the checkpoint of step {newest}; {len(incident.sample_numbers)} sample(s) of steps {incident.first_step} to "
        f"{incident.last_step} are passed over, see '{run.incidents.path}'."
    )
