"""What a run says while it trains: ``metrics.jsonl``, ``validation.jsonl``, TensorBoard, a progress bar. Rank 0 writes, the others are
silent.

After a resume every step stands in all of them once: the files are cut at the step the run goes on from, and TensorBoard is told to
forget what came later (``purge_step``). All are flushed before a checkpoint is committed, so that of what is older than it a killed run
misses nothing. A full disk costs neither a line: what cannot be written waits in memory, and without it no checkpoint is
committed.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from rdtf_ds.checkpoints.durable import replace_file
from rdtf_ds.curriculum.curriculum import CurriculumSnapshot
from rdtf_ds.data.step_plan import StepPlan
from rdtf_ds.diffusion.masks import level
from rdtf_ds.errors import UserError
from rdtf_ds.training.engine import StepOutcome
from rdtf_ds.training.log_files import Board, GrowingFile
from rdtf_ds.training.validation_budget import share

METRICS, VALIDATIONS = "metrics.jsonl", "validation.jsonl"


@dataclass(frozen=True)
class StepRecord:
    """One attempted step, as it is logged.

    Attributes:
        plan: Its samples, in global batch order, as `StepOutcome.sample_losses`.
        snapshot: The curriculum as it stood before the step; the plan itself was drawn from it a few steps earlier.
        times: Seconds of this rank by phase: data, encode, forward, backward, step.
        memory: Bytes at most so far, from `MemoryWatch.read`; None: of the process as a whole.
    """

    plan: StepPlan
    outcome: StepOutcome
    snapshot: CurriculumSnapshot
    times: Mapping[str, float]
    memory: Mapping[str, Any] | None = None

    def metrics(self) -> dict[str, Any]:
        """The line of ``metrics.jsonl``; floats keep every digit."""
        samples, snapshot, outcome = self.plan.samples, self.snapshot, self.outcome
        seconds = sum(self.times.values())
        return {
            "step": self.plan.step,
            "loss": _finite(outcome.loss),
            "k": self.plan.k,
            "tasks": [sample.task.value for sample in samples],
            "sample_ids": [sample.clip_id for sample in samples],
            "levels": [level(sample.mask) for sample in samples],
            "sample_losses": [_finite(loss) for loss in outcome.sample_losses],
            "timesteps": list(outcome.timesteps),
            "static_probability": {task.value: p for task, p in snapshot.static_probability.items()},
            "probability": {task.value: p for task, p in snapshot.task_probability.items()},
            "frame_probability": {str(k): p for k, p in snapshot.frame_probability.items()},
            "pid": snapshot.pid._asdict(),
            "static_level": snapshot.static_level,
            "target_level": snapshot.target_level,
            "grad_norm": _finite(outcome.grad_norm),
            "learning_rate": outcome.learning_rate,
            "loss_scale": outcome.loss_scale,
            "skipped": not outcome.applied,
            "times": dict(self.times),
            "samples_per_second": len(samples) / seconds if seconds > 0 else None,
            "memory": memory_bytes() if self.memory is None else dict(self.memory),
        }


def _finite(value: float) -> float | None:
    """JSON has no infinity: an overflow, which only a skipped step can have, is null."""
    return value if math.isfinite(value) else None


def _all_finite(value: Any) -> Any:
    """`_finite` for every number in a JSON-able value."""
    if isinstance(value, Mapping):
        return {key: _all_finite(part) for key, part in value.items()}
    return _finite(value) if isinstance(value, float) else value


def scalars(metrics: Mapping[str, Any], skipped_steps: int) -> dict[str, float]:
    """TensorBoard tags and values of a line of ``metrics.jsonl``."""
    values: dict[str, Any] = {"loss/mean": metrics["loss"], "curriculum/k": metrics["k"], "optimizer/skipped_steps": skipped_steps}
    for tag, keys in (("loss/task", "tasks"), ("loss/level", "levels")):
        parts = defaultdict(list)
        for key, loss in zip(metrics[keys], metrics["sample_losses"], strict=True):
            if loss is not None:
                parts[key].append(loss)
        values |= {f"{tag}_{key}": sum(losses) / len(losses) for key, losses in parts.items()}
    values |= {f"curriculum/static_{task}": p for task, p in metrics["static_probability"].items()}
    values |= {f"curriculum/probability_{task}": p for task, p in metrics["probability"].items()}
    values |= {f"curriculum/pid_{term}": value for term, value in metrics["pid"].items()}
    values |= {f"curriculum/{key}": metrics[key] for key in ("static_level", "target_level")}
    values |= {f"optimizer/{key}": metrics[key] for key in ("grad_norm", "learning_rate", "loss_scale")}
    values |= {f"seconds/{phase}": value for phase, value in metrics["times"].items()}
    # Those by phase are logged by `MemoryWatch`, when they grow.
    values |= {f"memory_gb/{kind}": value / 1e9 for kind, value in metrics["memory"].items() if not isinstance(value, Mapping)}
    values["speed/samples_per_second"] = metrics["samples_per_second"]
    return {tag: float(value) for tag, value in values.items() if value is not None}


def memory_bytes() -> dict[str, int]:
    """Peak memory so far: ``rss`` of this process, ``cuda`` allocated on its GPU if it has one."""
    unit = 1 if sys.platform == "darwin" else 1024
    memory = {"rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        memory["cuda"] = torch.cuda.max_memory_allocated()
    return memory


class Mark(Protocol):
    """A point of time on a device, as `torch.cuda.Event` is one."""

    def record(self) -> object:
        """Set the mark behind the work given to the device so far."""

    def synchronize(self) -> object:
        """Wait until the device has come to the mark."""

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from here to another."""


class HostMark:
    """A point of time of this process: without a GPU, work is done when its call returns."""

    def record(self) -> None:
        """The mark is now; a later call moves it."""
        self._seconds = time.perf_counter()

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def elapsed_time(self, end_event: HostMark) -> float:
        """Milliseconds from here to another, both recorded; negative if that was before."""
        return 1e3 * (end_event._seconds - self._seconds)


def new_mark() -> Mark:
    """Of the GPU's stream if this process uses one, else of this process."""
    return torch.cuda.Event(enable_timing=True) if torch.cuda.is_initialized() else HostMark()


class Stopwatch:
    """Seconds by phase, each from one `lap` to the next, as the device lives through them.

    A lap leaves a mark in the GPU's stream and does not wait for it: the host stays ahead with its launches. Where the GPU waits for the
    host, as for data, its clock goes on, so the phases add up to the step.
    """

    def __init__(self, new_mark: Callable[[], Mark] = new_mark) -> None:
        self._new_mark = new_mark
        self._laps: list[tuple[str, Mark]] = []
        self._start = self._marked()

    def lap(self, phase: str) -> None:
        """Count the time since the last lap as ``phase``."""
        self._laps.append((phase, self._marked()))

    def read(self) -> dict[str, float]:
        """Seconds of every phase so far; waits for the last mark, so read it after the step, whose loss was waited for anyway."""
        seconds: dict[str, float] = defaultdict(float)
        if self._laps:
            self._laps[-1][1].synchronize()
        before = self._start
        for phase, mark in self._laps:
            seconds[phase] += before.elapsed_time(mark) / 1e3
            before = mark
        return dict(seconds)

    def _marked(self) -> Mark:
        mark = self._new_mark()
        mark.record()
        return mark


class RunLog:
    """The log of one run, a context; on ranks other than 0 every call does nothing.

    Attributes:
        trained_s: Seconds of all training steps of the run so far.
        validations: Every line of ``validation.jsonl``.

    Args:
        folder: The run's.
        rank: Of this process.
        first_step: The step this process starts with: what was logged from there on is dropped.
        max_steps: Of the run, for the progress bar.
        config: Resolved experiment, shown as text.
    """

    def __init__(self, folder: Path, rank: int, first_step: int, max_steps: int, config: Mapping[str, Any]) -> None:
        self._quiet = rank != 0
        self._skipped_steps = 0
        self.trained_s, self.validations = 0.0, list[dict[str, Any]]()
        if self._quiet:
            return
        try:
            kept = truncate_metrics(folder / METRICS, first_step)
            # A validation after so many steps is part of the state that the run goes on from.
            self.validations = truncate_metrics(folder / VALIDATIONS, first_step + 1 if first_step else 0)
            self._metrics, self._validations = GrowingFile(folder / METRICS), GrowingFile(folder / VALIDATIONS)
            self._board = Board(folder / "tensorboard", first_step)
        except OSError as error:
            path = error.filename or folder / METRICS
            raise UserError(f"'{path}' cannot be written ({error.strerror}). Free some space and start again.") from error
        self._skipped_steps = sum(bool(line.get("skipped")) for line in kept)
        self.trained_s = math.fsum(seconds for line in kept for seconds in line.get("times", {}).values())
        self._alarmed = False
        if not first_step:
            self._board.text("config", f"```json\n{json.dumps(config, indent=2)}\n```", 0)
        self._bar = tqdm(total=max_steps, initial=first_step, unit="step", dynamic_ncols=True, disable=None, file=sys.stderr)
        self._first_step, self._max_steps, self._started = first_step, max_steps, time.monotonic()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def step(self, record: StepRecord) -> None:
        """Log one attempted step."""
        if self._quiet:
            return
        metrics = record.metrics()
        self._skipped_steps += metrics["skipped"]
        self.trained_s += sum(metrics["times"].values())
        self._metrics.write(f"{json.dumps(metrics)}\n".encode())
        for tag, value in scalars(metrics, self._skipped_steps).items():
            self._board.scalar(tag, value, metrics["step"])
        self._pass_on()
        self._show(metrics["step"] + 1, f"loss {record.outcome.loss:.4f}, level {metrics['target_level']:.2f}, k {metrics['k']}")

    @property
    def validated_s(self) -> float:
        """Seconds of all validations of the run so far."""
        return math.fsum(line["seconds"] for line in self.validations)

    def validation(self, line: Mapping[str, Any], values: Mapping[str, float]) -> None:
        """Log one validation: a line of ``validation.jsonl``, to which its share of the time so far is added, and TensorBoard's values."""
        if self._quiet:
            return
        self.validations.append(dict(line))
        taken = share(self.trained_s, self.validated_s)
        self.validations[-1] |= {"trained_s": self.trained_s, "share": taken}
        self._validations.write(f"{json.dumps(_all_finite(self.validations[-1]))}\n".encode())
        for tag, value in {**values, "validation/seconds": line["seconds"], "validation/share": taken}.items():
            self.scalar(tag, value, line["step"])
        self._pass_on()

    def say_share_of_validation(self, bound: float) -> None:
        """How much of the time of the run so far validation took, if there was any."""
        if self.validations:
            taken = share(self.trained_s, self.validated_s)
            self.say(f"Validation took {taken:.1%} of the time (rdtf.validation.max_share: {bound:.1%}).")

    def _show(self, done: int, text: str) -> None:
        """The bar on a terminal; elsewhere, such as in a log file, a line every twentieth of the run."""
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update()
        if self._bar.disable and (done % max(1, self._max_steps // 20) == 0 or done == self._max_steps):
            left = (time.monotonic() - self._started) / (done - self._first_step) * (self._max_steps - done)
            self.say(f"step {done}/{self._max_steps}: {text}, {tqdm.format_interval(left)} left")

    def gif(self, tag: str, path: Path, done: int, frames_shape: tuple[int, int]) -> None:
        """Show a GIF file in TensorBoard, moving.

        Args:
            done: Attempted steps behind it; it is shown at the last of them, or a resume from here would purge it.
            frames_shape: (height, width) of the picture.
        """
        if not self._quiet:
            # SummaryWriter.add_video needs moviepy and re-encodes; the file format itself just holds the bytes.
            self.picture(tag, path.read_bytes(), *frames_shape, done)

    def picture(self, tag: str, data: bytes, height: int, width: int, done: int) -> None:
        """Show an image file's bytes in TensorBoard, at the last of ``done`` attempted steps."""
        if not self._quiet:
            self._board.picture(tag, data, height, width, max(done - 1, 0))

    def text(self, tag: str, markdown: str, done: int) -> None:
        """Show a text in TensorBoard, at the last of ``done`` attempted steps."""
        if not self._quiet:
            self._board.text(tag, markdown, max(done - 1, 0))

    def say(self, text: str) -> None:
        """A line for the person watching, above the progress bar."""
        if not self._quiet:
            tqdm.write(text, file=sys.stderr)

    def alarm(self, text: str) -> None:
        """A line that must not be missed; training goes on."""
        self.say(f"ALARM: {text}")

    def scalar(self, tag: str, value: float, done: int) -> None:
        """A value of TensorBoard's alone, at the last of ``done`` attempted steps."""
        if not self._quiet:
            self._board.scalar(tag, value, max(done - 1, 0))

    def flush(self) -> str | None:
        """Put everything logged so far on disk; why that is not possible, or None."""
        return None if self._quiet else self._pass_on(sync=True)

    def close(self) -> None:
        """Put everything logged on disk, as far as it takes it, and close files and bar; leaving the context does this."""
        if self._quiet:
            return
        self.flush()
        self._metrics.close()
        self._validations.close()
        self._board.file.close()
        self._bar.close()

    def _pass_on(self, sync: bool = False) -> str | None:
        """To the files; says when they begin to fail, and when they no longer do."""
        failure = self._metrics.pass_on(sync) or self._validations.pass_on(sync) or self._board.file.pass_on(sync)
        if failure and not self._alarmed:
            self.alarm(f"{failure}. What is logged is kept in memory and written as soon as that works; training goes on.")
        elif not failure and self._alarmed:
            self.say("The log can be written again.")
        self._alarmed = failure is not None
        return failure


def truncate_metrics(path: Path, first_step: int) -> list[dict[str, Any]]:
    """Cut a file of lines by step to the whole ones of steps before ``first_step``, atomically; returns them.

    A line that a kill cut short, and all after it, go too: they belong to steps that will be run again.
    """
    if not path.exists():
        return []
    kept, lines = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            metrics = json.loads(line)
        except json.JSONDecodeError:
            break
        if metrics["step"] < first_step:
            kept.append(metrics)
            lines.append(line + "\n")
    replace_file(path, "".join(lines).encode())
    return kept
