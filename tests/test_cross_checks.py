"""One key against another, over both halves: what is refused and what is warned of."""

from __future__ import annotations

import pytest

from rdtf_ds.cross_checks import divisors
from tests.experiments import load, problems

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
