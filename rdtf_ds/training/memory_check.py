"""Before anything large is allocated: what a run is predicted to need of the memory that is there; a run that cannot fit is refused."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from rdtf_ds.data.clips.writing import write_atomically
from rdtf_ds.errors import UserError, on_every_rank
from rdtf_ds.experiment import Experiment
from rdtf_ds.memory.chart import png
from rdtf_ds.memory.report import Limit, Report, lines_of, remedy, report_of, told, verdict
from rdtf_ds.training.collectives import gather_objects, on_rank_zero
from rdtf_ds.training.device_memory import Room, room_of
from rdtf_ds.training.memory_plan import Planned, plan_experiment
from rdtf_ds.training.telemetry import RunLog

TABLE = "memory_plan.txt"


def check_memory(experiment: Experiment, world_size: int, device: torch.device, ignore: bool = False) -> Report | None:
    """Plan a run's memory, say its peak, and refuse it if that is more than there is. Called by all ranks; rank 0 plans.

    Seconds on the full network, one on a tiny one. Weights, random state and default dtype stay as they are: nothing in it has data.

    Args:
        ignore: Start all the same, with a warning.

    Raises:
        UserError: It cannot fit; by how much, in which phase, and what would make it fit. Or no plan could be made.

    Returns:
        None when no plan could be made, and ``ignore``.
    """
    planned: list[Planned] = []
    if failure := on_rank_zero(lambda: _plan_into(planned, experiment, world_size, device)):
        if not ignore:
            raise on_every_rank(UserError(f"{failure} --ignore_memory_plan starts without a plan."))
        on_rank_zero(lambda: print(f"Warning: {failure} It starts without a plan (--ignore_memory_plan).", file=sys.stderr, flush=True))
        return None
    # Looked at after the plan has taken its seconds: a run that just ended here may have needed them to give its memory back.
    room = tightest(gather_objects(room_of(device, world_size)))
    report = on_rank_zero(lambda: report_on(planned[0], room))
    faults = [] if report["fits"] else [refusal(report, room)]
    faults += filter(None, [host_shortage(report, room)])
    if faults and not ignore:
        raise on_every_rank(UserError(f"{' '.join(faults)} --ignore_memory_plan starts it all the same."))

    def say() -> None:
        """The verdict on standard error, and what ``ignore`` lets pass."""
        print(f"Memory, predicted {above(room)}. {verdict(report)}", file=sys.stderr, flush=True)
        for fault in faults:
            print(f"Warning: {fault} It starts all the same (--ignore_memory_plan).", file=sys.stderr, flush=True)

    on_rank_zero(say)
    return report


def _plan_into(planned: list[Planned], experiment: Experiment, world_size: int, device: torch.device) -> str | None:
    """Plan; why that is not possible, or None. A fault of the planner must not be what no run gets past."""
    try:
        planned.append(plan_experiment(experiment, world_size, room_of(device, world_size).gpu))
    except UserError:
        raise
    except Exception as error:
        return f"The memory of this run could not be predicted ({type(error).__name__}: {error}), which is a bug worth a report."
    return None


def report_on(planned: Planned, room: Room) -> Report:
    """The report of a plan on the memory that is there, without what only someone who chooses a card asks."""
    made = planned.plan if room.gpu is None else replace(planned.plan, gpu=room.gpu)
    return report_of(made, planned.sources, planned.encoders.assumed, Limit(room.name, room.bytes), what_if=False)


def tightest(rooms: Iterable[Room]) -> Room:
    """That of the rank with the least, beside the least of the machines' memory."""
    everyones = list(rooms)
    hosts = [room.host for room in everyones if room.host is not None]
    return replace(min(everyones, key=lambda room: room.bytes), host=min(hosts, default=None))


def above(room: Room) -> str:
    """What the figures are figures of."""
    if room.gpu is not None:
        return f"for each {room.name}"
    return f"for each of {room.ranks} rank(s) here, above what its process holds by now"


def refusal(report: Report, room: Room) -> str:
    """Why a run cannot fit, and what would make it."""
    need, there = told(report["peak_bytes"]), told(report["gpu_bytes"])
    if room.gpu is not None:
        held = f", of whose {told(room.total)} other processes hold {told(room.taken)}" if room.taken else ""
        where = f"the {there} there are on {room.name}{held}"
    else:
        where = (
            f"the {there} there are for each of {room.ranks} rank(s) in this machine's memory ({told(room.total)}, of which "
            f"{told(room.taken)} are in use)"
        )
    return (
        f"This run does not fit into memory: {report['peak_phase']} is predicted to need {need} a rank, "
        f"{told(-report['margin_bytes'])} more than {where}. {remedy(report)}"
    )


def host_shortage(report: Report, room: Room) -> str | None:
    """Why the machine cannot hold what waits beside its cards, or None. On a CPU that is among the figures of the phases."""
    need = sum(report["host_bytes"].values())
    if room.host is None or need <= room.host:
        return None
    parts = ", ".join(f"{category} {told(size)}" for category, size in report["host_bytes"].items())
    return (
        f"This run does not fit into CPU memory: each rank is predicted to keep {told(need)} there ({parts}), and {told(room.host)} are "
        f"free for each. Start fewer ranks on this machine, or leave more on the card: zero_optimization.offload_optimizer=null, "
        f"rdtf.ema.device=gpu, rdtf.memory.encoders=resident."
    )


def foretell(experiment: Experiment, world_size: int, device: torch.device) -> tuple[list[str], str | None]:
    """For a dry run, on this process's device alone: the plan as lines, and why the run cannot fit, or None."""
    room = room_of(device, world_size)
    report = report_on(plan_experiment(experiment, world_size, room.gpu), room)
    return [f"predicted {above(room)}", *lines_of(report)], host_shortage(report, room) if report["fits"] else refusal(report, room)


def keep_plan(report: Report | None, folder: Path, log: RunLog, first_step: int) -> None:
    """The whole table in the run folder and, with its picture, in TensorBoard; the picture only of a new run, for it takes half a second.

    Raises:
        UserError: The folder cannot be written.
    """
    if report is None:
        return
    table = "\n".join(lines_of(report))

    def keep() -> None:
        """Rank 0's part: its UserError reaches every rank."""
        try:
            write_atomically(folder / TABLE, f"{table}\n".encode())
        except OSError as error:
            raise UserError(f"'{folder / TABLE}' cannot be written ({error.strerror}). Free some space and start again.") from error
        if not first_step:
            log.text("memory/plan", f"```\n{table}\n```", 0)
            log.picture("memory/plan", *png(report), 0)

    on_rank_zero(keep)
    log.say(f"The predicted memory of every phase is in {folder / TABLE}.")
