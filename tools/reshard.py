"""Makes a checkpoint fit another number of GPUs: ``python tools/reshard.py CHECKPOINT --to N OUT``.

A run started on another number of GPUs does the same by itself; this does it beforehand, without GPUs. The new checkpoint holds the same
state bit for bit. OUT is a new run folder, or the run the checkpoint is of; then the run goes on from it, so no later step may be there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # only classes of DeepSpeed's are needed

from rdtf_ds.checkpoints.durable import replace_file  # noqa: E402
from rdtf_ds.checkpoints.manifest import read_key, read_manifest  # noqa: E402
from rdtf_ds.checkpoints.offline_reshard import reshard  # noqa: E402
from rdtf_ds.checkpoints.resharding import batch_keys  # noqa: E402
from rdtf_ds.checkpoints.store import CheckpointStore, Tag, find_step_folder  # noqa: E402
from rdtf_ds.errors import UserError  # noqa: E402
from rdtf_ds.training.checkpoint import RECOVERY_SCRIPT  # noqa: E402
from rdtf_ds.training.engine import quiet_deepspeed  # noqa: E402
from rdtf_ds.training.run_lock import RunLock  # noqa: E402
from rdtf_ds.training.shard_files import read_shard, recovery_script  # noqa: E402


@dataclass(frozen=True)
class Report:
    """What was made: ``folder`` for ``ranks`` processes, of ``source``, which is of ``source_ranks``; ``micro_batch`` samples fit them."""

    folder: str
    source: str
    step: int
    source_ranks: int
    ranks: int
    micro_batch: int
    bytes: int
    seconds: float


def main() -> int:
    """Exit code 0, or 2 with one paragraph on standard error when it cannot be done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a run folder (its newest checkpoint is taken) or one of the step folders in it")
    parser.add_argument("--to", type=int, required=True, metavar="N", help="processes (GPUs) the new checkpoint is for")
    parser.add_argument("out", type=Path, help="run folder to go on in: a new one, or the one the checkpoint is of")
    parser.add_argument("--key_file", help="the secret that signs manifests; default: rdtf.checkpoint.key_file of the run")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    quiet_deepspeed()
    try:
        report, old_micro_batch = _run(arguments.checkpoint, arguments.to, arguments.out, arguments.key_file)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if arguments.json:
        print(json.dumps(asdict(report)))
        return 0
    print(
        f"{report.folder} holds step {report.step} for {report.ranks} process(es), bit for bit that of {report.source} for "
        f"{report.source_ranks}: {report.bytes / 2**20:,.1f} MiB in {report.seconds:.1f} s."
    )
    changed = f" --set train_micro_batch_size_per_gpu={report.micro_batch}" if report.micro_batch != old_micro_batch else ""
    print(f"Next: the run's command on {report.ranks} process(es), with --output_dir {arguments.out}{changed}")
    return 0


def _run(checkpoint: Path, world: int, out: Path, key_file: str | None) -> tuple[Report, int]:
    """Makes the checkpoint; the report, and the micro-batch of the run so far."""
    if world < 1:
        raise UserError(f"--to {world}: at least one process is needed.")
    started = time.monotonic()
    source = find_step_folder(checkpoint).resolve()
    run = source.parent.parent
    text, config = _config(run)
    key_file = key_file or config.get("rdtf", {}).get("checkpoint", {}).get("key_file")
    key = read_key(key_file) if key_file else None
    keys = batch_keys(config, world)
    if out.exists() and not out.is_dir():
        raise UserError(f"'{out}' is a file; name a run folder.")
    is_new = not out.exists()
    try:
        with RunLock(out, wait_s=0):
            if os.path.samefile(run, out):
                _refuse_step_back(source, world)
            else:
                _refuse_another_run(out, text)
                replace_file(out / "config.json", text)
            made = reshard(source, world, out / "checkpoints", read_shard, key)
            replace_file(made.parent / RECOVERY_SCRIPT, recovery_script())
    except BaseException:
        if is_new:
            shutil.rmtree(out, ignore_errors=True)
        raise
    manifest = read_manifest(made, key)
    size = sum(digest["bytes"] for digest in manifest["files"].values())
    before, micro = manifest["resharded_from"]["world_size"], keys["train_micro_batch_size_per_gpu"]
    seconds = time.monotonic() - started
    return Report(str(made), str(source), manifest["step"], before, world, micro, size, seconds), config["train_micro_batch_size_per_gpu"]


def _config(run: Path) -> tuple[bytes, dict[str, Any]]:
    """``config.json`` of a run: its bytes, and what they say."""
    path = run / "config.json"
    try:
        text = path.read_bytes()
        config: dict[str, Any] = json.loads(text)
        config["train_batch_size"] // config["train_micro_batch_size_per_gpu"]
        return text, config
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(
            f"'{path}', the run's resolved experiment, cannot be read ({error!r}). Keep step folders in RUN/checkpoints/, beside "
            "RUN/config.json."
        ) from error


def _refuse_step_back(source: Path, world: int) -> None:
    """The run goes on from what is committed last: it must lose no step by that, and gain something."""
    here = Tag.of(source.name)
    for other in CheckpointStore(source.parent).candidates():
        tag = Tag.of(other.name)
        if here is None or tag is None or tag.step > here.step:
            raise UserError(
                f"'{source.parent}' holds {other.name}, a later step than {source.name}, which the run would lose. Name a new folder."
            )
        if tag.step == here.step and read_manifest(other)["world_size"] == world:
            raise UserError(f"'{other}' is that step for {world} process(es) already: just start the run on them.")


def _refuse_another_run(out: Path, config: bytes) -> None:
    """Checkpoints of two runs in one folder would be taken for one's."""
    held = CheckpointStore(out / "checkpoints").candidates()
    if held:
        raise UserError(f"'{out}' holds checkpoints of another run already, {held[0].name} for one. Name a new folder.")
    if (out / "config.json").exists() and (out / "config.json").read_bytes() != config:
        raise UserError(f"'{out}' holds the config.json of another run. Name a new folder.")


if __name__ == "__main__":
    sys.exit(main())
