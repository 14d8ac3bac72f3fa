"""DeepSpeed's checkpoint files, with writes that never tear and reads that never run code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rdtf_ds.checkpoints.durable import Digest, write_file
from rdtf_ds.checkpoints.moments import as_bitsandbytes_writes, as_torch_writes
from rdtf_ds.checkpoints.resharding import BASE, STATE, Reopened, model_states, shard_to_load
from rdtf_ds.checkpoints.weights import MODEL_STATES, shard_path


def recovery_script() -> bytes:
    """DeepSpeed's ``zero_to_fp32.py``, which joins shards without this package; by unpickling, so for one's own checkpoints only."""
    from deepspeed.utils import zero_to_fp32

    return Path(zero_to_fp32.__file__).read_bytes()


def read_shard(path: Path) -> Any:
    """The content of a file of DeepSpeed's, memory-mapped.

    Raises:
        pickle.UnpicklingError: It holds a class that our own shards do not; nothing of it was run.
        OSError, RuntimeError, EOFError: It is no such file.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, fragment_address, ZeroStageEnum]):
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def shard_files(offloaded: bool = False) -> Any:
    """What DeepSpeed writes and reads its files with, in place of its own `CheckpointEngine`.

    Args:
        offloaded: The live optimizer is the one of the CPU; a checkpoint may be of either.
    """
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

    class ShardFiles(CheckpointEngine):  # type: ignore[misc]  # deepspeed has no types
        """``save`` keeps its error for the vote of all ranks instead of leaving the others in a barrier; ``load`` gives what was
        prepared, so that all ranks have read their files before any of them changes."""

        def __init__(self) -> None:
            self.failure: str | None = None
            self.written: dict[str, Digest] = {}
            self.prepared: dict[str, Any] = {}

        def create(self, info: Any) -> None:
            """DeepSpeed announces a save. Nothing is to be done: the folder is there."""

        def save(self, state_dict: Any, path: str) -> None:
            """A file that is on the disk when this returns; its digest goes to ``written``, what went wrong to ``failure``."""
            try:
                self.written[Path(path).name] = write_file(Path(path), lambda file: torch.save(state_dict, file))
            except Exception as error:  # a full disk shows as OSError or RuntimeError; whatever it is, the others must hear of it
                self.failure = f"{path}: {error}"

        def prepare(self, folder: Path, written_by: int, rank: int, world_size: int) -> None:
            """Read what rank ``rank`` of ``world_size`` takes of a checkpoint that ``written_by`` ranks wrote, for `load`.

            Raises:
                CheckpointError: So many ranks cannot share it; and what `read_shard` says of a file.
            """
            # Memory-mapped: of the other ranks' files no more is read than what is taken from them.
            shards = [Reopened(partial(read_shard, shard_path(folder, old))) for old in range(written_by)]

            def model() -> Any:
                """The weights and counters for so many ranks, from the file again, so that nothing is held in between."""
                return model_states(read_shard(folder / MODEL_STATES), world_size)

            model()  # that it can be read is known before anything changes
            shard = shard_to_load(shards, rank, world_size)
            # Renamed once it is loaded: that a run of other moments is refused is said by its manifest, in better words.
            writes = as_torch_writes if offloaded else as_bitsandbytes_writes
            self.prepared = {"model_states.pt": model, "optim_states.pt": lambda: _with_moments_as(writes, shard)}

        def load(self, path: str, map_location: Any = None) -> Any:
            """What was prepared of the kind of file ``path`` names, whichever rank's; on the CPU, where DeepSpeed copies from."""
            (suffix,) = [suffix for suffix in self.prepared if path.endswith(suffix)]
            return self.prepared[suffix]()

        def commit(self, info: Any) -> bool:
            """True, for DeepSpeed. A checkpoint counts once its manifest is there, which is written after all shards."""
            return True

    return ShardFiles()


def _with_moments_as(writes: Callable[[Mapping[str, Any], str], dict[str, Any]], shard: dict[str, Any]) -> dict[str, Any]:
    """The shard, its moments in the form in which the live optimizer takes them."""
    base = shard[STATE][BASE]
    names = [group["name"] for group in base["param_groups"]]
    base["state"] = {number: writes(moments, names[number]) for number, moments in base["state"].items()}
    return shard
