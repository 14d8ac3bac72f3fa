"""Every wrong an experiment file can hold gets a message with its key, its value and what is allowed; all of them at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rdtf_ds.config import RDTFSection
from rdtf_ds.config_parsing import dotted_keys, nearest_key
from rdtf_ds.cross_checks import Problem, divisors
from rdtf_ds.errors import UserError
from rdtf_ds.experiment import ConfigError, Experiment, load_experiment

CONFIGS = Path(__file__).resolve().parents[1] / "ds_configs"
SHIPPED = ("v100", "v100_16gb", "full_cpu", "demo_cpu", "tiny_cpu")


def load(name: str = "tiny_cpu", *overrides: str, **options: object) -> Experiment:
    return load_experiment(CONFIGS / f"{name}.json", overrides, **{"require_data": False, **options})  # type: ignore[arg-type]


def problems(*overrides: str, name: str = "tiny_cpu", **options: object) -> dict[str, Problem]:
    with pytest.raises(ConfigError) as caught:
        load(name, *overrides, **options)
    found = {problem.path: problem for problem in caught.value.problems}
    assert len(found) == len(caught.value.problems), "one report a key"
    assert all(str(problem) in str(caught.value) for problem in caught.value.problems)
    return found


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


class TestStrictness:
    def test_all_problems_at_once(self) -> None:
        found = problems(
            'rdtf.model.norm_groups="8"',
            "rdtf.data.frames=9",
            "zero_optimization.stage=3",
            "zero_optimization.elastic_checkpoint=true",
            "rdtf.curriculum.mode=pid",
            "rdtf.checkpoint.intervall=4",
            "rdtf.curriculum.static_start.IPT=0.1",
            "seed.x",
        )
        assert set(found) == {
            "rdtf.model.norm_groups",
            "rdtf.data.frames",
            "zero_optimization.stage",
            "zero_optimization.elastic_checkpoint",
            "rdtf.curriculum.mode",
            "rdtf.checkpoint.intervall",
            "rdtf.curriculum.static_start",
            "--set seed.x",
        }
        assert str(found["rdtf.curriculum.mode"]) == ("rdtf.curriculum.mode = \"pid\": allowed: 'none', 'linear' or 'difficulty_adaptive'")
        assert "allowed: less than or equal to 8" in str(found["rdtf.data.frames"])

    @pytest.mark.parametrize(
        ("override", "allowed"),
        [
            ('rdtf.max_steps="8"', "valid integer"),
            ("rdtf.max_steps=8.5", "valid integer"),
            ("rdtf.max_steps=true", "valid integer"),
            ("rdtf.max_steps=0", "greater than 0"),
            ('rdtf.ema.enabled="yes"', "valid boolean"),
            ("rdtf.ema.decay=1.0", "less than 1"),
            ("rdtf.data.background=[0,0,256]", "less than or equal to 255"),
            ("rdtf.data.background=[0,0]", "Field required"),
            ("rdtf.optimizer.learning_rate=null", "valid number"),
            ("rdtf.optimizer.learning_rate=NaN", "valid number"),
            ("rdtf.optimizer.learning_rate=1e999", "finite number"),
            ("rdtf.model=7", "object"),
            ("fp16=true", "object"),
        ],
    )
    def test_refuses(self, override: str, allowed: str) -> None:
        path = override.partition("=")[0]
        [problem] = problems(override).values()
        assert problem.path.startswith(path)
        assert allowed in problem.message or problem.message == "is required and missing"

    def test_a_whole_number_is_a_number_and_a_list_is_a_tuple(self) -> None:
        ours = load("tiny_cpu", "rdtf.curriculum.k_p=4", "rdtf.data.background=[1,2,3]").rdtf
        assert ours.curriculum.k_p == 4.0 and ours.data.background == (1, 2, 3)

    def test_frozen(self) -> None:
        with pytest.raises(ValueError, match="frozen"):
            load().rdtf.max_steps = 3

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("{", "no valid JSON"),
            ("[]", "one JSON object"),
            ('{"rdtf": {}, "rdtf": {}}', "key rdtf stands twice"),
            ('{"gradient_clipping": NaN}', "NaN is not a number"),
        ],
    )
    def test_a_file_that_is_no_experiment(self, text: str, says: str, tmp_path: Path) -> None:
        path = tmp_path / "bad.json"
        path.write_text(text)
        with pytest.raises(UserError, match=says) as caught:
            load_experiment(path)
        assert str(path) in str(caught.value)

    def test_a_file_that_is_absent_or_binary(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="cannot be read"):
            load_experiment(tmp_path / "none.json")
        (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(UserError, match="UTF-8"):
            load_experiment(tmp_path / "binary.json")

    def test_an_empty_object_names_what_is_required(self, tmp_path: Path) -> None:
        (tmp_path / "empty.json").write_text("{}")
        with pytest.raises(ConfigError) as caught:
            load_experiment(tmp_path / "empty.json")
        required = {"train_batch_size", "train_micro_batch_size_per_gpu", "zero_optimization", "rdtf"}
        assert {problem.path for problem in caught.value.problems} == required


class TestOverrides:
    def test_reach_both_halves_and_later_ones_win(self) -> None:
        experiment = load("tiny_cpu", "gradient_clipping=0.5", "rdtf.seed=3", "rdtf.seed=4", "rdtf.output_dir=runs/a=b")
        assert experiment.deepspeed["gradient_clipping"] == 0.5
        assert (experiment.rdtf.seed, experiment.rdtf.output_dir) == (4, "runs/a=b")

    def test_one_entry_of_a_default_table(self) -> None:
        shares = load("tiny_cpu", "rdtf.curriculum.static_start.IPT=0.5", "rdtf.curriculum.static_start.GRT=0.25").rdtf.curriculum
        assert shares.static_start == {"IPT": 0.5, "PDT": 0.25, "GRT": 0.25}

    def test_options_are_stronger(self) -> None:
        ours = load("tiny_cpu", "rdtf.seed=3", "rdtf.max_steps=3", data_dir=Path("clips"), output_dir="out", max_steps=7, seed=0).rdtf
        assert (ours.data.data_dir, ours.output_dir, ours.max_steps, ours.seed) == ("clips", "out", 7, 0)

    def test_a_bad_option_names_its_key(self) -> None:
        assert set(problems(max_steps=0, seed=-1)) == {"rdtf.max_steps", "rdtf.seed"}

    def test_a_key_inside_a_value(self) -> None:
        [problem] = problems("rdtf.max_steps.x=1").values()
        assert "rdtf.max_steps holds 20, which has no keys" in problem.message

    @pytest.mark.parametrize(
        ("typo", "meant"),
        [
            ("checkpoint_interval", "rdtf.checkpoint.interval"),
            ("rdtf.checkpoint_interval", "rdtf.checkpoint.interval"),
            ("rdtf.checkpoint.intervall", "rdtf.checkpoint.interval"),
            ("rdtf.data.max_bad", "rdtf.data.max_bad_fraction"),
            ("rdtf.mode", "rdtf.curriculum.mode"),
            ("train_batchsize", "train_batch_size"),
            ("fp16.enable", "fp16.enabled"),
            ("zero_optimization.reduce_bucket", "zero_optimization.reduce_bucket_size"),
        ],
    )
    def test_nearest_key(self, typo: str, meant: str) -> None:
        [problem] = problems(f"{typo}=1").values()
        assert problem.path == typo
        assert problem.message == f"unknown key; the nearest is {meant}"

    def test_every_key_is_its_own_nearest(self) -> None:
        sections = set(RDTFSection.model_fields) - {"seed", "output_dir", "max_steps", "verify_fp16_on_cpu"}
        for key in dotted_keys(RDTFSection):
            assert nearest_key(f"rdtf.{key}", section=key in sections) == f"rdtf.{key}"

    def test_a_mistyped_section(self) -> None:
        [problem] = problems("rdtf.modle.norm_groups=4").values()
        assert (problem.path, problem.message) == ("rdtf.modle", "unknown key; the nearest is rdtf.model")


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


OFFLOAD = 'zero_optimization.offload_optimizer={"device":"cpu"}'
VALIDATES = "rdtf.validation.interval=10"


class TestAcrossKeys:
    @pytest.mark.parametrize("ema", ["rdtf.ema.device=cpu", "rdtf.ema.enabled=false"])
    def test_offload_takes_32_bits_and_no_ema_on_the_gpu(self, ema: str) -> None:
        zero = load("tiny_cpu", OFFLOAD, "rdtf.optimizer.bits=32", ema).deepspeed_config(1)["zero_optimization"]
        assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}

    def test_precision_of_the_sums_reaches_deepspeed(self) -> None:
        assert load("tiny_cpu", "data_types.grad_accum_dtype=fp32").deepspeed_config(1)["data_types"] == {"grad_accum_dtype": "fp32"}
        assert not load("tiny_cpu").deepspeed_config(1)["data_types"]

    def test_gradients_are_contiguous(self) -> None:
        [problem] = problems("zero_optimization.contiguous_gradients=false").values()
        assert "one buffer of gradients" in problem.message

    @pytest.mark.parametrize(
        ("overrides", "path", "says"),
        [
            ([OFFLOAD, "rdtf.ema.device=cpu"], "rdtf.optimizer.bits", "must be 32 with zero_optimization.offload_optimizer"),
            ([OFFLOAD, "rdtf.optimizer.bits=32"], "rdtf.ema.device", "must be cpu with zero_optimization.offload_optimizer"),
            (
                [OFFLOAD, "rdtf.optimizer.bits=32", "rdtf.ema.enabled=false", "data_types.grad_accum_dtype=fp32"],
                "data_types.grad_accum_dtype",
                "remove one of the two",
            ),
            (["rdtf.model.attention_levels=[true]"], "rdtf.model.attention_levels", "has 1 entries; block_out_channels has 2 levels"),
            (["rdtf.model.sti_gamma=[1,1,1]"], "rdtf.model.sti_gamma", "has 3 entries"),
            (["rdtf.model.block_out_channels=[10,16]"], "rdtf.model.block_out_channels[0]", "multiple of norm_groups = 4"),
            (["rdtf.model.block_out_channels=[8,20]"], "rdtf.model.block_out_channels[1]", "multiple of head_channels = 8"),
            (["rdtf.model.sti_kernel_size=4"], "rdtf.model.sti_kernel_size", "odd"),
            (["rdtf.model.sti_gamma=[3,1]"], "rdtf.model.sti_gamma[0]", "side, 8; allowed: 1, 2, 4, 8"),
            (["rdtf.data.image_size=36"], "rdtf.data.image_size", "multiple of 8: the autoencoder divides by 4, the 2 levels by 2"),
            (["rdtf.encoders.autoencoder=tiny", "rdtf.data.image_size=40"], "rdtf.data.image_size", "multiple of 16"),
            (["rdtf.encoders.autoencoder=haar:3"], "rdtf.encoders.autoencoder", "haar:2, haar:4"),
            (["rdtf.data.k_min=6", "rdtf.data.frames=5"], "rdtf.data.k_min", "allowed: 3 to 5"),
            (["rdtf.data.no_text_probability=0.5", "rdtf.data.neither_probability=0.5"], "rdtf.data.no_text_probability", "make 1.05"),
            (["rdtf.data.max_frames=7"], "rdtf.data.max_frames", "at least rdtf.data.frames = 8"),
            (["rdtf.data.max_source_frames=99"], "rdtf.data.max_source_frames", "at least max_frames = 128"),
            (['rdtf.data.data_dir=""'], "rdtf.data.data_dir", "is empty; name something"),
            (["rdtf.data.group_pattern='(a'"], "rdtf.data.group_pattern", "is no regular expression: missing )"),
            (['rdtf.curriculum.static_end={"IPT":0.5,"GRT":0.5}'], "rdtf.curriculum.static_end", "all of IPT, PDT and GRT"),
            (["rdtf.curriculum.static_end.GRT=0.6"], "rdtf.curriculum.static_end", "make 1.1; they must sum to 1"),
            (["rdtf.curriculum.fast_horizon=200"], "rdtf.curriculum.fast_horizon", "below slow_horizon = 200"),
            (["rdtf.diffusion.beta_end=0.0008"], "rdtf.diffusion.beta_end", "above beta_start = 0.00085"),
            (["rdtf.sampling.steps=1001"], "rdtf.sampling.steps", "rdtf.diffusion.steps = 1000"),
            (["rdtf.validation.steps=1001"], "rdtf.validation.steps", "rdtf.diffusion.steps = 1000"),
            ([VALIDATES, "rdtf.validation.timesteps=[0,9,1000]"], "rdtf.validation.timesteps", "1000 is none of the rdtf.diffusion.steps"),
            ([VALIDATES, "rdtf.validation.timesteps=[5,7,5]"], "rdtf.validation.timesteps", "names a timestep twice"),
            ([VALIDATES, "rdtf.validation.timesteps=[]"], "rdtf.validation.timesteps", "set rdtf.validation.held_out_clips to 0"),
            (["rdtf.validation.fvd_interval=5"], "rdtf.validation.fvd_interval", "rdtf.validation.interval is 0"),
            ([VALIDATES, "rdtf.validation.fvd_interval=15"], "rdtf.validation.fvd_interval", "multiple of rdtf.validation.interval = 10"),
            (["rdtf.curriculum.timestep_buckets=1001"], "rdtf.curriculum.timestep_buckets", "rdtf.diffusion.steps = 1000"),
        ],
    )
    def test_refuses(self, overrides: list[str], path: str, says: str) -> None:
        [problem] = problems(*overrides).values()
        assert problem.path == path
        assert says in problem.message

    def test_equation_2(self) -> None:
        turned = [
            'rdtf.curriculum.static_start={"IPT":0.2,"PDT":0.3,"GRT":0.5}',
            'rdtf.curriculum.static_end={"IPT":0.6,"PDT":0.25,"GRT":0.15}',
        ]
        found = problems(*turned)
        assert {path: problem.message.rpartition("may ")[2] for path, problem in found.items()} == {
            "rdtf.curriculum.static_end.IPT": "never rise",
            "rdtf.curriculum.static_end.PDT": "never fall",
            "rdtf.curriculum.static_end.GRT": "never fall",
        }
        load("tiny_cpu", 'rdtf.curriculum.static_end={"IPT":0.6,"PDT":0.25,"GRT":0.15}')  # constant: neither rises nor falls

    def test_width_without_attention_need_not_divide_by_heads(self) -> None:
        load("tiny_cpu", "rdtf.model.block_out_channels=[12,16]")
        assert "rdtf.model.block_out_channels[0]" in problems(
            "rdtf.model.block_out_channels=[12,16]", "rdtf.model.attention_levels=[true,true]"
        )

    def test_the_middle_block_attends_whatever_the_last_level_does(self) -> None:
        [problem] = problems("rdtf.model.block_out_channels=[8,20]", "rdtf.model.attention_levels=[true,false]").values()
        assert problem.path == "rdtf.model.block_out_channels[1]" and "head_channels" in problem.message

    def test_gamma_divides_the_side_of_its_own_level(self) -> None:
        # 32 px / haar:4 = 8 at level 0, 4 at level 1.
        load("tiny_cpu", "rdtf.model.sti_gamma=[8,4]")
        [problem] = problems("rdtf.model.sti_gamma=[8,8]").values()
        assert "side, 4; allowed: 1, 2, 4" in problem.message

    def test_one_frame_count_alone(self) -> None:
        assert load("tiny_cpu", "rdtf.data.k_min=5", "rdtf.data.frames=5").rdtf.data.k_min == 5

    def test_dropping_probabilities_may_fill_the_whole(self) -> None:
        drops = [f"rdtf.data.{key}_probability={value}" for key, value in (("no_text", 0.5), ("no_image", 0.25), ("neither", 0.25))]
        load("tiny_cpu", *drops)

    def test_data_from_somewhere(self) -> None:
        [problem] = problems(name="v100", require_data=True).values()
        assert problem.path == "rdtf.data.data_dir" and "--data_dir" in problem.message and "rdtf.data.synthetic_clips" in problem.message
        load("v100", "rdtf.data.synthetic_clips=1", require_data=True)
        load("v100", data_dir="clips", require_data=True)

    def test_a_check_is_silent_about_a_key_already_reported(self) -> None:
        assert set(problems('rdtf.data.k_min="x"', "rdtf.data.frames=4")) == {"rdtf.data.k_min"}
        assert set(problems("train_batch_size=0", "train_micro_batch_size_per_gpu=3")) == {"train_batch_size"}

    @pytest.mark.parametrize(
        ("override", "says"),
        [
            ("rdtf.model.sti_head_dim=12", "multiple of 8"),
            ("rdtf.optimizer.warmup_steps=20", "max_steps is 20"),
            ("rdtf.data.workers=13", "only 12 micro-batches"),
            ("rdtf.curriculum.delay=20", "older than rdtf.curriculum.fast_horizon"),
        ],
    )
    def test_warns(self, override: str, says: str) -> None:
        [warning] = load("tiny_cpu", "fp16.enabled=true", override).warnings
        assert warning.startswith(override.replace("=", " = ")) and says in warning

    def test_divisors(self) -> None:
        assert divisors(12) == [1, 2, 3, 4, 6, 12]


def test_a_rank_count_that_cannot_share_8bit_blocks_is_refused():
    experiment = load_experiment(CONFIGS / "tiny_cpu.json", ["train_batch_size=30"])
    assert [experiment.accumulation(world) for world in (1, 2, 3, 6)] == [30, 15, 10, 5]
    for world in (5, 10, 15, 30):
        with pytest.raises(UserError, match=f"{world} GPUs cannot share .* train_batch_size = 30: 1, 2, 3, 6\\."):
            experiment.accumulation(world)
    with pytest.raises(UserError, match="fit this micro-batch: 1, 2, 3, 6;"):
        experiment.accumulation(4)


def test_bf16_without_overflow_checks_is_refused():
    with pytest.raises(UserError, match="bf16.check_grad_overflow = false.*reach the weights"):
        load_experiment(CONFIGS / "full_cpu.json", ["bf16.check_grad_overflow=false"])


class TestFeatureCache:
    def test_cached_encoders_need_a_cache(self) -> None:
        found = problems("rdtf.memory.encoders=cached")
        assert set(found) == {"rdtf.memory.cache_dir"}
        assert "tools/cache_dataset.py" in str(found["rdtf.memory.cache_dir"])
        assert set(problems("rdtf.memory.encoders=cached", "rdtf.memory.cache_dir=")) == {"rdtf.memory.cache_dir"}
        assert load("tiny_cpu", "rdtf.memory.encoders=cached", "rdtf.memory.cache_dir=somewhere").warnings == ()
        [warning] = load("tiny_cpu", VALIDATES, "rdtf.validation.fvd_weights=some.ckpt").warnings
        assert "rdtf.validation.fvd_weights" in warning and "fvd_interval above 0" in warning
        assert not load("tiny_cpu", VALIDATES, "rdtf.validation.fvd_weights=some.ckpt", "rdtf.validation.fvd_interval=20").warnings
        load("tiny_cpu", "rdtf.validation.timesteps=[]")  # never read, for it never validates

    @pytest.mark.parametrize("mode", ["resident", "cpu"])
    def test_a_cache_that_is_not_read_is_warned_of(self, mode: str) -> None:
        warnings = load("tiny_cpu", f"rdtf.memory.encoders={mode}", "rdtf.memory.cache_dir=somewhere").warnings
        assert len(warnings) == 1 and "rdtf.memory.cache_dir" in warnings[0] and "rdtf.memory.encoders = cached" in warnings[0]
