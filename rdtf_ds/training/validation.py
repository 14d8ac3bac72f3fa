"""Validation while a run trains: the loss on held-out clips, clips to look at, FVD where it is asked for; all with the mean weights.

All ranks share the work, and meet after each kind of it: none waits in a collective while another works. What fails on a rank is told
there, and is a warning: training does not depend on it. Rank 0 decides what fits into validation's share of the time and tells the others,
before the mean weights are put in; if nothing fits, they are not. Nothing that training goes on from is changed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rdtf_ds.training.collectives import gather_objects, on_rank_zero
from rdtf_ds.training.ema import ShardedEMA
from rdtf_ds.training.engine import TrainingEngine
from rdtf_ds.training.held_out import HeldOutLoss, SampleLoss, means
from rdtf_ds.training.memory_watch import MemoryWatch
from rdtf_ds.training.supervisor import heartbeat
from rdtf_ds.training.telemetry import RunLog
from rdtf_ds.training.validation_budget import Costs, allowance, fit
from rdtf_ds.training.validation_clips import MadeClip, Request, make_clip, show_clips
from rdtf_ds.training.validation_fvd import TrainingFVD, fvd_of
from rdtf_ds.training.validation_units import Attempt, attempt, go_on


class Order(NamedTuple):
    """What all ranks do next: nothing, if all of it is empty."""

    losses: bool = False
    clips: tuple[int, ...] = ()
    fvd: bool = False
    fvd_trial: bool = False


@dataclass
class Findings:
    """What one validation brought so far; the same on all ranks but for ``costs``, which rank 0 uses.

    Attributes:
        queue: Requests not tried yet, by number, in the order they will be.
        losses_due, fvd_due: Asked for and not tried yet.
        fvd_failed: It was tried.
        stopped: The run was asked to stop on the way.
        fvd_s: About how long FVD would take, if that is known.
        once_s: Seconds of what each start of the run does once: encoding clips, features of real ones.
        units_s: Seconds of everything else that was carried out.
    """

    costs: Costs
    queue: list[int]
    losses_due: bool
    fvd_due: bool
    losses: dict[str, float] | None = None
    clips: list[tuple[Request, MadeClip]] = field(default_factory=list)
    tried: int = 0
    fvd: float | None = None
    fvd_failed: bool = False
    failures: list[str] = field(default_factory=list)
    stopped: bool = False
    fvd_s: float | None = None
    once_s: float = 0.0
    units_s: float = 0.0

    @property
    def waiting(self) -> list[str]:
        """What was not carried out, in words."""
        clips = [f"{len(self.queue)} of {self.tried + len(self.queue)} clips"] if self.queue else []
        fvd = "FVD" if self.fvd_s is None else f"FVD, which takes about {self.fvd_s:.0f} s"
        return [*(["the losses"] if self.losses_due else []), *clips, *([fvd] if self.fvd_due else [])]


@dataclass(frozen=True)
class Validation:
    """Measures and makes with the mean weights, every rank its share, and shows the result.

    Attributes:
        folder: Of the run.
        pipeline: Around the live network.
        requests: Clips to make; if not all fit, the next validation goes on where this one ended.
        steps: Of the sampler.
        losses: None: not measured.
        fvd: None: not measured.
        fvd_interval: Steps between measurements of FVD.
        held_out: Whether the clips are held out from training.
        interval, last: Steps between validations, 0: none; the run's last step has one too.
        max_share: Of the time.
        hurry: Whether any rank was asked to stop, without a collective.
    """

    engine: TrainingEngine
    ema: ShardedEMA | None
    log: RunLog
    memory: MemoryWatch
    folder: Path
    pipeline: Any
    requests: Sequence[Request]
    steps: int
    losses: HeldOutLoss | None
    fvd: TrainingFVD | None
    fvd_interval: int
    held_out: bool
    interval: int
    last: int
    max_share: float
    hurry: Callable[[], bool]

    def due(self, done: int) -> bool:
        """Whether there is a validation after ``done`` attempted steps."""
        return self.interval > 0 and done > 0 and (done % self.interval == 0 or done == self.last)

    def make_up(self, done: int) -> None:
        """Validate if the run goes on from where that was due and nothing is logged of it: it was killed on the way. By all ranks."""
        if self.due(done) and on_rank_zero(lambda: all(line["step"] != done for line in self.log.validations)):
            self(done)

    def __call__(self, done: int) -> None:
        """Validate after ``done`` attempted steps; called by all ranks."""
        heartbeat().beat("validation")
        with self.memory.phase("validation"):
            self._validate(done)
        self.memory.report(self.log, done)

    def _validate(self, done: int) -> None:
        started = time.perf_counter()
        found = on_rank_zero(lambda: self._begin(done))
        order = on_rank_zero(lambda: self._order(found, started))
        if order != Order():
            with self.ema.applied_to(self.engine) if self.ema is not None else nullcontext():
                while order != Order():
                    self._carry_out(order, found)
                    order = on_rank_zero(lambda: self._order(found, started))
        if self.engine.rank == 0:
            if found.clips:
                show_clips(found.clips, self.folder / "samples" / f"step{done:08d}", self.log, done)
            self._tell(found, done, time.perf_counter() - started)

    def _begin(self, done: int) -> Findings:
        """What there is to do, from what the log holds of earlier validations; on rank 0."""
        history = self.log.validations
        count = len(self.requests)
        first = history[-1]["next_clip"] % count if history and count else 0
        tried = [line["step"] for line in history if line["fvd"] is not None or line.get("fvd_failed")]
        fvd_due = self.fvd is not None and done // self.fvd_interval > (tried[-1] // self.fvd_interval if tried else 0)
        costs = Costs.from_json(history[-1]["costs"]) if history else Costs()
        return Findings(costs, [(first + i) % count for i in range(count)], self.losses is not None, fvd_due)

    def _order(self, found: Findings, started: float) -> Order:
        """What fits into the time that is left; on rank 0.

        While FVD is due only one round of clips comes before it, or it might wait for ever.
        """
        found.stopped = found.stopped or self.hurry()
        if found.stopped:
            return Order()
        left = allowance(self.max_share, self.log.trained_s, self.log.validated_s + time.perf_counter() - started)
        world, costs = self.engine.world_size, self._costs(found)
        rounds = math.ceil(len(found.queue) / world)
        if found.fvd_due:
            rounds = min(rounds, 0 if found.tried else 1)
            found.fvd_s = costs.fvd
        fits = fit(left, costs, found.losses_due, rounds, found.fvd_due)
        return Order(fits.losses, tuple(found.queue[: fits.rounds * world]), fits.fvd, fits.fvd_trial)

    def _costs(self, found: Findings) -> Costs:
        """What is known of costs, with those of what this start of the run has not prepared yet."""
        costs, losses, fvd = found.costs, found.costs.losses, found.costs.fvd
        if self.losses is not None and losses is not None and not self.losses.prepared:
            losses += costs.preparing or 0.0
        if self.fvd is not None:
            if fvd is None and costs.clips is not None:
                fvd = self.fvd.seconds(costs.clips)
            if fvd is not None:
                fvd += self.fvd.preparing_s
        return costs.measured(losses=losses, fvd=fvd)

    def _carry_out(self, order: Order, found: Findings) -> None:
        """Do this rank's share, and gather everyone's."""
        if order.losses:
            self._measure_losses(found)
        if order.clips and not found.stopped:
            self._make_clips(order.clips, found)
        if order.fvd_trial and not found.stopped:
            self._try_fvd(found)
        if order.fvd and not found.stopped:
            self._measure_fvd(found)

    def _measure_losses(self, found: Findings) -> None:
        """All of them or none: a mean over fewer samples would move without the model."""
        assert self.losses is not None
        losses = self.losses
        first = not losses.prepared
        prepared = attempt(lambda: losses.prepare(self.hurry))
        measured: Attempt[list[SampleLoss]] = Attempt(None, prepared.failure, 0.0, prepared.stopped)
        if prepared.value is not None:
            measured = attempt(lambda: losses.measure(self.engine.model, self.hurry))
        parts = gather_objects((measured, prepared.seconds))
        once = max(seconds for _, seconds in parts)
        found.once_s += once
        seconds = max(part.seconds for part, _ in parts)
        found.units_s += seconds
        found.stopped = found.losses_due = any(part.stopped for part, _ in parts)
        failures = [f"no held-out loss: rank {rank}: {part.failure}" for rank, (part, _) in enumerate(parts) if part.failure]
        found.failures += failures
        if failures or found.stopped:
            return
        found.costs = found.costs.measured(losses=seconds, preparing=once if first else None)
        found.losses = means(sample for part, _ in parts for sample in part.value or ())

    def _make_clips(self, numbers: Sequence[int], found: Findings) -> None:
        rank, world = self.engine.rank, self.engine.world_size
        made = [(number, attempt(lambda number=number: self._make_clip(number))) for number in numbers[rank::world]]  # type: ignore[misc]
        parts = gather_objects(made)
        everything = sorted((item for part in parts for item in part), key=lambda item: numbers.index(item[0]))
        for number, clip in everything:
            if clip.value is not None:
                found.clips.append((self.requests[number], clip.value))
            elif not clip.stopped:
                found.failures.append(f"no validation clip {self.requests[number].name}: {clip.failure}")
        tried = [number for number, clip in everything if not clip.stopped]
        found.stopped = found.stopped or len(tried) < len(numbers)
        found.queue = [number for number in found.queue if number not in tried]
        found.tried += len(tried)
        found.units_s += max(sum(clip.seconds for _, clip in part) for part in parts)
        # A clip that was cut short or failed says nothing of what a whole one takes.
        whole = [[clip.seconds for _, clip in part if clip.value is not None] for part in parts]
        found.costs = found.costs.measured(clips=max((math.fsum(seconds) / len(seconds) for seconds in whole if seconds), default=None))

    def _make_clip(self, number: int) -> MadeClip:
        go_on(self.hurry)
        return make_clip(self.pipeline, self.requests[number], self.steps)

    def _try_fvd(self, found: Findings) -> None:
        """One of its clips on every rank, where no other clip tells what they cost."""
        assert self.fvd is not None
        fvd = self.fvd
        parts = gather_objects(attempt(lambda: fvd.make_one(self.pipeline, self.hurry)))
        seconds = max(part.seconds for part in parts)
        found.units_s += seconds
        if not self._fvd_ended(parts, found):
            found.costs = found.costs.measured(clips=seconds)

    def _fvd_ended(self, parts: Sequence[Attempt[Any]], found: Findings) -> bool:
        """Whether any rank was stopped, which leaves FVD due, or failed: it is tried again when it is due the next time."""
        failures = [f"no FVD: rank {rank}: {part.failure}" for rank, part in enumerate(parts) if part.failure]
        found.failures += failures
        found.fvd_failed, found.stopped = bool(failures), any(part.stopped for part in parts)
        found.fvd_due = not failures
        return found.fvd_failed or found.stopped

    def _measure_fvd(self, found: Findings) -> None:
        """Of all clips or none, for it depends on their number."""
        assert self.fvd is not None
        fvd = self.fvd
        measured = attempt(lambda: fvd.measure(self.pipeline, self.hurry))
        parts = gather_objects((measured, fvd.real_s))
        seconds, once = max(part.seconds for part, _ in parts), max(real_s for _, real_s in parts)
        found.once_s += once
        found.units_s += seconds - once
        if self._fvd_ended([part for part, _ in parts], found):
            return
        distance = attempt(lambda: fvd_of([pair for part, _ in parts for pair in part.value]))
        found.failures += [f"no FVD: {distance.failure}"] if distance.failure else []
        found.fvd, found.fvd_failed, found.fvd_due = distance.value, distance.failure is not None, False
        found.costs = found.costs.measured(fvd=seconds - once)

    def _tell(self, found: Findings, done: int, seconds: float) -> None:
        """Everything into the log; on rank 0."""
        kind = "validation" if self.held_out else "validation_on_training_clips"
        values = {f"{kind}/{name}": value for name, value in (found.losses or {}).items()}
        if found.fvd is not None:
            values[f"{kind}/fvd"] = found.fvd
        carried_out = found.units_s or found.once_s
        overhead = max(0.0, seconds - found.units_s - found.once_s) if carried_out else None
        self.log.validation(
            {
                "step": done,
                "held_out": self.held_out,
                "losses": found.losses,
                "clips": [request.name for request, _ in found.clips],
                "next_clip": found.queue[0] if found.queue else self._first(found),
                "fvd": None if found.fvd is None or self.fvd is None else {"fvd": found.fvd, "variant": self.fvd.variant},
                "fvd_failed": found.fvd_failed,
                "put_off": found.waiting,
                "failures": found.failures,
                "seconds": seconds,
                "costs": found.costs.measured(overhead=overhead).to_json(),
            },
            values,
        )
        for failure in found.failures:
            self.log.say(f"Warning: after step {done} {failure}")
        self.log.say(self._summary(found, done, seconds))

    def _first(self, found: Findings) -> int:
        """All were tried: the next validation begins where this one did."""
        history = self.log.validations
        return history[-1]["next_clip"] if history else 0

    def _summary(self, found: Findings, done: int, seconds: float) -> str:
        parts = []
        if found.losses is not None and self.losses is not None:
            by_task = ", ".join(f"{name[5:]} {value:.4f}" for name, value in found.losses.items() if name[5:].isalpha())
            whose = "held-out clips" if self.held_out else "clips that are trained on, since none is held out"
            parts.append(f"loss {found.losses['loss']:.4f} ({by_task}) on {len(self.losses.clips)} {whose}")
        if found.tried:
            parts.append(f"{len(found.clips)} clips")
        if found.fvd is not None and self.fvd is not None:
            parts.append(f"FVD {found.fvd:.1f} ({self.fvd.count} clips; {self.fvd.variant})")
        text = f"Validation after {done} steps: {'; '.join([*parts, f'{seconds:.1f} s'])}."
        if found.waiting:
            bound = f"to keep to {self.max_share:.1%} of the time (rdtf.validation.max_share)"
            why = "the run was asked to stop" if found.stopped else bound
            text += f" Put off, {why}: {', '.join(found.waiting)}."
        return text
