"""The whole train step on one fixed sample: if anything between pixels and the optimizer is wired wrongly, it cannot be learned."""

from __future__ import annotations

import pytest
import torch

from rdtf_ds.data.step_plan import SamplePlan
from rdtf_ds.diffusion.masks import Task
from rdtf_ds.experiment import load_experiment
from rdtf_ds.training.assembly import build_run


@pytest.fixture
def tiny_run(process_group, project_root, tmp_path):
    settings = [
        "train_batch_size=1",
        "rdtf.model.block_out_channels=[32,64]",
        "rdtf.encoders.autoencoder=haar:2",
        "rdtf.data.image_size=16",
        "rdtf.data.synthetic_clips=6",
        "rdtf.data.workers=0",
        "rdtf.optimizer.learning_rate=0.005",
        "rdtf.memory.activation_checkpointing=none",
    ]
    experiment = load_experiment(project_root / "ds_configs" / "tiny_cpu.json", settings, output_dir=tmp_path)
    return build_run(experiment, 0, 1, torch.device("cpu"))


def test_overfitting_one_sample_drives_the_loss_down_twentyfold(tiny_run):
    run = tiny_run
    mask = (True, False, False)
    (clip_id, *_), numbers = run.index.trainable.tolist(), iter(range(100))
    batch = next(
        batch
        for number in numbers
        if 300 < (batch := run.loader._dataset[(SamplePlan(number, clip_id, 3, Task.GENERATION, mask, True),)]).timestep.item() < 700
    )
    losses = []
    for _ in range(250):
        run.engine.backward(run.objective.losses(run.engine.forward, run.objective.encode(batch)), batch.timestep)
        outcome = run.engine.step()
        losses.append(outcome.loss)
        if losses[-1] < losses[0] / 20:
            break
    assert 0.7 < losses[0] < 1.4, "an output that starts at zero leaves the variance of the noise, 1"
    assert min(losses) <= losses[0] / 20
