"""The shipped experiments say what the paper and their machines say, and each fits its devices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rdtf_ds.errors import UserError
from rdtf_ds.experiment import load_experiment
from tests.experiments import CONFIGS, SHIPPED, load


class TestShippedFiles:
    @pytest.mark.parametrize("name", SHIPPED)
    def test_loads_without_warnings_and_resolves_to_itself(self, name: str, tmp_path: Path) -> None:
        experiment = load(name)
        assert experiment.warnings == ()
        resolved = tmp_path / "config.json"
        resolved.write_text(json.dumps(experiment.resolved()))
        assert load_experiment(resolved, require_data=False) == experiment

    def test_v100_is_table_6(self) -> None:
        # Table 6 of the paper, top to bottom; the latents' 4 channels and f = 8 are those of the autoencoder named.
        ours, experiment = load("v100").rdtf, load("v100")
        assert ours.data.image_size == 32 * 8 and ours.encoders.autoencoder == "stabilityai/sd-vae-ft-mse"
        assert (ours.model.layers_per_block, ours.model.head_channels) == (2, 64)
        assert (ours.model.context_dim, ours.encoders.text_length) == (1024, 77)
        assert (ours.model.temporal_layer, ours.model.sti_kernel_size, ours.model.sti_heads, ours.model.sti_head_dim) == ("sti", 3, 8, 32)
        assert (ours.data.k_min, ours.data.frames) == (3, 8)
        assert (ours.curriculum.k_p, ours.curriculum.k_i, ours.curriculum.k_d) == (5.0, 3.0, 1.3)
        assert (ours.max_steps, ours.optimizer.learning_rate) == (50_000, 1e-5)
        assert (experiment.micro_batch, experiment.global_batch) == (1, 16)
        noise, sampling = ours.diffusion, ours.sampling
        assert (noise.steps, noise.schedule, noise.beta_start, noise.beta_end) == (1000, "linear", 0.00085, 0.0120)
        assert (sampling.steps, sampling.eta, sampling.text_scale, sampling.image_scale) == (50, 1.0, 7.5, 7.5)

    @pytest.mark.parametrize("name", ["v100", "v100_16gb"])
    def test_v100s_train_in_fp16_with_dynamic_loss_scaling(self, name: str) -> None:
        experiment = load(name)
        assert experiment.precision == "fp16"
        assert experiment.deepspeed["fp16"]["loss_scale"] == 0
        assert experiment.rdtf.optimizer.bits == 8 and experiment.rdtf.ema.enabled
        assert [experiment.accumulation(gpus) for gpus in (1, 2, 4, 8)] == [16, 8, 4, 2]

    def test_full_cpu_is_the_full_model_in_bf16(self) -> None:
        full, v100 = load("full_cpu"), load("v100")
        assert full.precision == "bf16"
        assert full.rdtf.model == v100.rdtf.model
        assert not full.rdtf.ema.enabled and full.rdtf.validation.interval == 0
        assert full.rdtf.data.synthetic_clips > 0

    def test_tiny_checkpoints_every_5_steps_and_runs_on_1_or_2_ranks(self) -> None:
        tiny = load("tiny_cpu")
        assert tiny.rdtf.checkpoint.interval == 5
        assert (tiny.precision, tiny.accumulation(1), tiny.accumulation(2)) == ("fp32", 4, 2)
        load_experiment(CONFIGS / "tiny_cpu.json").check_device(cuda_available=False, world_size=2)


class TestDevice:
    def test_fp16_without_a_gpu(self) -> None:
        half = load("v100", data_dir="clips")
        with pytest.raises(UserError, match="rdtf.verify_fp16_on_cpu=true"):
            half.check_device(cuda_available=False, world_size=2)
        half.check_device(cuda_available=True, world_size=2, capability=(7, 0))
        load("v100", "rdtf.verify_fp16_on_cpu=true").check_device(cuda_available=False, world_size=2)

    def test_bf16_on_v100(self) -> None:
        brain = load("tiny_cpu", "bf16.enabled=true")
        brain.check_device(cuda_available=False, world_size=1)
        brain.check_device(cuda_available=True, world_size=1, capability=(8, 0))
        with pytest.raises(UserError, match="fp16.enabled=true"):
            brain.check_device(cuda_available=True, world_size=1, capability=(7, 5))

    def test_batch_over_this_many_gpus(self) -> None:
        with pytest.raises(UserError, match="cannot be split over 3"):
            load("tiny_cpu").check_device(cuda_available=False, world_size=3)


def test_a_rank_count_that_cannot_share_8bit_blocks_is_refused():
    experiment = load_experiment(CONFIGS / "tiny_cpu.json", ["train_batch_size=30"])
    assert [experiment.accumulation(world) for world in (1, 2, 3, 6)] == [30, 15, 10, 5]
    for world in (5, 10, 15, 30):
        with pytest.raises(UserError, match=f"{world} GPUs cannot share .* train_batch_size = 30: 1, 2, 3, 6\\."):
            experiment.accumulation(world)
    with pytest.raises(UserError, match="fit this micro-batch: 1, 2, 3, 6;"):
        experiment.accumulation(4)
