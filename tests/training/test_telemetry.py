from __future__ import annotations

import json
import time
from typing import ClassVar

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rdtf_ds.curriculum.curriculum import CurriculumSnapshot
from rdtf_ds.curriculum.pid import PIDTerms
from rdtf_ds.data.clips.writing import write_clip
from rdtf_ds.data.step_plan import SamplePlan, StepPlan
from rdtf_ds.diffusion.masks import Task
from rdtf_ds.training.engine import StepOutcome
from rdtf_ds.training.log_files import GrowingFile
from rdtf_ds.training.telemetry import RunLog, StepRecord, Stopwatch, scalars, truncate_metrics
from tests.faults.saboteur import file_size_limit

LOSS = 0.1 + 0.2  # needs every digit: 0.30000000000000004


def record(step: int, loss: float = LOSS, applied: bool = True) -> StepRecord:
    plans = (
        SamplePlan(2 * step, 7, 3, Task.INTERPOLATION, (True, False, True), True),
        SamplePlan(2 * step + 1, 4, 3, Task.GENERATION, (False, False, False), True),
    )
    snapshot = CurriculumSnapshot(
        {Task.INTERPOLATION: 0.6, Task.PREDICTION: 0.25, Task.GENERATION: 0.15}, 3.0, PIDTerms(0.1, 0.5, 0.3, 0.13, 0.93), 2.07, {3: 1.0},
        {Task.INTERPOLATION: 0.7, Task.PREDICTION: 0.2, Task.GENERATION: 0.1}, {1: 1.0}, {},
    )  # fmt: skip
    outcome = StepOutcome(applied, False, loss, (loss, 3 * loss), (11, 22), 1.5 if applied else float("inf"), 1e-3, 8.0)
    return StepRecord(StepPlan(step, 3, plans), outcome, snapshot, {"data": 0.5, "forward": 1.5})


def read(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def board(folder, **sizes):
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return events


def test_a_line_holds_the_step():
    line = record(5).metrics()
    assert json.loads(json.dumps(line))["loss"] == LOSS
    assert (line["step"], line["k"], line["tasks"], line["sample_ids"], line["levels"]) == (5, 3, ["IPT", "GRT"], [7, 4], [1, 3])
    assert line["probability"] == {"IPT": 0.7, "PDT": 0.2, "GRT": 0.1} and line["static_probability"]["IPT"] == 0.6
    assert line["pid"]["total"] == 0.93 and line["target_level"] == 2.07
    assert line["samples_per_second"] == 1.0 and line["memory"]["rss"] > 10**7 and line["skipped"] is False


def test_a_skipped_step_is_valid_json():
    line = json.dumps(record(0, float("inf"), applied=False).metrics(), allow_nan=False)
    assert json.loads(line) | {} and json.loads(line)["skipped"] is True and json.loads(line)["loss"] is None


def test_scalars_split_the_loss_by_task_and_level():
    values = scalars(record(5).metrics(), skipped_steps=3)
    assert values["loss/mean"] == values["loss/task_IPT"] == values["loss/level_1"] == LOSS
    assert values["loss/task_GRT"] == values["loss/level_3"] == 3 * LOSS
    assert values["optimizer/skipped_steps"] == 3 and values["optimizer/grad_norm"] == 1.5 and values["seconds/forward"] == 1.5
    assert values["curriculum/probability_PDT"] == 0.2 and values["curriculum/static_PDT"] == 0.25
    assert values["curriculum/pid_integral"] == 0.3
    assert {"curriculum/k", "optimizer/loss_scale", "optimizer/learning_rate", "speed/samples_per_second", "memory_gb/rss"} <= values.keys()


def test_a_resumed_log_holds_every_step_once(tmp_path):
    with RunLog(tmp_path, 0, 0, 9, {"a": 1}) as log:
        for step in range(6):
            log.step(record(step, loss=1.0 + step))
    with RunLog(tmp_path, 0, 4, 9, {"a": 1}) as log:
        for step in range(4, 9):
            log.step(record(step, loss=101.0 + step))
    expected = [1.0, 2.0, 3.0, 4.0, 105.0, 106.0, 107.0, 108.0, 109.0]
    assert [(line["step"], line["loss"]) for line in read(tmp_path)] == list(enumerate(expected))
    events = board(tmp_path)
    assert [(event.step, event.value) for event in events.Scalars("loss/mean")] == list(enumerate(expected))
    assert '"a": 1' in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()


def test_a_run_started_over_forgets_the_first_try(tmp_path):
    for _ in range(2):
        with RunLog(tmp_path, 0, 0, 3, {}) as log:
            for step in range(2):
                log.step(record(step))
    assert [line["step"] for line in read(tmp_path)] == [0, 1]
    assert [event.step for event in board(tmp_path).Scalars("loss/mean")] == [0, 1]


def test_skipped_steps_are_counted_across_a_resume(tmp_path):
    with RunLog(tmp_path, 0, 0, 4, {}) as log:
        for step in range(2):
            log.step(record(step, applied=step != 0))
    with RunLog(tmp_path, 0, 2, 4, {}) as log:
        log.step(record(2, applied=False))
    assert [event.value for event in board(tmp_path).Scalars("optimizer/skipped_steps")] == [1.0, 1.0, 2.0]


def test_a_torn_line_and_later_steps_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 1}\n{"step": 1, "loss": 2}\n{"step": 2, "lo')
    assert [line["step"] for line in truncate_metrics(path, 3)] == [0, 1]
    assert path.read_text() == '{"step": 0, "loss": 1}\n{"step": 1, "loss": 2}\n'
    assert [line["step"] for line in truncate_metrics(path, 1)] == [0]
    assert truncate_metrics(tmp_path / "absent", 1) == []


def test_a_gif_arrives_in_tensorboard_moving(tmp_path):
    frames = np.stack([np.full((16, 24, 3), value, np.uint8) for value in (0, 128, 255)])
    write_clip(frames, tmp_path / "a.gif", 100)
    with RunLog(tmp_path, 0, 0, 4, {}) as log:
        log.gif("samples/a", tmp_path / "a.gif", 2, (16, 24))
    (image,) = board(tmp_path).Images("samples/a")
    assert image.encoded_image_string == (tmp_path / "a.gif").read_bytes() and (image.step, image.width, image.height) == (1, 24, 16)


def test_other_ranks_write_nothing(tmp_path):
    with RunLog(tmp_path, 1, 0, 4, {}) as log:
        log.step(record(0))
        log.say("a word")
        log.flush()
    assert list(tmp_path.iterdir()) == []


def test_a_log_file_gets_lines_with_the_time_left(tmp_path, capfd):
    with RunLog(tmp_path, 0, 0, 40, {}) as log:
        for step in range(40):
            log.step(record(step))
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("step ")]
    assert len(lines) == 20 and "loss 0.3000, level 2.07, k 3" in lines[0] and "left" in lines[0]


def test_a_stopwatch_adds_up_phases():
    watch = Stopwatch()
    for phase in ("data", "forward", "data"):
        watch.lap(phase)
    assert list(watch.read()) == ["data", "forward"] and all(value >= 0 for value in watch.read().values())
    assert sum(watch.read().values()) == pytest.approx(0, abs=1.0)


class StreamMark:
    """A mark that, as a CUDA event, has no time before the device came to it; the device takes 1, 10, 100 ... ms between marks."""

    made: ClassVar[list[StreamMark]] = []
    waited: ClassVar[list[StreamMark]] = []

    def record(self):
        self.place = len(self.made)
        self.made.append(self)

    def synchronize(self):
        self.waited.append(self)

    def elapsed_time(self, end):
        assert self.waited and self.waited[-1].place >= end.place, "asked before the device came there"
        return sum(10.0**i for i in range(self.place, end.place))


def test_a_stopwatch_waits_for_the_device_once_when_it_is_read():
    StreamMark.made.clear(), StreamMark.waited.clear()
    watch = Stopwatch(StreamMark)
    for phase in ("encode", "forward", "encode"):
        watch.lap(phase)
    assert not StreamMark.waited, "a lap does not wait"
    assert watch.read() == pytest.approx({"encode": 0.101, "forward": 0.010})
    assert len(StreamMark.waited) == 1
    assert Stopwatch(StreamMark).read() == {}


def test_without_a_gpu_the_host_is_the_clock():
    watch = Stopwatch()
    time.sleep(0.02)
    watch.lap("data")
    watch.lap("step")
    seconds = watch.read()
    assert 0.02 <= seconds["data"] < 1.0 and 0 <= seconds["step"] < seconds["data"]


def test_a_full_disk_costs_no_line(tmp_path):
    lines = GrowingFile(tmp_path / "x")
    lines.write(b"first\n")
    assert lines.pass_on() is None and lines.pass_on(sync=True) is None
    with file_size_limit(9):
        for line in (b"second\n", b"third\n"):
            lines.write(line)
            assert "cannot be written" in lines.pass_on()
        assert (tmp_path / "x").read_text() == "first\n", "no line is there in part"
        assert "cannot be written" in lines.pass_on(sync=True)
    assert lines.pass_on(sync=True) is None
    lines.write(b"fourth\n")
    assert lines.pass_on() is None
    lines.close()
    assert (tmp_path / "x").read_text() == "first\nsecond\nthird\nfourth\n"


def test_a_log_that_cannot_be_written_is_one_alarm_and_loses_nothing(tmp_path, capsys):
    with RunLog(tmp_path, 0, 0, 9, {}) as log:
        log.step(record(0))
        with file_size_limit(10):
            log.step(record(1))
            log.scalar("x", 1.0, 2)
            assert "cannot be written" in log.flush()
        assert len(read(tmp_path)) == 1
        log.step(record(2))
        assert log.flush() is None
    told = capsys.readouterr().err
    assert told.count("ALARM: ") == 1 and told.count("The log can be written again.") == 1
    assert [line["step"] for line in read(tmp_path)] == [0, 1, 2]
    events = board(tmp_path)
    assert [event.step for event in events.Scalars("loss/mean")] == [0, 1, 2] and [event.value for event in events.Scalars("x")] == [1.0]


def validation(step: int, seconds: float = 1.0, **more) -> dict:
    return {"step": step, "losses": {"loss": 0.5}, "seconds": seconds, **more}


def test_validations_are_logged_with_their_share_of_the_time(tmp_path, capsys):
    with RunLog(tmp_path, 0, 0, 9, {}) as log:
        for step in range(3):
            log.step(record(step))  # 2 s each
        assert log.trained_s == pytest.approx(6.0) and log.validated_s == 0
        log.say_share_of_validation(0.05)
        log.validation(validation(3, 2.0), {"validation/loss": 0.5})
        log.validation(validation(3, 1.0, losses={"loss": float("nan")}), {})
        log.say_share_of_validation(0.05)
        assert log.validated_s == 3.0
    first, second = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert first == {**validation(3, 2.0), "trained_s": pytest.approx(6.0), "share": pytest.approx(0.25)}
    assert second["losses"] == {"loss": None} and second["share"] == pytest.approx(3 / 9)
    told = capsys.readouterr().err
    assert told.count("Validation took ") == 1 and "Validation took 33.3% of the time (rdtf.validation.max_share: 5.0%)." in told
    events = board(tmp_path)
    assert [(event.step, event.value) for event in events.Scalars("validation/loss")] == [(2, 0.5)], "a resume from step 3 keeps it"
    assert [event.value for event in events.Scalars("validation/share")] == pytest.approx([0.25, 1 / 3])


def test_a_resume_keeps_the_validations_before_it_and_the_time_spent(tmp_path):
    with RunLog(tmp_path, 0, 0, 9, {}) as log:
        for step in range(6):
            log.step(record(step))
            if step % 2:
                log.validation(validation(step + 1), {"validation/loss": float(step)})
    with RunLog(tmp_path, 0, 4, 9, {}) as log:
        assert [line["step"] for line in log.validations] == [2, 4], "the validation after 4 steps is behind what it goes on from"
        assert log.trained_s == pytest.approx(8.0) and log.validated_s == 2.0
    assert [event.step for event in board(tmp_path).Scalars("validation/loss")] == [1, 3]
    with RunLog(tmp_path, 0, 0, 9, {}) as log:
        assert log.validations == [] and log.trained_s == 0


def test_validations_wait_for_a_full_disk_too(tmp_path, capsys):
    with RunLog(tmp_path, 0, 0, 9, {}) as log:
        with file_size_limit(10):
            log.validation(validation(1), {})
            assert "validation.jsonl" in log.flush()
        assert log.flush() is None
    assert len((tmp_path / "validation.jsonl").read_text().splitlines()) == 1
    with RunLog(tmp_path / "other", 1, 0, 9, {}) as quiet:
        quiet.validation(validation(1), {})
        assert quiet.validations == [] and quiet.validated_s == 0 and not (tmp_path / "other").exists()
