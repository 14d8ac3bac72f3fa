"""Frozen parts of an export: where they come from, that they pass one at a time, and that they fit the model."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import T5EncoderModel

from rdtf_ds.errors import UserError
from rdtf_ds.export import exporting, frozen_parts
from rdtf_ds.export.exporting import export
from rdtf_ds.export.weight_files import write_weights
from rdtf_ds.models.missing import EncoderNotFound
from rdtf_ds.models.tiny_encoders import write_tiny_encoders
from tests.export.runs import WIDTH


def test_other_encoder_sources_take_the_place_of_the_runs(run, tmp_path):
    with pytest.raises(EncoderNotFound, match="absent"):
        export(run, tmp_path / "out", encoders={"clip": str(tmp_path / "absent")})
    assert not any(tmp_path.iterdir())


def test_frozen_parts_pass_one_at_a_time(run, tmp_path, monkeypatch):
    """When the next one is loaded, and when DFGN's turn comes, the one before has given its weights up."""
    loaded: list[torch.nn.Module] = []

    def all_let_go() -> bool:
        return all(parameter.is_meta for model in loaded for parameter in model.parameters())

    def spied(load):
        def call(*arguments):
            assert all_let_go(), "two parts at once"
            part = load(*arguments)
            loaded.append(part[0] if isinstance(part, tuple) else part.vae)
            return part

        return call

    def write_last(*arguments):
        assert len(loaded) == 3 and all_let_go(), "a frozen part beside DFGN's weights"
        return write_weights(*arguments)

    for name in ("load_autoencoder", "load_clip", "load_t5"):
        monkeypatch.setattr(frozen_parts, name, spied(getattr(frozen_parts, name)))
    monkeypatch.setattr(exporting, "write_weights", write_last)
    export(run, tmp_path / "out")
    assert (tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors").is_file()


def test_sharded_sources_of_frozen_parts_are_read(run, tmp_path):
    write_tiny_encoders(tmp_path / "whole", WIDTH)
    sharded = tmp_path / "t5" / "text_encoder_2"
    T5EncoderModel.from_pretrained(tmp_path / "whole" / "text_encoder_2").save_pretrained(sharded, max_shard_size="30KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    shutil.copytree(tmp_path / "whole" / "tokenizer_2", tmp_path / "t5" / "tokenizer_2")
    export(run, tmp_path / "out", encoders={"t5": str(tmp_path / "t5")})
    given, kept = (T5EncoderModel.from_pretrained(tmp_path / name / "text_encoder_2").state_dict() for name in ("whole", "out"))
    assert given.keys() == kept.keys() and all(torch.equal(given[name], kept[name]) for name in given)


@pytest.mark.parametrize(
    ("encoders", "words"),
    [
        ({"autoencoder": "haar:4"}, r"encoders\.autoencoder is 'haar:4', which has 48 latent channels.* trained with 12"),
        ({"clip": "tiny:32"}, r"encoders\.clip is 'tiny:32', which has 32 features a token.* trained with 64"),
        ({"t5": "tiny:128"}, r"encoders\.t5 is 'tiny:128', which has 128 features a token.* trained with 64"),
    ],
)
def test_frozen_parts_that_do_not_fit_the_model_are_refused(run, tmp_path, encoders, words):
    with pytest.raises(UserError, match=words):
        export(run, tmp_path / "out", encoders=encoders)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "folder", "known"), [("clip", "tokenizer", "2"), ("t5", "tokenizer_2", "4")])
def test_a_tokenizer_that_lost_its_words_is_refused(run, tmp_path, name, folder, known):
    write_tiny_encoders(tmp_path / "encoders", WIDTH)
    export(run, tmp_path / "whole", encoders={name: str(tmp_path / "encoders")})
    (tmp_path / "encoders" / folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=rf"rdtf\.encoders\.{name} is '.*encoders', but its tokenizer has {known} tokens where"):
        export(run, tmp_path / "out", encoders={name: str(tmp_path / "encoders")})
    assert not (tmp_path / "out").exists()
