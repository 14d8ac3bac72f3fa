"""The one door to DeepSpeed: starting ranks, the ZeRO-2 engine, its shards. Nothing else imports deepspeed.

Legend: B samples of a micro-batch, A micro-batches of a step (accumulation), W ranks.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rdtf_ds.errors import UserError, on_every_rank
from rdtf_ds.training.optimizer import ParameterGroup, build_optimizer, keep_32bit_moments, warmed_up

T = TypeVar("T")
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others; validation and checkpoints of the full model take minutes."""


class NonFiniteLoss(UserError):
    """The loss became NaN or infinite in a precision that has no loss scale to blame. Weights are those of the step before."""

    everywhere = True  # computed from the gathered losses


class LossScaleExhausted(UserError):
    """fp16 gradients overflow at the smallest loss scale."""

    everywhere = True  # ranks agree on an overflow


@dataclass(frozen=True)
class StepOutcome:
    """What one attempted optimizer step did; the same on every rank.

    Attributes:
        applied: False when the step was skipped for gradients that are not finite.
        loss: Mean over the global batch.
        sample_losses, timesteps: Of each sample, in global batch order: micro-batch, then rank, then position.
        grad_norm: Before clipping; infinite for a skipped step.
        learning_rate: The one this step used.
        loss_scale: The one this step used; 1 outside fp16.
    """

    applied: bool
    loss: float
    sample_losses: tuple[float, ...]
    timesteps: tuple[int, ...]
    grad_norm: float
    learning_rate: float
    loss_scale: float


def start_distributed(device_type: str, verify_fp16_on_cpu: bool = False) -> tuple[int, int]:
    """Join the process group: nccl on CUDA, gloo on CPU; a single process needs no launcher.

    Args:
        device_type: ``cuda`` or ``cpu``.
        verify_fp16_on_cpu: Verification only, never for training: lets DeepSpeed take fp16 on a CPU, which it refuses.

    Returns:
        (rank, world size).

    Raises:
        UserError: The rendezvous port is taken.
    """
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    quiet_deepspeed()

    # The shared-memory collectives are compiled at the first start (a minute, g++ needed), and a start killed meanwhile leaves a
    # lock at which every later one hangs in silence. Gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if verify_fp16_on_cpu and device_type == "cpu":
        # The one replaced method of the project, `rdtf.verify_fp16_on_cpu`: DeepSpeed's only objection to fp16 on CPU is this answer.
        get_accelerator().is_fp16_supported = lambda: True
    for key, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(key, value)
    os.environ.setdefault("MASTER_PORT", str(_free_port()))
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # Of several convolution algorithms cuDNN may time, and of those it may pick, only these repeat a step exactly.
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    elif "OMP_NUM_THREADS" not in os.environ:
        # Each rank would take all cores, and the ranks would wait for each other's threads.
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if device_type == "cuda" else "gloo", auto_mpi_discovery=False, timeout=COLLECTIVE_TIMEOUT, verbose=False
        )
    except (dist.DistNetworkError, OSError) as error:
        if "address already in use" not in str(error).lower() and "EADDRINUSE" not in str(error):
            raise
        address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        raise UserError(
            f"Port {port} on {address} is in use, so the ranks cannot meet: another run may be using it. Choose a free one with "
            f"`deepspeed --master_port PORT ...` (or the environment variable MASTER_PORT without a launcher)."
        ) from error
    return dist.get_rank(), dist.get_world_size()


def quiet_deepspeed() -> None:
    """Errors only from DeepSpeed, which reports every step of its start, and no kernels-package hint from bitsandbytes."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=r".*all_gather_into_tensor.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r".*torch.jit.script.*", category=DeprecationWarning)


def stop_distributed() -> None:
    """Leave the process group, if in one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class TrainedModel(nn.Module):
    """DFGN and the padding parameters that align the optimizer's groups: they must be named here for DeepSpeed to save them.

    Args:
        model: The network; called through unchanged.
        groups: Its parameters, split.
    """

    def __init__(self, model: nn.Module, groups: Sequence[ParameterGroup]) -> None:
        super().__init__()
        self.model = model
        self.paddings = nn.ParameterDict({group.name: nn.Parameter(torch.zeros(group.padding)) for group in groups if group.padding})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


class TrainingEngine:
    """ZeRO-2 training of one model, step by step.

    Args:
        model: The network, fp32, its parameters those of ``groups``.
        groups: From `split_parameters`.
        deepspeed_config: DeepSpeed's own keys, batch arithmetic filled in.
        learning_rate, warmup_steps, betas, eps, weight_decay: Of AdamW.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[ParameterGroup],
        deepspeed_config: Mapping[str, Any],
        *,
        learning_rate: float,
        warmup_steps: int,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        import deepspeed

        self.groups = tuple(groups)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._learning_rate, self._warmup_steps = learning_rate, warmup_steps
        wrapped = TrainedModel(model, groups)
        optimizer = build_optimizer(
            groups, dict(wrapped.paddings), learning_rate=learning_rate, betas=betas, eps=eps, weight_decay=weight_decay
        )
        # 8-bit AdamW is not in DeepSpeed's list of optimizers it has tested with ZeRO.
        config = {**deepspeed_config, "zero_allow_untested_optimizer": True}
        self._ds, *_ = deepspeed.initialize(model=wrapped, optimizer=optimizer, config=config, dist_init_required=False)
        self._hyperparameters = [{key: value for key, value in g.items() if key != "params"} for g in optimizer.param_groups]
        keep_32bit_moments(groups, self.masters)
        self._shards = _shard_files()
        self._ds.checkpoint_engine = self._shards
        # Beside every checkpoint DeepSpeed leaves two scripts that join shards by unpickling them; tools/export_fp16.py does it safely.
        self._ds._copy_recovery_script = lambda save_path: None
        self._micro_losses: list[Tensor] = []
        self._micro_timesteps: list[Tensor] = []

    @property
    def model(self) -> Any:
        """The network in compute precision, of the class it was given in."""
        return self._ds.module.model

    @property
    def device(self) -> torch.device:
        return torch.device(self._ds.device)

    @property
    def dtype(self) -> torch.dtype:
        """Compute precision of the network."""
        dtype: torch.dtype = self._ds.get_data_types()[0]
        return dtype

    @property
    def masters(self) -> list[Tensor]:
        """This rank's fp32 shard of each group, live."""
        masters: list[Tensor] = self._ds.optimizer.single_partition_of_fp32_groups
        return masters

    @property
    def attempted_steps(self) -> int:
        return int(self._ds.global_steps)

    @property
    def applied_steps(self) -> int:
        """Attempted steps less those skipped for overflow: what schedules count."""
        return int(self._ds.global_steps - self._ds.skipped_steps)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network, set up for `backward`."""
        return self._ds(*args, **kwargs)

    def backward(self, sample_losses: Tensor, timesteps: Tensor) -> None:
        """Add one micro-batch's gradients.

        Args:
            sample_losses: (B,) fp32 with graph; their mean is what is differentiated.
            timesteps: (B,) diffusion step of each sample, on any device: ranks exchange them on the losses' one, which nccl needs.
        """
        if self._micro_losses:
            self._ds.step()  # between micro-batches this only counts; on the last one `step` does the work
        self._ds.backward(sample_losses.mean())
        self._micro_losses.append(sample_losses.detach().float())
        self._micro_timesteps.append(timesteps.detach().to(sample_losses.device))

    def step(self) -> StepOutcome:
        """Update the weights from the micro-batches since the last call.

        Raises:
            NonFiniteLoss: The loss is not finite in bf16 or fp32; nothing was updated.
            LossScaleExhausted: fp16 cannot lower its loss scale any more.
        """
        if not self._ds.is_gradient_accumulation_boundary():
            wanted = self._ds.gradient_accumulation_steps()
            raise RuntimeError(f"{len(self._micro_losses)} micro-batches, but a step takes {wanted}: batch arithmetic is off")
        losses, timesteps = self._in_global_order(self._micro_losses), self._in_global_order(self._micro_timesteps)
        self._micro_losses, self._micro_timesteps = [], []
        loss = math.fsum(losses.tolist()) / losses.numel()
        if not math.isfinite(loss) and self.dtype != torch.float16:
            raise NonFiniteLoss(
                f"The loss of step {self.attempted_steps} is {loss}. No loss scale is in play in {self.dtype}, so training has diverged; "
                f"the weights were not touched. Start again from the last checkpoint with a lower rdtf.optimizer.learning_rate (now "
                f"{self._learning_rate}) or more warmup_steps (now {self._warmup_steps})."
            )
        learning_rate = warmed_up(self._learning_rate, self._warmup_steps, self.applied_steps)
        for group in self._ds.optimizer.param_groups:
            group["lr"] = learning_rate
        loss_scale = float(self._ds.optimizer.loss_scale)
        self._update()
        return StepOutcome(
            applied=not self._ds.optimizer.overflow,
            loss=loss,
            sample_losses=tuple(losses.tolist()),
            timesteps=tuple(int(t) for t in timesteps.tolist()),
            grad_norm=float(self._ds.get_global_grad_norm()),
            learning_rate=learning_rate,
            loss_scale=loss_scale,
        )

    def _update(self) -> None:
        try:
            self._ds.step()
        except Exception as error:
            if "loss scale already at minimum" not in str(error):
                raise
            raise LossScaleExhausted(
                "fp16 gradients overflow even at the smallest loss scale: training has diverged. Go back to a checkpoint before the loss "
                "rose, and lower rdtf.optimizer.learning_rate or raise its warmup_steps."
            ) from error

    def _in_global_order(self, micro: Sequence[Tensor]) -> Tensor:
        """(B,) of A micro-batches on each of W ranks -> (A·W·B,) in the order of the global batch, on the CPU."""
        mine = torch.stack(list(micro)).contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(parts, mine)
        return torch.stack(parts, dim=1).flatten().cpu()  # (A, W, B)

    def show(self, shards: Sequence[Tensor]) -> None:
        """Put fp32 shards, one per group and rank, into the live compute-precision weights of all ranks. Masters stay as they are."""
        from deepspeed.runtime.utils import all_gather_dp_groups

        optimizer = self._ds.optimizer
        for pieces, shard in zip(optimizer.parallel_partitioned_bit16_groups, shards, strict=True):
            pieces[self.rank].data.copy_(shard.data)
        all_gather_dp_groups(
            groups_flat=optimizer.bit16_groups_flat,
            partitioned_param_groups=optimizer.parallel_partitioned_bit16_groups,
            dp_process_group=optimizer.real_dp_process_group,
            start_alignment_factor=optimizer.nccl_start_alignment_factor,
            allgather_bucket_size=optimizer.allgather_bucket_size,
        )

    def save_shards(self, folder: Path, tag: str) -> str | None:
        """Write DeepSpeed's shards to ``folder/tag``; called by all ranks. Returns what went wrong on this rank, or None."""
        self._shards.failure = None
        # `latest` is written in place and tied to no shard, so it is no commit mark; MANIFEST.json is.
        self._ds.save_checkpoint(str(folder), tag=tag, save_latest=False)
        failure: str | None = self._shards.failure
        return failure

    def load_shards(self, folder: Path, tag: str) -> None:
        """Take weights, masters, moments, loss scale and counters from ``folder/tag``, which must be complete."""
        path, _ = self._ds.load_checkpoint(str(folder), tag=tag)
        if path is None:
            raise UserError(f"Checkpoint {folder / tag} holds no DeepSpeed shards; delete it to resume from the one before.")
        # The config in force decides these, not the one the checkpoint was made with.
        self._ds.optimizer.clip_grad = self._ds.gradient_clipping()
        for group, ours in zip(self._ds.optimizer.param_groups, self._hyperparameters, strict=True):
            group.update(ours)


def gather_objects(value: Any) -> list[Any]:
    """``value`` of every rank, on every rank, by rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_rank_zero(make: Callable[[], T]) -> T:
    """``make()`` run by rank 0 alone, its value on every rank; a `UserError` of it is raised on all."""
    answer: list[Any] = [None, None]  # value, error
    if dist.get_rank() == 0:
        try:
            answer[0] = make()
        except UserError as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise on_every_rank(answer[1])
    value: T = answer[0]
    return value


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` is set on any rank; cheaper than gathering objects in every step."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    votes = torch.tensor([flag], dtype=torch.int32, device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes.item())


def _shard_files() -> Any:
    """DeepSpeed's reader and writer of checkpoint files, with writes that never tear and reads that never run code."""
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    class ShardFiles(CheckpointEngine):  # type: ignore[misc]  # deepspeed has no types
        """``save`` keeps its error for the vote of all ranks instead of leaving the others in a barrier."""

        failure: str | None = None

        def create(self, info: Any) -> None: ...

        def save(self, state_dict: Any, path: str) -> None:
            partial = Path(f"{path}.partial")
            try:
                with open(partial, "wb") as file:
                    torch.save(state_dict, file)
                    file.flush()
                    os.fsync(file.fileno())
                partial.rename(path)
            except (OSError, RuntimeError) as error:  # a full disk shows as either
                self.failure = f"{path}: {error}"

        def load(self, path: str, map_location: Any = None) -> Any:
            # The classes our own shards hold; anything else in a file is refused, not run.
            with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, fragment_address, ZeroStageEnum]):
                return torch.load(path, map_location=map_location, weights_only=True)

        def commit(self, info: Any) -> bool:
            return True

    return ShardFiles()
