"""DeepSpeed's own keys an experiment may use, and why each of the others is refused.

The list is short on purpose: a key stands here when this project's training was built for it, so that a key which would be ignored, or
would break 8-bit ZeRO-2 checkpoints, is a message and not a surprise hours into a run.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class FP16Section(_Section):
    """Half precision with loss scaling; ``loss_scale`` 0 means dynamic. The defaults are DeepSpeed's."""

    enabled: bool = False
    loss_scale: Annotated[float, Field(ge=0)] = Field(default=0.0, description="0: dynamic")
    initial_scale_power: Annotated[int, Field(ge=0, le=32)] = 16
    loss_scale_window: Positive = 1000
    hysteresis: Positive = 2
    consecutive_hysteresis: bool = False
    min_loss_scale: Positive = 1


class BF16Section(_Section):
    """bfloat16 weights and gradients, fp32 masters; no loss scaling."""

    enabled: bool = False
    check_grad_overflow: Literal[True] = True


class OffloadSection(_Section):
    """Masters, moments and gradients wait in CPU memory, where AdamW steps."""

    device: Literal["cpu"]
    pin_memory: bool = True


class DataTypesSection(_Section):
    """In what precision the gradients of a step's micro-batches are summed."""

    grad_accum_dtype: Literal["fp32"] | None = Field(default=None, description="null: compute precision")


class ZeroSection(_Section):
    """ZeRO-2: gradients, masters and optimizer moments are sharded over the GPUs."""

    stage: Literal[2]
    contiguous_gradients: Literal[True] = True
    overlap_comm: bool = False
    reduce_scatter: bool = True
    reduce_bucket_size: Positive = Field(default=500_000_000, description="elements reduced at once")
    allgather_partitions: bool = True
    allgather_bucket_size: Positive = Field(default=500_000_000, description="elements gathered at once")
    offload_optimizer: OffloadSection | None = None


class DeepSpeedSection(_Section):
    """The part of an experiment that is handed to ``deepspeed.initialize(config=...)``."""

    train_batch_size: Positive = Field(description="samples of one optimizer step over all GPUs and accumulation steps")
    train_micro_batch_size_per_gpu: Positive = Field(description="samples of one forward pass on one GPU")
    zero_optimization: ZeroSection
    fp16: FP16Section = FP16Section()
    bf16: BF16Section = BF16Section()
    data_types: DataTypesSection = DataTypesSection()
    gradient_clipping: Annotated[float, Field(ge=0)] = Field(default=0.0, description="largest gradient norm; 0: no clipping")
    communication_data_type: Literal["fp16", "bf16", "fp32"] | None = None
    prescale_gradients: bool = False
    gradient_predivide_factor: Annotated[float, Field(gt=0)] = 1.0
    steps_per_print: Positive = 1_000_000
    wall_clock_breakdown: bool = False
    zero_allow_untested_optimizer: Literal[True] = Field(default=True, description="bitsandbytes is 'untested' to DeepSpeed")


REFUSED: dict[str, str] = {
    "gradient_accumulation_steps": "it is derived: train_batch_size / (train_micro_batch_size_per_gpu x GPUs), so that one file fits any "
    "number of GPUs; remove it",
    "optimizer": "DeepSpeed's optimizers know nothing of 8-bit parameter groups; use rdtf.optimizer",
    "scheduler": "the learning rate follows applied steps; use rdtf.optimizer.warmup_steps and rdtf.optimizer.learning_rate",
    "activation_checkpointing": "torch's non-reentrant checkpointing is used; set rdtf.memory.activation_checkpointing to none, blocks or "
    "blocks_cpu_offload",
    "tensorboard": "the run writes its own TensorBoard files under rdtf.output_dir; remove it",
    "wandb": "the run writes TensorBoard files and metrics.jsonl under rdtf.output_dir; remove it",
    "csv_monitor": "the run writes metrics.jsonl under rdtf.output_dir; remove it",
    "checkpoint": "checkpoints are written by this project; use rdtf.checkpoint",
    "curriculum_learning": "DeepSpeed's curriculum is about sequence length; use rdtf.curriculum",
    "data_efficiency": "DeepSpeed's sampler would change the sample order; use rdtf.data and rdtf.curriculum",
    "zero_force_ds_cpu_optimizer": "the optimizer on the CPU is torch's AdamW, which needs no compiler; remove it",
    "elasticity": "the global batch is fixed, and the number of GPUs may be any that divides it; remove it",
    "torch_autocast": "use fp16.enabled or bf16.enabled",
    "amp": "use fp16.enabled or bf16.enabled",
    "bfloat16": "DeepSpeed's old spelling; use bf16",
    "seed": "use rdtf.seed",
    "fp16.auto_cast": "inputs are cast by the training loop; remove it",
    "fp16.fp16_master_weights_and_grads": "EMA and the export need fp32 masters; remove it",
    "bf16.bf16_master_weights_and_grads": "EMA and the export need fp32 masters; remove it",
    "bf16.bf16_optimizer_states": "use rdtf.optimizer.bits",
    "bf16.immediate_grad_update": "the step is fenced off as a whole; remove it",
    "zero_optimization.elastic_checkpoint": "it cuts the 8-bit optimizer state while saving, and that cannot be loaded; remove it",
    "zero_optimization.round_robin_gradients": "it scatters parameters over the ranks, so that 8-bit blocks straddle shard borders; remove",
    "zero_optimization.offload_param": "it belongs to ZeRO-3; remove it",
    "zero_optimization.cpu_offload": "DeepSpeed's old spelling; use zero_optimization.offload_optimizer",
    "zero_optimization.load_from_fp32_weights": "a resume always loads the fp32 masters; remove it",
    "zero_optimization.ignore_unused_parameters": "every parameter of the model is used; remove it",
}
"""Keys DeepSpeed knows and this project refuses, each with what to do instead. ``false`` and null say nothing and are dropped."""

REMEDIES: dict[str, str] = {
    "bf16.check_grad_overflow": "without it gradients that are not finite would reach the weights; remove the key",
    "zero_optimization.stage": "EMA, the checkpoints and their resharding are built on ZeRO-2's flat groups of fp32 masters",
    "zero_optimization.contiguous_gradients": "the one buffer of gradients is built on it; remove the key",
    "zero_allow_untested_optimizer": "DeepSpeed would refuse the 8-bit optimizer; remove the key",
}
"""Why a key allows so little, added to the message."""
