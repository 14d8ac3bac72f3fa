"""The one door to DeepSpeed: starting ranks, the ZeRO-2 engine, its shards. Nothing else imports deepspeed.

Legend: B samples of a micro-batch, A micro-batches of a step (accumulation), W ranks.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import socket
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rdtf_ds.checkpoints.durable import Digest
from rdtf_ds.errors import UserError
from rdtf_ds.training.allocator import give_freed_memory_back
from rdtf_ds.training.gradient_buffer import forget_gradients, use_one_buffer
from rdtf_ds.training.optimizer import ParameterGroup, build_offloaded_optimizer, build_optimizer, keep_32bit_moments, warmed_up
from rdtf_ds.training.shard_files import shard_files

COLLECTIVE_TIMEOUT = timedelta(hours=4)
"""How long a rank waits for the others: longer than `rdtf.watchdog` lets it, which knows what it was doing and ends the run cleanly."""


_PORTS_TRIED = 5


@dataclass(frozen=True)
class StepOutcome:
    """What one attempted optimizer step did; the same on every rank.

    Attributes:
        applied: False when the step was skipped for gradients that are not finite.
        bad: Skipped, and not in fp16's ordinary search for a loss scale: the loss is not finite either, or there is no scale to lower.
        loss: Mean over the global batch.
        sample_losses, timesteps: Of each sample, in global batch order: micro-batch, then rank, then position.
        grad_norm: Before clipping; infinite for a skipped step.
        learning_rate: The one this step used.
        loss_scale: The one this step used; 1 outside fp16.
    """

    applied: bool
    bad: bool
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
    port_is_ours = "MASTER_PORT" not in os.environ
    if device_type == "cpu":
        give_freed_memory_back()
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # Of several convolution algorithms cuDNN may time, and of those it may pick, only these repeat a step exactly.
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    elif "OMP_NUM_THREADS" not in os.environ:
        # Each rank would take all cores, and the ranks would wait for each other's threads.
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    for attempt in range(_PORTS_TRIED, 0, -1):
        if port_is_ours:
            os.environ["MASTER_PORT"] = str(_free_port())
        try:
            backend = "nccl" if device_type == "cuda" else "gloo"
            deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=COLLECTIVE_TIMEOUT, verbose=False)
            break
        except (dist.DistNetworkError, OSError) as error:
            if "address already in use" not in str(error).lower() and "EADDRINUSE" not in str(error):
                raise
            if port_is_ours and attempt > 1:
                continue  # somebody took it after it was found free
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
        """What the network gives for the same arguments; the paddings take no part."""
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
        offloaded = bool(deepspeed_config["zero_optimization"].get("offload_optimizer"))
        build = build_offloaded_optimizer if offloaded else build_optimizer
        optimizer = build(groups, dict(wrapped.paddings), learning_rate=learning_rate, betas=betas, eps=eps, weight_decay=weight_decay)
        # 8-bit AdamW is not in DeepSpeed's list of optimizers it has tested with ZeRO; and its own AdamW for the CPU must be compiled.
        config = {**deepspeed_config, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        self._ds, *_ = deepspeed.initialize(model=wrapped, optimizer=optimizer, config=config, dist_init_required=False)
        self._hyperparameters = [{key: value for key, value in g.items() if key != "params"} for g in optimizer.param_groups]
        if not offloaded:
            use_one_buffer(self._ds.optimizer)
            keep_32bit_moments(groups, self.masters)
        self._shards = shard_files(offloaded)
        self._ds.checkpoint_engine = self._shards
        # Written beside the checkpoints by `recovery_script`, whole or not at all; DeepSpeed copies it in place, before the commit.
        self._ds._copy_recovery_script = lambda save_path: None
        self._never_raise_at_the_smallest_scale()
        self._micro_losses: list[Tensor] = []
        self._micro_timesteps: list[Tensor] = []

    @property
    def model(self) -> Any:
        """The network in compute precision, of the class it was given in."""
        return self._ds.module.model

    @property
    def device(self) -> torch.device:
        """Where the weights and the loss are; batches must be there, too."""
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
        """Optimizer steps of the run so far, skipped ones among them; a loaded checkpoint brings its own."""
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
        mean = sample_losses.mean()
        # A loss that is not finite may leave finite gradients, and such a step must be skipped too.
        self._ds.backward(mean * torch.where(torch.isfinite(mean.detach()), 1.0, math.nan))
        self._micro_losses.append(sample_losses.detach().float())
        self._micro_timesteps.append(timesteps.detach().to(sample_losses.device))

    def step(self) -> StepOutcome:
        """Update the weights from the micro-batches since the last call.

        Gradients that are not finite, on whichever rank, skip the update on all of them; nothing is raised.
        """
        if not self._ds.is_gradient_accumulation_boundary():
            wanted = self._ds.gradient_accumulation_steps()
            raise RuntimeError(f"{len(self._micro_losses)} micro-batches, but a step takes {wanted}: batch arithmetic is off")
        losses, timesteps = self._in_global_order(self._micro_losses), self._in_global_order(self._micro_timesteps)
        self._micro_losses, self._micro_timesteps = [], []
        loss = math.fsum(losses.tolist()) / losses.numel()
        learning_rate = warmed_up(self._learning_rate, self._warmup_steps, self.applied_steps)
        for group in self._ds.optimizer.param_groups:
            group["lr"] = learning_rate
        loss_scale = float(self._ds.optimizer.loss_scale)
        searching = self.dtype == torch.float16 and loss_scale > self._smallest_scale and math.isfinite(loss)
        self._ds.step()
        applied = not self._ds.optimizer.overflow
        return StepOutcome(
            applied=applied,
            bad=not applied and not searching,
            loss=loss,
            sample_losses=tuple(losses.tolist()),
            timesteps=tuple(int(t) for t in timesteps.tolist()),
            grad_norm=float(self._ds.get_global_grad_norm()),
            learning_rate=learning_rate,
            loss_scale=loss_scale,
        )

    @property
    def _smallest_scale(self) -> float:
        """The loss scale below which an overflow cannot push; a static one cannot be lowered at all."""
        scaler = self._ds.optimizer.loss_scaler
        return float(scaler.min_scale if scaler.dynamic else scaler.loss_scale)

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

    def first_bad_weight(self) -> str | None:
        """Name of the first parameter of this rank's shards that compute precision cannot hold, or None; moments count as weights."""
        largest = torch.finfo(self.dtype).max
        for group, master in zip(self.groups, self.masters, strict=True):
            held = master.abs() <= largest  # False for NaN too
            if not bool(held.all()):
                position = self.rank * master.numel() + int((~held).to(torch.uint8).argmax())
                return group.parameter_at(position)
            for name, moment in self._ds.optimizer.optimizer.state.get(master, {}).items():
                if torch.is_tensor(moment) and moment.is_floating_point() and not bool(torch.isfinite(moment).all()):
                    return f"{name}, a moment of the group {group.name},"
        return None

    def shard_bytes(self) -> int:
        """About how many bytes `save_shards` writes on this rank, once there are moments."""
        optimizer_state = sum(master.numel() * (4 + 2 * group.bits // 8) for group, master in zip(self.groups, self.masters, strict=True))
        weights = sum(p.numel() * p.element_size() for p in self._ds.module.parameters()) if self.rank == 0 else 0
        return optimizer_state + weights

    def save_shards(self, folder: Path) -> tuple[str | None, dict[str, Digest]]:
        """Write DeepSpeed's shards into ``folder``, which exists and is empty; each rank on its own.

        Returns:
            What went wrong on this rank, or None; and the digest of each file this rank wrote.
        """
        self._shards.failure, self._shards.written = None, {}
        # The two halves of DeepSpeed's save_checkpoint without what is around them: barriers, in which the others would wait for a
        # rank that failed, and `latest`, which is written in place and tied to no shard.
        place = {"save_dir": str(folder.parent), "tag": folder.name}
        try:
            self._ds._save_checkpoint(**place)
            self._ds._save_zero_checkpoint(save_path=place["save_dir"], tag=folder.name)
        except Exception as error:  # whatever it is, the other ranks must hear of it
            return f"{type(error).__name__}: {error}", {}
        return self._shards.failure, dict(self._shards.written)

    def read_shards(self, folder: Path, world_size: int) -> str | None:
        """Read what `load_shards` will apply; the live state is not touched.

        Args:
            folder: A verified checkpoint.
            world_size: Ranks that wrote it; for another number than there are now, this rank's part is cut out of theirs.

        Returns:
            Why it cannot be read, or None.
        """
        try:
            self._shards.prepare(folder, world_size, self.rank, self.world_size)
        except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError, UserError) as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        return None

    def load_shards(self, folder: Path) -> None:
        """Take weights, masters, moments, loss scale and counters as `read_shards` read them."""
        path, _ = self._ds.load_checkpoint(str(folder.parent), tag=folder.name)
        self._shards.prepared = {}
        if path is None:
            raise UserError(f"Checkpoint {folder} holds no DeepSpeed shards; delete it to resume from the one before.")
        # The config in force decides these, not the one the checkpoint was made with.
        self._ds.optimizer.clip_grad = self._ds.gradient_clipping()
        for group, ours in zip(self._ds.optimizer.param_groups, self._hyperparameters, strict=True):
            group.update(ours)
        self._never_raise_at_the_smallest_scale()
        self._ds.micro_steps = 0  # a step begins
        forget_gradients(self._ds.optimizer)
        self._micro_losses, self._micro_timesteps = [], []

    def _never_raise_at_the_smallest_scale(self) -> None:
        """DeepSpeed would end the run there, in the middle of a step; such steps are counted as bad instead, see `StepOutcome`."""
        self._ds.optimizer.loss_scaler.raise_error_at_min_scale = False
