"""Every wrong an experiment file or an override can hold gets a message with its key, its value and what is allowed; all at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from rdtf_ds.config import RDTFSection
from rdtf_ds.config_parsing import dotted_keys, nearest_key
from rdtf_ds.errors import UserError
from rdtf_ds.experiment import ConfigError, load_experiment
from tests.experiments import load, problems


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
            ("rdtf.sampling.eta=2", "less than or equal to 1"),
            ("rdtf.sampling.frame_ms=100000", "less than or equal to 65535"),
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
