"""What a user can get wrong on the command line: one paragraph, exit code 2 (130 for Ctrl-C), no traceback, nothing lost."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rdtf_ds.checkpoints.store import CheckpointStore, Tag
from rdtf_ds.data.synthetic import write_stickers

ROOT = Path(__file__).resolve().parents[2]
FAST = ("--set", "train_batch_size=2", "--set", "rdtf.data.workers=0", "--set", "rdtf.checkpoint.interval=1")


def typed(*arguments: str, config: str = "tiny_cpu.json") -> list[str]:
    """What train.py is given."""
    return ["--deepspeed_config", str(ROOT / "ds_configs" / config), *arguments]


def command(*arguments: str) -> list[str]:
    """train.py as a script, whose imports take a few seconds: for what the fork server's ranks cannot show."""
    return [sys.executable, str(ROOT / "rdtf_ds" / "train.py"), *typed(*arguments)]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""} | more


def in_one_paragraph(said: str) -> str:
    """The error in what a command said, on one line; checks its manner."""
    assert "Traceback" not in said
    message = said[said.index("Error: ") :]
    assert "\n\n" not in message.strip() and len(message) < 1500, message
    return " ".join(message.split())


@pytest.fixture
def told(fork_server, tmp_path_factory) -> Callable[..., str]:
    """A function of train.py's arguments, and environment: what its one rank says of them before it ends with code 2."""

    def run(arguments: list[str], **environment: str) -> str:
        launched = fork_server.launch(arguments, 1, tmp_path_factory.mktemp("logs"), environment)
        assert launched.wait() == 2, launched.said
        return in_one_paragraph(launched.said)

    return run


@pytest.fixture(scope="module")
def stickers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stickers")
    write_stickers(folder, 12, seed=2, size=32, suffixes=(".gif", ".webp"))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory, stickers, fork_server):
    """A run of one step on one rank."""
    folder = tmp_path_factory.mktemp("run")
    arguments = typed("--output_dir", str(folder), "--data_dir", str(stickers), "--max_steps", "1", *FAST)
    assert fork_server.launch(arguments, 1, folder / "logs").wait() == 0
    return folder


def test_a_missing_data_folder(tmp_path):
    arguments = command("--output_dir", str(tmp_path / "run"), "--data_dir", str(tmp_path / "absent"))
    done = subprocess.run(arguments, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stdout == ""
    message = in_one_paragraph(done.stderr)
    assert str(tmp_path / "absent") in message and "--data_dir" in message


def test_an_empty_data_folder(told, tmp_path):
    (tmp_path / "clips").mkdir()
    message = told(typed("--output_dir", str(tmp_path / "run"), "--data_dir", str(tmp_path / "clips")))
    assert str(tmp_path / "clips") in message and "no clips" in message


def test_an_unknown_key_and_impossible_batch_arithmetic_together(told, tmp_path):
    message = told(
        typed("--output_dir", str(tmp_path), "--set", "rdtf.optimizer.learning_rat=1", "--set", "train_micro_batch_size_per_gpu=3")
    )
    assert "rdtf.optimizer.learning_rate" in message and "train_batch_size" in message and "2 problems" in message


def test_a_batch_that_the_ranks_cannot_share(told, tmp_path):
    message = told(typed("--output_dir", str(tmp_path)), WORLD_SIZE="3")
    assert "cannot be split over 3" in message


def test_a_number_of_ranks_whose_checkpoints_could_not_be_moved(told, tmp_path):
    message = told(typed("--output_dir", str(tmp_path), "--set", "train_batch_size=10"), WORLD_SIZE="5")
    assert "5 GPUs cannot share" in message and "train_batch_size = 10: 1, 2." in message


def test_a_folder_in_use_by_another_trainer(told, fork_server, tmp_path, stickers):
    folder = tmp_path / "run"
    arguments = typed("--output_dir", str(folder), "--data_dir", str(stickers), "--max_steps", "5000", *FAST)
    holder = fork_server.launch(arguments, 1, tmp_path)
    try:
        deadline = time.monotonic() + 300
        while not (folder / "metrics.jsonl").exists():
            assert holder.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        message = told(typed("--output_dir", str(folder), "--data_dir", str(stickers), *FAST), RDTF_FAULT="impatient seconds=1")
        assert "in use by another trainer, process" in message and "--output_dir" in message
        assert holder.poll() is None and not (folder / "outcome.json").exists(), "the first one is still under way"
        (folder / "stop").touch()
        assert holder.wait(patience=120) == 0
        assert json.loads((folder / "outcome.json").read_text())["exit_code"] == 0 and not (folder / "stop").exists()
    finally:
        holder.kill()


def test_a_stale_lock_of_a_compiler_stops_nobody(tmp_path, stickers):
    """DeepSpeed's first start compiles an operator; killed meanwhile it leaves a lock at which later starts hang. Ours compiles none."""
    for build in ("", "py311_cpu", f"py{sys.version_info.major}{sys.version_info.minor}_cpu"):
        place = tmp_path / "extensions" / build / "deepspeed_shm_comm"
        place.mkdir(parents=True, exist_ok=True)
        (place / "lock").touch()
    arguments = command("--output_dir", str(tmp_path / "run"), "--data_dir", str(stickers), "--max_steps", "1", *FAST)
    done = subprocess.run(
        arguments, cwd=ROOT, env=environment(TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions")), text=True, timeout=300, capture_output=True
    )
    assert done.returncode == 0, done.stderr


def test_fp16_without_a_gpu(told, tmp_path):
    message = told(typed("--output_dir", str(tmp_path), "--data_dir", str(tmp_path), config="v100.json"))
    assert "fp16" in message and "rdtf.verify_fp16_on_cpu" in message


def test_an_output_folder_that_cannot_be_written(told, tmp_path, stickers):
    (tmp_path / "file").write_text("")
    message = told(typed("--output_dir", str(tmp_path / "file" / "run"), "--data_dir", str(stickers)))
    assert str(tmp_path / "file" / "run") in message and "--output_dir" in message


def test_a_port_in_use(told, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        message = told(typed("--output_dir", str(tmp_path)), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert f"Port {port}" in message and "--master_port" in message


def test_a_checkpoint_of_another_model(told, finished, stickers, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    config = (folder / "config.json").read_bytes()
    message = told(
        typed("--output_dir", str(folder), "--data_dir", str(stickers), "--max_steps", "2", *FAST,
                "--set", "rdtf.model.block_out_channels=[16,16]", "--seed", "9")
    )  # fmt: skip
    assert "rdtf.model.block_out_channels was [8, 16] and is now [16, 16]" in message and "rdtf.seed was 0 and is now 9" in message
    assert (folder / "config.json").read_bytes() == config, "a refused resume leaves the run as it was"
    assert CheckpointStore(folder / "checkpoints").newest()[1] == []


def test_a_run_that_is_done_says_so(finished, stickers, fork_server, tmp_path):
    before = (finished / "metrics.jsonl").read_bytes()
    arguments = typed("--output_dir", str(finished), "--data_dir", str(stickers), "--max_steps", "1", *FAST)
    done = fork_server.launch(arguments, 1, tmp_path)
    assert done.wait() == 0 and "Resumed after 1 steps" in done.said and "Done: 1 steps" in done.said
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, stickers):
    arguments = command("--output_dir", str(tmp_path / "run"), "--data_dir", str(stickers), "--dry_run")
    done = subprocess.run(arguments, cwd=ROOT, env=environment(WORLD_SIZE="2"), text=True, timeout=300, capture_output=True)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert lines["batch"].startswith("4 = 2 rank(s) x 1 at once x 2 in turn")
    assert lines["parameters"].startswith("91,928 ") and "12 to train on" in lines["data"] and "k = " in lines["plan"]
    assert not (tmp_path / "run").exists()


def test_ctrl_c_leaves_a_run_that_goes_on(tmp_path, stickers):
    folder = tmp_path / "run"
    options = ("--data_dir", str(stickers), "--max_steps", "5000", *FAST, "--set", "rdtf.data.workers=1")
    arguments = command("--output_dir", str(folder), *options)
    # A suite started in the background of a shell inherits an ignored SIGINT, and so would the run.
    heeding = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(arguments, cwd=ROOT, env=environment(), text=True, preexec_fn=heeding, **pipes)
    deadline = time.monotonic() + 300
    while not (folder / "metrics.jsonl").exists() or (folder / "metrics.jsonl").read_text().count("\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in output + errors and "Interrupted" in errors
    latest, reasons = CheckpointStore(folder / "checkpoints").newest()
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert reasons == [] and steps == list(range(len(steps)))
    assert len(steps) - 1 <= Tag.of(latest.name).step <= len(steps)
