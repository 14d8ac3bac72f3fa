"""Every part of a run, put together from an experiment: the one place that reads its keys and hands out their values."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rdtf_ds.checkpoints.manifest import read_key
from rdtf_ds.checkpoints.store import CheckpointStore
from rdtf_ds.config import RDTFSection
from rdtf_ds.curriculum.curriculum import Curriculum
from rdtf_ds.curriculum.loss_signal import TimestepNormaliser
from rdtf_ds.curriculum.pid import PIDController, PIDGains
from rdtf_ds.curriculum.static import StaticSchedule
from rdtf_ds.data.clips.writing import write_atomically
from rdtf_ds.data.feature_cache import CachedClips
from rdtf_ds.data.indexing.index import ClipIndex
from rdtf_ds.data.indexing.problem import Problem
from rdtf_ds.data.loader import PlannedLoader
from rdtf_ds.data.quarantine import Quarantine
from rdtf_ds.data.step_plan import PlanQueue, StepPlan, StepPlanner
from rdtf_ds.diffusion.loss import alphas_cumprod
from rdtf_ds.diffusion.masks import Task
from rdtf_ds.errors import UserError
from rdtf_ds.experiment import Experiment
from rdtf_ds.models.dfgn import DFGN
from rdtf_ds.seeding import derive_seed
from rdtf_ds.training.checkpoint import Identity
from rdtf_ds.training.collectives import gather_objects, on_rank_zero
from rdtf_ds.training.data_assembly import build_dataset, build_quarantine, data_root, open_data
from rdtf_ds.training.ema import ShardedEMA
from rdtf_ds.training.encoders import build_source
from rdtf_ds.training.engine import TrainingEngine
from rdtf_ds.training.incidents import BadSteps, Incidents
from rdtf_ds.training.kept_index import index_keys, name_of, named_by, prune
from rdtf_ds.training.objective import Objective
from rdtf_ds.training.optimizer import ParameterGroup, split_parameters

PIXEL_GUIDANCE_CHANNELS = 4


@dataclass
class Run:
    """A run ready to step. Everything but weights, EMA, plans, quarantine and incidents stays as it was built.

    Attributes:
        cached: The clips' features, if it trains from a cache of them.
        reindexed: All clips were listed and examined again since the newest checkpoint, so what it holds of bad ones is out of date.
        failed_saves: Checkpoints that could not be written since this start.
        went_bad_at, weights_went_bad: Where the numbers of the last bad step first stopped being finite; whether in the weights.
        last_applied: Plan of the last step that changed the weights.
    """

    experiment: Experiment
    folder: Path
    engine: TrainingEngine
    ema: ShardedEMA | None
    objective: Objective
    index: ClipIndex
    cached: CachedClips | None
    curriculum: Curriculum
    queue: PlanQueue
    loader: PlannedLoader
    quarantine: Quarantine
    store: CheckpointStore
    incidents: Incidents
    bad_steps: BadSteps
    reindexed: bool = False
    failed_saves: int = 0
    went_bad_at: str = ""
    weights_went_bad: bool = False
    last_applied: StepPlan | None = None

    @property
    def identity(self) -> Identity:
        """What a checkpoint must share with this run."""
        rdtf, model = self.experiment.rdtf, model_config(self.engine.model)
        keys = rdtf.model_dump(mode="json", include={"data", "curriculum", "diffusion", "encoders", "optimizer", "ema"})
        keys["curriculum"]["static_steps"] = schedule_steps(rdtf)
        keys["memory"] = {"encoders": rdtf.memory.encoders}  # features from a cache differ by rounding, and in which words are hidden
        for key in ("data_dir", "index_dir", "workers"):
            del keys["data"][key]  # none changes what a sample is: the fingerprint speaks for the clips
        del keys["ema"]["device"]  # a place, no state
        return Identity(
            must_match={
                "train_batch_size": self.experiment.global_batch,
                "precision": self.experiment.precision,
                "rdtf": {
                    "seed": rdtf.seed,
                    "model": {key: value for key, value in model.items() if key != "attention_backend"},
                    "optimizer": {"bits": rdtf.optimizer.bits, "group_size": rdtf.optimizer.group_size},
                    "ema": {"enabled": rdtf.ema.enabled},
                    # What the remembered means and integrals of the loss mean hangs on these.
                    "curriculum": {key: keys["curriculum"][key] for key in ("error", "timestep_normalised", "timestep_buckets", "delay")},
                },
            },
            may_differ={
                "data fingerprint": self.index.fingerprint,
                "zero_optimization.offload_optimizer": self.experiment.deepspeed["zero_optimization"].get("offload_optimizer"),
                "data_types.grad_accum_dtype": self.experiment.deepspeed["data_types"].get("grad_accum_dtype"),
                "feature cache": None if self.cached is None else asdict(self.cached.cache.header),
                "rdtf": keys,
            },
        )

    @property
    def description(self) -> dict[str, Any]:
        """What else the manifest says."""
        return {
            "precision": self.experiment.precision,
            "config_sha256": config_hash(self.experiment),
            "model": model_config(self.engine.model),
            "index": name_of(self.index, index_keys(self.experiment.rdtf, data_root(self.experiment.rdtf, self.folder))).to_json(),
        }

    def merge_problems(self, problems: list[Problem], step: int) -> None:
        """Quarantine what any rank could not decode in a step, on all ranks alike, so that all stop together past the limit."""
        everyones = [problem for part in gather_objects(problems) for problem in part]
        self.quarantine.merge(sorted(everyones, key=lambda problem: (problem.sample_number or 0, problem.path)), step)


def schedule_steps(rdtf: RDTFSection) -> int:
    """Applied steps of the static schedule; ``max_steps`` unless the config says otherwise."""
    return rdtf.curriculum.static_steps or rdtf.max_steps


def model_config(model: Any) -> dict[str, Any]:
    """DFGN's arguments, JSON-able."""
    config: dict[str, Any] = json.loads(json.dumps({key: value for key, value in model.config.items() if not key.startswith("_")}))
    return config


def config_hash(experiment: Experiment) -> str:
    """SHA-256 of the resolved experiment, without where it writes."""
    resolved = experiment.resolved()
    resolved["rdtf"] = {key: value for key, value in resolved["rdtf"].items() if key != "output_dir"}
    return hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()


def build_run(experiment: Experiment, rank: int, world_size: int, device: torch.device, reindex: bool = False) -> Run:
    """Folder, data, encoders, network, optimizer and curriculum of a run; called by all ranks.

    Args:
        reindex: Take the clips as they are now, not as the index of the run's checkpoint has them.

    Raises:
        UserError: Whatever the experiment names is missing, unusable or unwritable; on all ranks alike.
    """
    rdtf = experiment.rdtf
    folder = Path(rdtf.output_dir)
    store = build_store(rdtf, folder)
    named = on_rank_zero(lambda: named_by(store))
    index, cached = open_data(experiment, folder, device, named, reindex)
    on_rank_zero(lambda: prune(folder, store, index))
    reindexed = named is not None and (reindex or name_of(index, {}).fingerprint != named.fingerprint)
    quarantine = build_quarantine(rdtf, folder, index, write=rank == 0, anew=reindexed)

    source = build_source(experiment, cached, device)
    torch.manual_seed(derive_seed(rdtf.seed, "model"))
    model = build_model(rdtf, source.latent.channels, source.clip_dim, source.t5_dim)
    engine = _build_engine(model, experiment, world_size)
    shards = {group.name: master for group, master in zip(engine.groups, engine.masters, strict=True)}
    waits_on = torch.device("cpu") if rdtf.ema.device == "cpu" else None
    ema = ShardedEMA(shards, rdtf.ema.decay, waits_on) if rdtf.ema.enabled else None

    curriculum = build_curriculum(rdtf)
    planner = build_planner(experiment, curriculum, index.trainable, index.frame_counts)
    queue = PlanQueue(planner, rdtf.curriculum.delay)
    dataset = build_dataset(rdtf, index, source.latent, cached)
    loader = PlannedLoader(
        dataset,
        queue,
        rank,
        world_size,
        experiment.micro_batch,
        experiment.accumulation(world_size),
        rdtf.data.workers,
        pin_memory=device.type == "cuda",
        barred=quarantine.barred_since,
    )
    diffusion = rdtf.diffusion
    objective = Objective(
        encoding=source.encoding,
        alphas_cumprod=alphas_cumprod(diffusion.schedule, diffusion.beta_start, diffusion.beta_end, diffusion.steps).to(device),
        guidance=rdtf.model.guidance,
        min_snr_gamma=diffusion.min_snr_gamma,
        device=device,
        dtype=engine.dtype,
    )
    return Run(
        experiment,
        folder,
        engine,
        ema,
        objective,
        index,
        cached,
        curriculum,
        queue,
        loader,
        quarantine,
        store,
        Incidents(folder / "incidents.jsonl", write=rank == 0),
        BadSteps(rdtf.watchdog.bad_steps),
        reindexed,
    )


def _build_engine(model: DFGN, experiment: Experiment, world_size: int) -> TrainingEngine:
    settings = experiment.rdtf.optimizer
    return TrainingEngine(
        model,
        split_model(model, experiment.rdtf),
        experiment.deepspeed_config(world_size),
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )


def build_store(rdtf: RDTFSection, folder: Path) -> CheckpointStore:
    """The run's folder of checkpoints."""
    keys = rdtf.checkpoint
    key = None if keys.key_file is None else read_key(keys.key_file)
    return CheckpointStore(folder / "checkpoints", keys.keep, keys.keep_every, key)


def prepare_folder(folder: Path) -> None:
    """Make the run folder and see that it can be written, before hours of training end at the first checkpoint."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / ".writable", b"")
        (folder / ".writable").unlink()
    except OSError as error:
        raise UserError(
            f"The output folder '{folder}' cannot be written ({error.strerror}). Give a folder you may write to with --output_dir "
            f"(rdtf.output_dir)."
        ) from error


def write_config(folder: Path, experiment: Experiment) -> None:
    """``config.json``, the resolved experiment; only once a resume was accepted, so that a refused one leaves the run's own."""
    try:
        write_atomically(folder / "config.json", (json.dumps(experiment.resolved(), indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(f"'{folder / 'config.json'}' cannot be written ({error.strerror}). Free some space and start again.") from error


def build_model(rdtf: RDTFSection, latent_channels: int, clip_dim: int, t5_dim: int) -> DFGN:
    """DFGN for these latents and text features; weights from torch's global generator."""
    shape = rdtf.model
    guidance = PIXEL_GUIDANCE_CHANNELS if shape.guidance == "pixel" else latent_channels
    channels = {"in_channels": latent_channels + guidance, "out_channels": latent_channels}
    model: DFGN = DFGN(**channels, clip_dim=clip_dim, t5_dim=t5_dim, **shape.model_dump())
    model.set_activation_checkpointing(rdtf.memory.activation_checkpointing)
    if rdtf.memory.channels_last:
        # ZeRO lays parameters out flat, in the plain order, so it is the activations that carry the layout from the first layer on.
        model.conv_in.register_forward_pre_hook(_to_channels_last)
    return model


def _to_channels_last(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (inputs[0].contiguous(memory_format=torch.channels_last),)


def split_model(model: DFGN, rdtf: RDTFSection) -> list[ParameterGroup]:
    """The optimizer's groups of this model."""
    return split_parameters(
        model.named_parameters(), rdtf.optimizer.group_size, zero_initialised=model.zero_initialised_parameters(), bits=rdtf.optimizer.bits
    )


def build_curriculum(rdtf: RDTFSection) -> Curriculum:
    """Static schedule, PID and their balance."""
    keys = rdtf.curriculum
    schedule = StaticSchedule(
        {Task(name): p for name, p in keys.static_start.items()},
        {Task(name): p for name, p in keys.static_end.items()},
        schedule_steps(rdtf),
    )
    pid = PIDController(
        PIDGains(keys.k_p, keys.k_i, keys.k_d),
        error=keys.error,
        fast_horizon=keys.fast_horizon,
        slow_horizon=keys.slow_horizon,
        integral_limit=keys.integral_limit,
    )
    normaliser = TimestepNormaliser(keys.timestep_buckets, rdtf.diffusion.steps, keys.slow_horizon) if keys.timestep_normalised else None
    return Curriculum(
        keys.mode,
        schedule,
        pid,
        sigma=keys.sigma,
        k_range=(rdtf.data.k_min, rdtf.data.frames),
        text_only_share=keys.text_only_share,
        no_text_share=keys.no_text_share,
        normaliser=normaliser,
    )


def build_planner(experiment: Experiment, curriculum: Curriculum, clip_ids: np.ndarray, frame_counts: np.ndarray) -> StepPlanner:
    """Plans of every step over these clips."""
    data = experiment.rdtf.data
    return StepPlanner(
        experiment.rdtf.seed, experiment.global_batch, clip_ids, frame_counts, curriculum, frames=data.frames, dual_mask=data.dual_mask
    )
