"""DeepSpeed's half: what is refused with the key to use instead, and that DeepSpeed reads the same from it."""

from __future__ import annotations

import pytest

from rdtf_ds.errors import UserError
from rdtf_ds.experiment import load_experiment
from tests.experiments import CONFIGS, SHIPPED, load, problems


class TestAgainstDeepSpeed:
    @pytest.mark.parametrize(
        ("override", "remedy"),
        [
            ("zero_optimization.elastic_checkpoint=true", "cannot be loaded"),
            ("zero_optimization.round_robin_gradients=true", "shard borders"),
            ('optimizer={"type":"Adam"}', "rdtf.optimizer"),
            ('scheduler={"type":"WarmupLR"}', "rdtf.optimizer.warmup_steps"),
            ('activation_checkpointing={"partition_activations":true}', "rdtf.memory.activation_checkpointing"),
            ("gradient_accumulation_steps=4", "derived"),
        ],
    )
    def test_refused_with_the_key_to_use(self, override: str, remedy: str) -> None:
        [problem] = problems(override).values()
        assert problem.path == override.partition("=")[0]
        assert problem.message.startswith("refused: ") and remedy in problem.message

    def test_a_refused_switch_that_is_off_is_dropped(self) -> None:
        off = load("tiny_cpu", "zero_optimization.elastic_checkpoint=false", "zero_optimization.round_robin_gradients=false")
        assert off == load("tiny_cpu")

    @pytest.mark.parametrize("stage", [0, 1, 3])
    def test_only_zero_2(self, stage: int) -> None:
        [problem] = problems(f"zero_optimization.stage={stage}").values()
        assert problem.value == stage and "allowed: 2" in problem.message and "ZeRO-2" in problem.message

    def test_one_precision(self) -> None:
        [problem] = problems("bf16.enabled=true", "fp16.enabled=true").values()
        assert "bf16.enabled is true as well" in problem.message
        assert [load("tiny_cpu", *more).precision for more in ((), ("fp16.enabled=true",), ("bf16.enabled=true",))] == [
            "fp32",
            "fp16",
            "bf16",
        ]

    def test_micro_batch_divides_the_batch(self) -> None:
        [problem] = problems("train_batch_size=6", "train_micro_batch_size_per_gpu=4").values()
        assert problem.message == "must divide train_batch_size = 6; allowed: 1, 2, 3, 6"

    def test_accumulation(self) -> None:
        experiment = load("tiny_cpu", "train_batch_size=12", "train_micro_batch_size_per_gpu=2")
        assert [experiment.accumulation(gpus) for gpus in (1, 2, 3, 6)] == [6, 3, 2, 1]
        with pytest.raises(UserError, match=r"over 4 GPUs.*fit this micro-batch: 1, 2, 3, 6; .*fit 4 GPUs: 1, 3\."):
            experiment.accumulation(4)
        with pytest.raises(UserError, match=r"fit 5 GPUs: none\."):
            experiment.accumulation(5)
        with pytest.raises(UserError, match="at least one"):
            experiment.accumulation(0)

    def test_deepspeed_config_adds_up_and_is_a_copy(self) -> None:
        experiment = load("tiny_cpu")
        config = experiment.deepspeed_config(2)
        assert config["train_batch_size"] == config["train_micro_batch_size_per_gpu"] * 2 * config["gradient_accumulation_steps"]
        assert "rdtf" not in config and config["zero_allow_untested_optimizer"] is True
        config["zero_optimization"]["stage"] = 1
        assert experiment.deepspeed["zero_optimization"]["stage"] == 2

    @pytest.mark.parametrize("name", SHIPPED)
    def test_deepspeed_knows_every_key(self, name: str) -> None:
        # DeepSpeed's own models are the reference: a key they lack would be ignored or refused at the start of a run.
        from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        config = load(name).deepspeed
        for key, kind in (("fp16", DeepSpeedFP16Config), ("bf16", DeepSpeedBF16Config), ("zero_optimization", DeepSpeedZeroConfig)):
            assert set(config[key]) <= set(kind.model_fields)
            understood = kind(**config[key]).model_dump()
            assert {inner: understood[inner] for inner in config[key]} == config[key]

    @pytest.mark.parametrize("name", SHIPPED)
    def test_deepspeed_reads_the_same_from_it(self, name: str) -> None:
        from deepspeed.runtime.config import DeepSpeedConfig

        experiment = load(name)
        theirs = DeepSpeedConfig(experiment.deepspeed_config(1))  # no process group: one rank
        assert theirs.train_batch_size == experiment.global_batch
        assert theirs.train_micro_batch_size_per_gpu == experiment.micro_batch
        assert theirs.gradient_accumulation_steps == experiment.accumulation(1)
        assert (theirs.zero_optimization_stage, theirs.gradient_clipping) == (2, 1.0)
        enabled = [key for key, section in (("fp16", theirs.float16_config), ("bf16", theirs.bfloat16_config)) if section.enabled]
        assert enabled == ([] if experiment.precision == "fp32" else [experiment.precision])


def test_bf16_without_overflow_checks_is_refused():
    with pytest.raises(UserError, match="bf16.check_grad_overflow = false.*reach the weights"):
        load_experiment(CONFIGS / "full_cpu.json", ["bf16.check_grad_overflow=false"])
